"""WeLore: which matrices are factored, to which rank, and what is trained afterwards."""

from __future__ import annotations

import copy
import json
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import leantrain.compress
from leantrain.compress import LayerPlan, WeLorePlan, freeze_all_but_factors, plan_welore, welore
from leantrain.compress.welore import marchenko_pastur_median
from leantrain.errors import UsageError
from leantrain.nn import Llama
from leantrain.nn.factored import FactoredLinear
from leantrain.optim import AdamW, GaLoreAdamW, parameter_groups, state_bytes

SHAPES = ((24, 16), (16, 24), (20, 20), (12, 30))
CRITERIA = ("normalised", "energy", "marchenko-pastur")
each_criterion = pytest.mark.parametrize("criterion", CRITERIA)


def decaying(rows: int, columns: int, decay: float, seed: int) -> Tensor:
    """A matrix whose singular values fall as exp(-decay j)."""
    generator = torch.Generator().manual_seed(seed)
    short = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, short, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, short, generator=generator, dtype=torch.float64)).Q
    values = torch.exp(-decay * torch.arange(short, dtype=torch.float64))
    return ((left * values) @ right.T).float()


class Net(nn.Module):
    """Layers of several shapes, each with a spectrum of its own, and a head."""

    def __init__(self, decays: tuple[float, ...] = (0.02, 0.1, 0.3, 0.6), seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(nn.Linear(columns, rows) for rows, columns in SHAPES)
        self.head = nn.Linear(30, 3)
        with torch.no_grad():
            for number, (layer, decay) in enumerate(zip(self.blocks, decays, strict=True)):
                layer.weight.copy_(decaying(*layer.weight.shape, decay, seed + number))

    def forward(self, x: Tensor) -> Tensor:
        """The layers do not fit one another: each sees the input's first numbers."""
        total = sum(layer(x[:, : layer.weight.shape[1] if isinstance(layer, nn.Linear) else layer.in_features]).sum(1)
                    for layer in self.blocks)  # fmt: skip
        return self.head(x) + total[:, None]


def spectra(model: Net) -> list[np.ndarray]:
    return [np.linalg.svd(layer.weight.detach().double().numpy(), compute_uv=False) for layer in model.blocks]


def removed_by_definition(model: Net, k: float) -> list[int]:
    """#{z < k} of each layer, from NumPy's singular values in float64."""
    return [int(((s - s[-1]) / (s[0] - s[-1]) < k).sum()) for s in spectra(model)]


@given(k=st.floats(0.01, 0.99), seed=st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_ranks_are_what_the_definition_says(k: float, seed: int):
    model = Net(seed=seed)
    plan = plan_welore(model, None, threshold=k, even_without_saving=True)
    expected = removed_by_definition(model, k)
    assert [min(p.shape) - p.rank for p in plan.layers] == [p.removable for p in plan.layers] == expected
    assert plan.rank_reduction == pytest.approx(sum(expected) / sum(min(shape) for shape in SHAPES))
    for layer, s in zip(plan.layers, spectra(model), strict=True):
        assert layer.retained_energy == pytest.approx((s[: layer.rank] ** 2).sum() / (s**2).sum(), abs=1e-6)


@given(reduction=st.floats(0.02, 0.9), seed=st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_the_reduction_is_met_to_the_nearest_step(reduction: float, seed: int):
    """The smallest value of every matrix is 0, so that the first step takes one rank from each."""
    model = Net(seed=seed)
    z = np.concatenate([(s - s[-1]) / (s[0] - s[-1]) for s in spectra(model)])
    achievable = {(z < k + 1e-9).sum() / len(z) for k in z if k < 0.999} | {0.0}
    plan = plan_welore(model, reduction)
    assert plan.rank_reduction is not None
    assert abs(plan.rank_reduction - reduction) == pytest.approx(min(abs(a - reduction) for a in achievable), abs=1e-9)


@pytest.mark.parametrize("criterion", ["energy", "marchenko-pastur"])
@pytest.mark.parametrize("reduction", [0.03, 0.3, 0.77])
def test_other_criteria_meet_the_reduction_within_half_a_rank(criterion, reduction: float):
    plan = plan_welore(Net(), reduction, criterion=criterion)
    assert abs(plan.rank_reduction - reduction) <= 0.501 / sum(min(shape) for shape in SHAPES)


@each_criterion
def test_ranks_and_reduction_never_grow_with_the_threshold(criterion):
    model = Net()
    plans = [plan_welore(model, None, threshold=k, criterion=criterion) for k in np.linspace(0, 2, 40)]
    for smaller, larger in pairwise(plans):
        assert smaller.rank_reduction <= larger.rank_reduction
        assert smaller.parameters_after >= larger.parameters_after
        assert all(a.removable <= b.removable for a, b in zip(smaller.layers, larger.layers, strict=True))
    assert plans[0].rank_reduction == 0 and all(p.rank >= 1 for p in plans[-1].layers)


@each_criterion
@given(scales=st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4))
@settings(max_examples=15, deadline=None)
def test_the_size_of_a_matrix_does_not_matter(criterion, scales: list[float]):
    model = Net()
    before = plan_welore(model, 0.4, criterion=criterion)
    with torch.no_grad():
        for layer, scale in zip(model.blocks, scales, strict=True):
            layer.weight.mul_(scale)
    after = plan_welore(model, 0.4, criterion=criterion)
    assert [p.rank for p in after.layers] == [p.rank for p in before.layers]
    assert after.threshold == pytest.approx(before.threshold, rel=1e-3)


def test_steeper_spectra_lose_more():
    plan = plan_welore(Net(), 0.4, even_without_saving=True)
    parts = [p.removable / min(p.shape) for p in plan.layers]
    assert parts == sorted(parts) and parts[0] < 0.3 < 0.6 < parts[-1]


@pytest.mark.parametrize("reduction", [0.1, 0.3, 0.5])
def test_a_part_of_the_numbers_can_be_asked_for(reduction: float):
    plan = plan_welore(Net(), reduction, measure="parameters")
    assert plan.rank_reduction is None
    assert 1 - plan.parameters_after / plan.parameters_before == pytest.approx(reduction, abs=0.02)


def test_a_factorisation_that_saves_nothing_is_not_made_unless_asked():
    square = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    with torch.no_grad():
        square[0].weight.copy_(torch.diag(torch.linspace(1, 0, 8)))
    plan = plan_welore(square, 0.5)
    assert plan.rank_reduction == 0.5 and not plan.layers[0].factored and plan.layers[0].removable == 4
    assert plan.parameters_after == plan.parameters_before == 64
    asked = plan_welore(square, 0.5, even_without_saving=True)
    assert asked.layers[0].factored and asked.layers[0].rank == 4 and asked.parameters_after == 64
    exactly_half = plan_welore(square, 0.5, even_without_saving=True, min_ratio=0.5)
    assert not exactly_half.layers[0].factored  # more than min_ratio has to go


def test_min_ratio_leaves_dense_what_would_lose_less():
    model = Net()
    every, half = (plan_welore(model, 0.5, min_ratio=ratio, even_without_saving=True) for ratio in (0.0, 0.4999))
    assert every.threshold == half.threshold and every.rank_reduction == half.rank_reduction
    assert [p.factored for p in half.layers] == [p.removable / min(p.shape) > 0.4999 for p in every.layers]
    assert 0 < sum(p.factored for p in half.layers) < len(SHAPES)
    assert all(p.rank == min(p.shape) and p.retained_energy == 1 for p in half.layers if not p.factored)


def test_one_outlier_changes_the_papers_criterion_and_not_the_median_one():
    model, spiked = Net(), Net()
    with torch.no_grad():
        u, s, vt = torch.linalg.svd(spiked.blocks[1].weight, full_matrices=False)
        s[0] *= 50
        spiked.blocks[1].weight.copy_((u * s) @ vt)
    for criterion, changes in (("normalised", True), ("marchenko-pastur", False)):
        removable = [
            plan_welore(m, None, threshold=0.5, criterion=criterion).layers[1].removable for m in (model, spiked)
        ]
        assert (removable[0] != removable[1]) is changes


def test_noise_alone_is_below_the_edge_of_noise():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 100), nn.Linear(100, 2))
    nn.init.normal_(model[0].weight)
    with torch.no_grad():
        model[0].weight.add_(40 * torch.outer(torch.randn(100), torch.randn(400)) / 20)
    plan = plan_welore(model, None, threshold=1.03, criterion="marchenko-pastur")
    assert plan.layers[0].rank == 1


