"""Weights of one byte per number, trained with stochastic rounding."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from leantrain import snapshot
from leantrain.errors import UsageError
from leantrain.ledger.storages import storage_bytes
from leantrain.nn import MLP, Llama
from leantrain.nn.int8 import GROUP, Int8Linear, Int8Weight, int8_weights
from leantrain.optim import AdamW, GaLoreAdamW


def grid_steps(weight: Int8Weight) -> Tensor:
    """The step of each number's grid, of the weight's shape: by hand, one group after the other."""
    flat = torch.empty(weight.numel())
    for number, scale in enumerate(weight.scale.tolist()):
        flat[number * GROUP : (number + 1) * GROUP] = scale
    return flat.view(weight.shape)


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 30), nn.ReLU(), nn.Linear(30, 3))


def decoded_twin(model: nn.Module) -> nn.Sequential:
    """The same model with ordinary weights of the decoded values."""
    twin = small_model()
    with torch.no_grad():
        for mine, param in zip(twin.parameters(), model.parameters(), strict=True):
            mine.copy_(param.dequantize() if isinstance(param, Int8Weight) else param)
    return twin


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    centre=st.sampled_from([0.0, 5.5, -1e3]),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
)
@settings(max_examples=40, deadline=None)
def test_no_number_moves_by_more_than_half_a_step_of_its_group(rows: int, columns: int, centre: float, size: float):
    torch.manual_seed(rows * 41 + columns)
    values = centre + size * torch.rand(rows, columns)
    weight = Int8Weight.of(values)
    for number, group in enumerate(values.flatten().split(GROUP)):
        assert weight.scale[number].item() == pytest.approx((group.max() - group.min()).item() / 255, rel=1e-4)
    allowed = 0.5 * grid_steps(weight) + 1e-6 * values.abs().max()  # float32 itself is that coarse
    assert bool(((weight.dequantize() - values).abs() <= allowed).all())


def test_groups_far_from_zero_and_constant_groups_survive():
    """A zero point clamped to the codes gives an error of 5 on the first."""
    assert (Int8Weight.of(5 + torch.rand(16, 16)).dequantize() - 5.5).abs().max() < 0.51
    assert torch.equal(Int8Weight.of(torch.full((4, 4), -7.25)).dequantize(), torch.full((4, 4), -7.25))
    assert torch.equal(Int8Weight.of(torch.zeros(4, 4)).dequantize(), torch.zeros(4, 4))


@pytest.mark.parametrize("shape", [(64, 64), (33, 20), (1, 3)])
def test_it_holds_one_byte_per_number_and_eight_per_group(shape: tuple[int, int]):
    numbers = shape[0] * shape[1]
    weight = nn.Parameter(Int8Weight.of(torch.randn(shape)))
    assert storage_bytes([weight]) == numbers + 8 * -(-numbers // GROUP) + 8


def test_outputs_and_gradients_are_those_of_the_decoded_weights():
    model = int8_weights(small_model())
    twin, x = decoded_twin(model), torch.randn(2, 7, 20, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    model(x).square().sum().backward()
    twin(y).square().sum().backward()
    assert torch.equal(model(x), twin(x))
    torch.testing.assert_close(x.grad, y.grad)
    for mine, reference in zip(model.parameters(), twin.parameters(), strict=True):
        assert type(mine.grad) is Tensor and mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, reference.grad)


def test_no_decoded_weight_is_kept_for_the_backward_pass():
    model = int8_weights(small_model())
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(7, 20))
    assert sum(isinstance(t, Int8Weight) for t in kept) == 2
    assert not [t for t in kept if type(t) is Tensor and t.shape in ((33, 20), (20, 33), (30, 33), (33, 30))]


IN_PLACE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "add_": lambda w, u, v: w.add_(u, alpha=0.3),
    "sub_": lambda w, u, v: w.sub_(u),
    "mul_": lambda w, u, v: w.mul_(0.9),
    "mul_tensor": lambda w, u, v: w.mul_(u),
    "addmm_": lambda w, u, v: w.addmm_(u @ u.T, u, alpha=0.01),
    "addcdiv_": lambda w, u, v: w.addcdiv_(u, v, value=-0.1),
    "addcmul_": lambda w, u, v: w.addcmul_(u, v, value=0.1),
    "copy_": lambda w, u, v: w.copy_(u),
    "lerp_": lambda w, u, v: w.lerp_(u, 0.25),
    "zero_": lambda w, u, v: w.zero_(),
    "normal_": lambda w, u, v: nn.init.normal_(w, generator=torch.Generator().manual_seed(7)),
    "data": lambda w, u, v: w.data.add_(u),
    "foreach": lambda w, u, v: torch._foreach_add_([w, torch.ones(2)], [u, torch.ones(2)]),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("operation", IN_PLACE.values(), ids=IN_PLACE.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_in_place_operation_lands_within_one_step_of_the_exact_result(operation, dtype: torch.dtype):
    torch.manual_seed(0)
    update, positive = torch.randn(24, 24), 1 + torch.rand(24, 24)
    weight = nn.Parameter(Int8Weight.of(torch.randn(24, 24).to(dtype)))
    exact = weight.dequantize(torch.float32)
    with torch.no_grad():
        operation(exact, update.to(dtype).float(), positive.to(dtype).float())
        result = operation(weight, update.to(dtype), positive.to(dtype))
    assert result is None or isinstance(result, (Int8Weight, list, tuple))
    # One step, and what float16 itself loses of a random initialisation.
    slack = 1.001 * grid_steps(weight) + (2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert bool(((weight.dequantize(torch.float32) - exact).abs() <= slack).all())
    assert int(weight.draws) != int(Int8Weight.of(torch.zeros(1)).draws)


def test_rounding_is_right_on_average_where_rounding_to_nearest_loses_the_update():
    torch.manual_seed(0)
    weight = Int8Weight.of(torch.randn(64, 64))
    before = weight.dequantize()
    steps = grid_steps(weight)
    for _ in range(50):
        weight.add_(0.02 * steps)  # a fiftieth of a grid step, fifty times
    moved = ((weight.dequantize() - before) / steps).mean().item()
    assert moved == pytest.approx(1.0, abs=4 * (50 * 0.02 * 0.98 / 4096) ** 0.5)
    nearest = Int8Weight.of(before)
    for _ in range(50):
        nearest = Int8Weight.of(nearest.dequantize() + 0.02 * steps)
    # Only where the whole group's grid moved along is anything of it left.
    within = (nearest.codes != weight.codes).float().mean().item()
    assert within > 0.5


def test_a_number_without_an_update_stays_while_another_of_its_group_moves():
    torch.manual_seed(0)
    weight = Int8Weight.of(torch.randn(16, 16))
    weight.mul_(1.0)  # makes room at the ends of the grid, if it is needed
    before, update = weight.dequantize(), torch.zeros(16, 16)
    update[3, 5] = 0.05
    for _ in range(20):
        weight.add_(update)
    same = torch.ones(16, 16, dtype=torch.bool)
    same[3, 5] = False
    changed = (weight.dequantize() != before)[same].sum().item()
    assert changed <= 1  # a number in between two codes by float32's own error may cross once in 10^5


def test_a_grid_follows_numbers_that_grow_or_shrink():
    weight = Int8Weight.of(torch.linspace(-1, 1, 256).view(16, 16))
    for factor in (4.0, 1 / 64):
        weight.mul_(factor)
        values = weight.dequantize()
        assert 1 <= 255 * weight.scale.item() / (values.max() - values.min()).item() < 1.3
    weight.add_(100.0)
    assert (weight.dequantize() - 100).abs().max() < 0.1


def test_a_number_that_is_not_finite_is_not_hidden():
    weight = Int8Weight.of(torch.ones(20, 20))
    update = torch.zeros(20, 20)
    update[0, 0] = float("nan")
    weight.add_(update)
    assert not torch.isfinite(weight.dequantize()[0, 0])
    assert torch.isfinite(weight.dequantize().flatten()[GROUP:]).all()


def test_the_same_seed_draws_the_same_and_global_generators_are_left_alone():
    def trained(seed: int, noise: int) -> Tensor:
        torch.manual_seed(noise)
        weight = Int8Weight.of(torch.arange(256.0).view(16, 16), seed)
        before = torch.get_rng_state()
        for _ in range(5):
            weight.add_(0.3)
        assert torch.equal(torch.get_rng_state(), before)
        return weight.codes

    assert torch.equal(trained(0, 1), trained(0, 2))
    assert not torch.equal(trained(0, 1), trained(1, 1))


def test_copies_that_get_the_same_updates_stay_equal_whatever_the_global_seed():
    """As in several processes, each of which seeds dropout differently."""
    models = [int8_weights(small_model()) for _ in range(2)]
    for number, model in enumerate(models):
        torch.manual_seed(number)
        for _ in range(3):
            for param in model.parameters():
                param.grad = torch.full(param.shape, 0.37)
            torch.optim.SGD(model.parameters(), lr=1e-3).step()
    states = [model.state_dict() for model in models]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_every_layer_draws_its_own_numbers():
    model = int8_weights(MLP(4, classes=2, hidden=(8, 8, 8)), seed=3)
    draws = [int(m.weight.draws) for m in model.modules() if isinstance(m, Int8Linear)]
    assert len(set(draws)) == len(draws) == 3


def test_it_converts_the_hidden_layers_of_a_llama_and_nothing_else():
    model = int8_weights(Llama(256, preset="tiny"))
    kinds = {name: type(param) for name, param in model.named_parameters()}
    assert all((kind is Int8Weight) == ("_proj" in name) for name, kind in kinds.items())
    assert sum(kind is Int8Weight for kind in kinds.values()) == 21
    tokens = torch.randint(256, (2, 8))
    assert model(tokens).shape == (2, 8, 256)


def test_layers_are_chosen_by_name_or_function():
    assert [type(m) for m in int8_weights(small_model(), r"^[24]$")[::2]] == [nn.Linear, Int8Linear, Int8Linear]
    wide = int8_weights(small_model(), lambda name, layer: layer.in_features > 30)
    assert [type(m) for m in wide[::2]] == [nn.Linear, Int8Linear, nn.Linear]


def test_a_converted_layer_is_the_same_object_and_keeps_its_bias_hooks_and_flags():
    model, seen = small_model(), []
    layer, bias = model[0], model[0].bias
    layer.weight.requires_grad_(False)
    layer.register_forward_hook(lambda *_: seen.append(1))
    int8_weights(model)
    assert model[0] is layer and layer.bias is bias and not layer.weight.requires_grad
    model(torch.zeros(1, 20)).sum().backward()
    assert seen and layer.weight.grad is None and bias.grad is not None


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_torchs_adamw_takes_the_same_first_step_as_on_ordinary_weights(options: dict[str, bool]):
    model = int8_weights(small_model())
    twin, x = decoded_twin(model), torch.randn(7, 20)
    for net, settings_ in ((model, options), (twin, {})):
        net(x).square().sum().backward()
        torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.1, **settings_).step()
    for mine, reference in zip(model.parameters(), twin.parameters(), strict=True):
        if isinstance(mine, Int8Weight):
            # Two operations, two roundings; the fused kernel has one.
            rounded = (1 if options.get("fused") else 2) * grid_steps(mine)
            assert bool(((mine.dequantize() - reference).abs() <= 1.01 * rounded).all())
        else:
            torch.testing.assert_close(mine, reference)


def test_a_kernel_that_also_writes_half_precision_moments_writes_them():
    model = int8_weights(small_model()).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(3, 20, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    for param in model.parameters():
        moment = optimizer.state[param]["exp_avg"]
        assert moment.dtype == torch.bfloat16
        torch.testing.assert_close(moment, 0.1 * param.grad, rtol=1e-2, atol=1e-6)


OPTIMIZERS = {
    "torch AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "AdamW": lambda params: AdamW(params, lr=1e-2),
    "GaLoreAdamW": lambda params: GaLoreAdamW(params, lr=1e-2, rank=2, refresh=3, weight_decay=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_stopping_and_going_on_through_a_file_is_never_having_stopped(make, tmp_path: Path):
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        torch.manual_seed(number)
        optimizer.zero_grad()
        model(torch.randn(16, 20)).square().mean().backward()
        optimizer.step()

    model = int8_weights(small_model())
    optimizer = make(model.parameters())
    for number in range(4):
        step(model, optimizer, number)
    save_file(snapshot.of_model(model).gathered(keep=True), tmp_path / "model.safetensors")
    described = io.BytesIO()
    torch.save(optimizer.state_dict(), described)
    described.seek(0)
    other = int8_weights(small_model(seed=9), seed=9)
    resumed = make(other.parameters())
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    resumed.load_state_dict(torch.load(described, weights_only=True))
    for number in range(4, 8):
        step(model, optimizer, number)
        step(other, resumed, number)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    moments = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    assert not [v for v in moments if isinstance(v, Int8Weight)]


def test_a_state_dict_holds_plain_tensors_that_are_the_weights_own():
    model = int8_weights(small_model())
    state = model.state_dict()
    assert [name for name in state if name.startswith("0.")] == [
        "0.weight.codes", "0.weight.scale", "0.weight.low", "0.weight.draws", "0.bias",
    ]  # fmt: skip
    assert {type(value) for value in state.values()} == {Tensor}
    state["0.weight.codes"].zero_()  # as a checkpoint is restored: by copying into it
    assert not model[0].weight.codes.any()


def test_a_float_state_is_loaded_rounded_to_nearest():
    source, model = small_model(seed=5), int8_weights(small_model())
    model.load_state_dict(source.state_dict())
    assert torch.equal(model[0].weight.codes, Int8Weight.of(source[0].weight).codes)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**source.state_dict(), "0.weight": torch.zeros(3, 3)})
    with pytest.raises(UsageError, match=r"0\.weight\.codes has shape \[3, 3\], this layer's \[33, 20\]"):
        model.load_state_dict({**model.state_dict(), "0.weight.codes": torch.zeros(3, 3, dtype=torch.uint8)})


def test_a_copy_is_equal_and_apart():
    model = int8_weights(small_model())
    model(torch.randn(3, 20)).sum().backward()
    twin = copy.deepcopy(model)
    assert isinstance(twin[0].weight, Int8Weight) and isinstance(twin[0].weight, nn.Parameter)
    assert torch.equal(twin[0].weight.codes, model[0].weight.codes)
    assert torch.equal(twin[0].weight.grad, model[0].weight.grad)
    before = model[0].weight.codes.clone()
    with torch.no_grad():
        twin[0].weight.add_(1.0)
    assert torch.equal(model[0].weight.codes, before)
    assert int(twin[0].weight.draws) == int(model[0].weight.draws) + 1


def test_moving_and_casting_keep_the_codes():
    model = int8_weights(small_model())
    codes = model[0].weight.codes.clone()
    model.to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16 and torch.equal(model[0].weight.codes, codes)
    model(torch.randn(2, 20, dtype=torch.bfloat16)).sum().backward()
    assert model[0].weight.grad.dtype == torch.bfloat16
    model.float().to("meta")
    assert model[0].weight.device.type == "meta" and model[0].weight.codes.device.type == "meta"
    for undo in (lambda m: m.double(), lambda m: m.to_empty(device="cpu")):
        with pytest.raises(UsageError, match="float32, bfloat16 or float16"):
            undo(int8_weights(small_model()))


def test_autocast_computes_in_its_precision_and_gives_a_float32_gradient():
    model = int8_weights(small_model())
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(2, 20))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert model[0].weight.grad.dtype == torch.float32


def test_reading_gives_ordinary_tensors_and_views_are_refused():
    weight = nn.Parameter(Int8Weight.of(torch.randn(6, 4)))
    assert type((weight + 1).detach()) is Tensor
    assert torch.equal(weight.detach() * 2, 2 * weight.dequantize())
    torch.testing.assert_close(weight.norm(), weight.dequantize().norm())
    assert torch.equal(torch.cat([weight, weight]), torch.cat([weight.dequantize()] * 2))
    assert type(torch.zeros_like(weight)) is Tensor
    for view in (lambda w: w.T, lambda w: w[0], lambda w: w.view(-1), lambda w: w.detach()[:2].zero_()):
        with pytest.raises(UsageError, match=r"a view of an int8 weight is refused .*dequantize\(\)"):
            view(weight)


def test_it_works_inside_compile_and_checkpointing():
    model = int8_weights(small_model())
    x = torch.randn(5, 20)
    model(x).sum().backward()
    expected = model[0].weight.grad.clone()
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    assert torch.equal(model[0].weight.grad, expected)


@pytest.mark.parametrize(
    ("model", "layers", "message"),
    [
        (small_model(), "attn", r"layers='attn' chooses no linear layer; the model has 0, 2, 4"),
        (small_model(), "(", r"layers='\(' is not a regular expression"),
        (int8_weights(small_model()), "hidden", "only a plain nn.Linear .* 0 is a Int8Linear"),
        (small_model().double(), "hidden", "float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_what_cannot_be_converted_is_refused(model: nn.Module, layers: str, message: str):
    with pytest.raises(UsageError, match=message):
        int8_weights(model, layers)


def test_a_weight_used_by_two_layers_is_refused_when_asked_for_and_passed_over_otherwise():
    model = small_model()
    model.append(nn.Linear(20, 33))
    model[5].weight = model[0].weight
    with pytest.raises(UsageError, match="the weight of 0 is used by another layer too"):
        int8_weights(model, "0")
    int8_weights(model)
    assert [type(m) for m in model[::2]] == [nn.Linear, Int8Linear, Int8Linear] and type(model[5]) is nn.Linear


def test_an_input_of_another_dtype_is_refused():
    with pytest.raises(
        UsageError, match=r"the input has dtype torch\.float64, the int8 weight stands for torch\.float32"
    ):
        int8_weights(small_model())(torch.zeros(1, 20, dtype=torch.float64))


def test_digits_are_learned_as_with_float32_and_not_without_stochastic_rounding(monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("sklearn.datasets")
    selection = pytest.importorskip("sklearn.model_selection")
    x, y = datasets.load_digits(return_X_y=True)
    split = selection.train_test_split(x / 16, y, test_size=0.25, random_state=0, stratify=y)
    x, x_test, y, y_test = (torch.tensor(part, dtype=torch.float32 if part.ndim == 2 else None) for part in split)

    def accuracy(int8: bool) -> float:
        torch.manual_seed(0)
        model = MLP(64, classes=10, hidden=(128, 64))
        if int8:
            int8_weights(model, layers=".")
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
        for number in range(300):
            rows = torch.randint(len(x), (64,), generator=torch.Generator().manual_seed(number))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        return (model(x_test).argmax(1) == y_test).float().mean().item()

    exact, stochastic = accuracy(int8=False), accuracy(int8=True)
    assert stochastic > exact - 0.02 and exact > 0.9

    def to_nearest(weight: Int8Weight, values: Tensor) -> None:
        weight.copy_(Int8Weight.of(values, draws=weight.draws))

    monkeypatch.setattr(Int8Weight, "_write", to_nearest)
    assert accuracy(int8=True) < exact - 0.05