@pytest.mark.parametrize(("short", "long"), [(300, 300), (200, 400), (100, 1000)])
def test_the_median_of_noise_is_that_of_random_matrices(short: int, long: int):
    torch.manual_seed(0)
    squared = torch.linalg.svdvals(torch.randn(short, long) / long**0.5).square()
    assert marchenko_pastur_median(short / long) == pytest.approx(squared.median().item(), rel=0.02)


def test_the_median_of_square_noise_gives_the_published_constant():
    """Gavish & Donoho 2014: the best threshold of a square matrix is 2.858 medians, and 4 / sqrt(3) units of noise."""
    assert 4 / 3**0.5 / marchenko_pastur_median(1.0) ** 0.5 == pytest.approx(2.858, abs=1e-3)


def test_energy_keeps_the_fewest_values_that_hold_it():
    model = Net()
    plan = plan_welore(model, None, threshold=0.05, criterion="energy", even_without_saving=True)
    for layer, s in zip(plan.layers, spectra(model), strict=True):
        held = np.cumsum(s**2) / (s**2).sum()
        assert layer.rank == int(np.argmax(held > 0.95)) + 1


@pytest.mark.parametrize("criterion", CRITERIA)
def test_flat_and_empty_spectra_are_no_accident(criterion: str):
    flat = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    with torch.no_grad():
        flat[0].weight.copy_(torch.eye(8))
        flat[1].weight.zero_()
    eye, zero = plan_welore(flat, None, threshold=0.1, criterion=criterion).layers
    assert not eye.factored and zero.rank == 1 and zero.retained_energy == 1
    welore(flat, None, threshold=0.1, criterion=criterion)
    assert not flat[1].merge().weight.any()


def test_applied_layers_are_the_best_of_their_rank_and_the_others_untouched():
    model = Net()
    dense, plan = copy.deepcopy(model), plan_welore(model, 0.5)
    assert plan.apply(model) is model
    assert 0 < sum(p.factored for p in plan.layers) < len(SHAPES)
    for layer, before, planned in zip(model.blocks, dense.blocks, plan.layers, strict=True):
        if not planned.factored:
            assert type(layer) is nn.Linear and torch.equal(layer.weight, before.weight)
            continue
        u, s, vt = np.linalg.svd(before.weight.detach().double().numpy(), full_matrices=False)
        best = (u[:, : planned.rank] * s[: planned.rank]) @ vt[: planned.rank]
        np.testing.assert_allclose(layer.merge().weight.detach().numpy(), best, atol=1e-5)
        assert torch.equal(layer.up.bias, before.bias)
    assert torch.equal(model.head.weight, dense.head.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_bytes_are_the_measured_ones(dtype: torch.dtype):
    model = Net().to(dtype)
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    plan = plan_welore(model, 0.6)
    plan.apply(model)
    after = sum(p.untyped_storage().nbytes() for p in model.parameters())
    assert before - after == plan.bytes_before - plan.bytes_after > 0
    assert plan.parameters_before == sum(a * b for a, b in SHAPES)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_at_equal_size_it_loses_less_than_the_same_rank_everywhere():
    model = Net()
    plan = plan_welore(model, 0.3, measure="parameters")
    part = max(q for q in np.linspace(0.01, 1, 100)
               if sum(max(1, int(q * min(s))) * sum(s) for s in SHAPES) <= plan.parameters_after)  # fmt: skip
    lost_uniform = [
        1 - (s[: max(1, int(part * len(s)))] ** 2).sum() / (s**2).sum() for s in spectra(model)
    ]  # fmt: skip
    lost = [1 - layer.retained_energy for layer in plan.layers]
    assert sum(lost) < 0.3 * sum(lost_uniform)


def test_the_dense_weight_of_a_layer_is_gone_before_the_next_is_decomposed(monkeypatch: pytest.MonkeyPatch):
    model = Net()
    plan = plan_welore(model, 0.8)
    replaced: list[weakref.ref[nn.Module]] = []
    original = FactoredLinear.from_linear

    def watched(linear: nn.Module, rank: int) -> FactoredLinear:
        assert [ref for ref in replaced if ref() is not None] == []
        replaced.append(weakref.ref(linear))
        return original(linear, rank)

    monkeypatch.setattr(FactoredLinear, "from_linear", watched)
    plan.apply(model)
    assert len(replaced) >= 2


def test_only_factors_are_trained_and_everything_frozen_stays_bit_for_bit():
    model = Net()
    plan = welore(model, 0.5)
    trainable = freeze_all_but_factors(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{p.name}.{f}.weight" for p in plan.layers if p.factored for f in ("down", "up")}
    assert {id(p) for p in trainable} == {id(p) for n, p in model.named_parameters() if n in names}
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 30)).square().sum().backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) is (name not in names), name
    assert len(optimizer.state) == len(trainable)
    numbers = sum(p.rank * sum(p.shape) for p in plan.layers if p.factored)
    assert sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.ndim) == 2 * numbers


def test_low_rank_optimizers_and_plain_ones_work_on_the_factors():
    model = Llama(256, preset="tiny")
    plan = welore(model, 0.6)
    freeze_all_but_factors(model)
    groups = parameter_groups(model, [{"params": "hidden", "rank": 4}])
    assert len(groups) == 1 and len(groups[0]["params"]) == 2 * sum(p.factored for p in plan.layers)
    tokens, held = torch.randint(256, (2, 9)), []
    for optimizer in (GaLoreAdamW(groups, lr=1e-3), AdamW([p for p in model.parameters() if p.requires_grad])):
        model(tokens[:, :-1]).square().mean().backward()
        optimizer.step()
        held.append(state_bytes(optimizer))
    assert held[0] < held[1] == 8 * sum(p.parameters_after for p in plan.layers if p.factored)


def test_a_compressed_model_is_rebuilt_from_plan_and_state(tmp_path: Path):
    model = Net()
    welore(model, 0.6).save(tmp_path / "plan.json")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    json.loads((tmp_path / "plan.json").read_text())  # nothing but JSON
    plan = WeLorePlan.load(tmp_path / "plan.json")
    with torch.device("meta"):
        skeleton = plan.restructure(nn_on_meta())
    skeleton.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    x = torch.randn(3, 30)
    assert torch.equal(skeleton(x), model(x))
    assert plan == plan_welore(Net(), 0.6)


def nn_on_meta() -> nn.Module:
    model = Net.__new__(Net)
    nn.Module.__init__(model)
    model.blocks = nn.ModuleList(nn.Linear(columns, rows) for rows, columns in SHAPES)
    model.head = nn.Linear(30, 3)
    return model


def test_a_second_plan_leaves_factors_alone():
    model = Net()
    first = welore(model, 0.5)
    dense_now = [p.name for p in first.layers if not p.factored]
    assert [p.name for p in plan_welore(model, 0.5).layers] == dense_now
    for name in dense_now:
        setattr(model.blocks, name.removeprefix("blocks."), FactoredLinear(4, 4, 1))
    model.head = nn.Identity()
    with pytest.raises(UsageError, match="factored already"):
        plan_welore(model, 0.5, layers=".")


def test_the_room_offers_the_function_under_the_methods_name():
    assert leantrain.compress.welore is welore
    assert isinstance(welore(Net(), reduction=0.4), WeLorePlan)


def test_a_shared_layer_stays_shared():
    model = Net()
    model.again = model.blocks[3]
    welore(model, 0.5)
    assert isinstance(model.again, FactoredLinear) and model.again is model.blocks[3]


def test_a_plan_prints_as_a_table_of_ranks_numbers_and_bytes():
    plan = plan_welore(Net(), 0.5)
    lines = str(plan).splitlines()
    assert lines[0].split() == ["layer", "shape", "rank", "kept", "energy", "numbers"]
    assert lines[-1] == (
        f"numbers {plan.parameters_before} -> {plan.parameters_after}, bytes {plan.bytes_before} -> {plan.bytes_after}"
    )
    assert sum(" dense " in line for line in lines) == sum(not p.factored for p in plan.layers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": 0.0}, r"reduction must be in \(0, 1\), got reduction=0.0"),
        ({"reduction": 1.0}, r"reduction must be in \(0, 1\)"),
        ({"reduction": None}, "give either reduction or threshold"),
        ({"reduction": 0.3, "threshold": 0.1}, "give either reduction or threshold"),
        ({"reduction": None, "threshold": -0.1}, "threshold must be >= 0, got threshold=-0.1"),
        ({"min_ratio": 1.0}, r"min_ratio must be in \[0, 1\), got min_ratio=1.0"),
        ({"criterion": "size"}, "criterion must be one of .*'energy'.*, got criterion='size'"),
        ({"measure": "bytes"}, "measure must be one of .*'parameters'.*, got measure='bytes'"),
        ({"layers": "attn"}, "layers='attn' chooses no linear layer"),
        ({"reduction": 0.97, "measure": "parameters"}, "reduction=0.97 of the parameters is out of reach: at most 0.8"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(arguments: dict[str, object], message: str):
    with pytest.raises(UsageError, match=message):
        plan_welore(Net(), **arguments)  # type: ignore[arg-type]


def test_a_weight_that_is_not_finite_is_refused():
    model = Net()
    nn.init.constant_(model.blocks[2].weight, float("inf"))
    with pytest.raises(UsageError, match=r"weight of shape \[20, 20\] holds numbers that are not finite"):
        plan_welore(model)


def test_a_plan_of_another_model_changes_nothing():
    model = Net()
    plan = plan_welore(model, 0.8)
    model.blocks[3] = nn.Linear(31, 12)
    with pytest.raises(UsageError, match=r"'blocks.3' is \(12, 30\) there, \(12, 31\) here"):
        plan.apply(model)
    del model.blocks[3]
    with pytest.raises(UsageError, match=r"this one has no 'blocks\.3'"):
        plan.apply(model)
    assert all(type(layer) is nn.Linear for layer in model.blocks)


@pytest.mark.parametrize("text", ["", "[]", '{"layers": []}', '{"layers": [{"name": "a"}]}'])
def test_a_file_that_is_no_plan_is_refused(text: str, tmp_path: Path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UsageError, match=r"plan\.json is no plan of WeLore"):
        WeLorePlan.load(tmp_path / "plan.json")


def test_freezing_a_model_without_factors_is_refused():
    with pytest.raises(UsageError, match="no factored layer"):
        freeze_all_but_factors(Net())


def test_a_layers_numbers_count_the_matrix_alone():
    layer = LayerPlan("a", (6, 4), rank=2, factored=True, removable=2, retained_energy=0.9, bytes_per_number=2)
    assert (layer.parameters_before, layer.parameters_after) == (24, 20)
