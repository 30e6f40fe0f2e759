"""Predictions against what two real steps hold, the ranking, and the advice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

from benchmarks.plan import byte_table
from leantrain.data import Batch
from leantrain.errors import UsageError
from leantrain.learn import Backprop
from leantrain.nn import MLP, Llama, num_parameters
from leantrain.optim import AdamW, Chain, GaLoreAdamW, parameter_groups, predicted_state_bytes
from leantrain.plan import (
    Combination,
    Plan,
    Subject,
    from_recipe,
    language_model,
    make_plan,
    measure,
    named,
    predict,
)
from leantrain.plan.methods import METHODS, shorter_side
from leantrain.plan.plan import KINDS
from leantrain.plan.rehearsal import Rehearsal
from leantrain.recipe.yaml import dump

RECIPES = Path(__file__).parent.parent.parent / "recipes"
LLAMA = language_model(
    "llama", lambda context: Llama(256, context, hidden=96, mlp_hidden=256, layers=2, heads=4), 256, batch=2, context=32
)
FEW = tuple(method for method in METHODS if method.name in ("AdamW", "AdamW 8-bit", "APOLLO-Mini"))
"""Enough for what a plan does with them; that each is predicted well is a test of its own."""


@pytest.fixture(autouse=True, scope="module")
def few_methods():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leantrain.plan.plan.METHODS", FEW)
        yield


def mlp(batch: int = 16) -> Subject:
    return Subject(
        name="mlp",
        build_model=lambda: MLP(32, classes=4, hidden=(96, 96)),
        batch=lambda: Batch(torch.randn(batch, 32), torch.randint(4, (batch,)), torch.arange(batch)),
        build_learner=lambda model, sample: Backprop(model, "classification"),
        shape={"batch": batch},
        resized=mlp,
    )


def galore(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [GaLoreAdamW(parameter_groups(model, [{"params": "hidden", "rank": 8}]), basis="subspace")]


MAKES: dict[str, Callable[[nn.Module], list[torch.optim.Optimizer]]] = {
    "ours": lambda model: [AdamW(model.parameters())],
    "torch.AdamW": lambda model: [torch.optim.AdamW(model.parameters())],
    "momentum": lambda model: [SGD(model.parameters(), lr=0.1, momentum=0.9)],
    "galore": galore,
}


def check(subject: Subject, combination: Combination, most_off: float) -> None:
    predicted = predict(subject, combination)
    measured = measure(
        subject,
        combination.make,
        dtype=getattr(torch, combination.dtype),
        checkpoint=combination.checkpointing,
        in_backward=combination.in_backward,
    )
    assert predicted.peaks == measured.by_kind, combination
    assert measured.peak == pytest.approx(predicted.peak, rel=most_off), combination


@pytest.mark.parametrize("name", list(MAKES))
@pytest.mark.parametrize("subject", [LLAMA, mlp()], ids=["llama", "mlp"])
def test_each_kind_is_predicted_to_the_byte_and_the_peak_within_a_percent(subject: Subject, name: str):
    check(subject, Combination(name, "float32", False, False, MAKES[name]), 0.01)


@pytest.mark.parametrize(
    ("dtype", "in_backward", "checkpointing"),
    [("bfloat16", False, False), ("float32", True, False), ("float32", False, True), ("bfloat16", True, True)],
)
def test_so_is_what_else_a_combination_may_do(dtype: str, in_backward: bool, checkpointing: bool):
    check(LLAMA, Combination("galore", dtype, in_backward, checkpointing, galore), 0.02)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_of_the_planner_is_predicted(method):
    check(LLAMA, Combination(method.name, "float32", True, False, method.make), 0.05)


def test_state_is_also_what_the_optimizers_say_of_themselves():
    with torch.device("meta"):
        model = LLAMA.build_model()
    rehearsal = Rehearsal(LLAMA, None)
    for method in METHODS:
        (optimizer,) = method.make(model)
        predicted = rehearsal.step(method.make).state
        counters = predicted - predicted_state_bytes(optimizer)
        assert 0 <= counters <= 64 * len(list(model.parameters())), method.name


def test_accumulation_keeps_the_gradients_of_the_micro_batch_before():
    doubled = Subject(**{**vars(LLAMA), "accumulate": 3})
    once = predict(LLAMA, Combination("ours", "float32", False, False, MAKES["ours"]))
    several = predict(doubled, Combination("ours", "float32", False, False, MAKES["ours"]))
    assert several.peak > once.peak
    check(doubled, Combination("ours", "float32", False, False, MAKES["ours"]), 0.01)


def test_the_optimizers_share_of_flops_is_four_m_n_r_per_matrix():
    rehearsal = Rehearsal(LLAMA, None)
    hidden = {name for name, p in rehearsal.model.named_parameters() if "layers" in name and p.ndim == 2}
    sizes = sum(p.numel() for name, p in rehearsal.model.named_parameters() if name in hidden)
    assert rehearsal.step(galore).flops == pytest.approx(4 * sizes * 8, rel=0.01)
    assert rehearsal.step(MAKES["ours"]).flops == 0
    counted = rehearsal.forward_and_backward().flops
    assert counted == pytest.approx(6 * num_parameters(rehearsal.model) * 64, rel=0.1), "6 N per token, and attention"


def test_a_refresh_counts_by_its_share():
    def svd(model: nn.Module) -> list[torch.optim.Optimizer]:
        return [GaLoreAdamW(parameter_groups(model, [{"params": "hidden", "rank": 8}]), basis="svd", refresh=50)]

    rehearsal = Rehearsal(LLAMA, None)
    rarely, often = rehearsal.step(svd, 1000).flops, rehearsal.step(svd, 10).flops
    ordinary = rarely - (often - rarely) / 99
    assert often > rarely > ordinary > 0


# The plan.


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(LLAMA, 10**8)


def test_a_plan_ranks_what_fits_by_how_little_it_changes(plan: Plan):
    assert plan.fitting == plan.predictions and not plan.advice
    keys = [(p.combination.deviation, p.peak) for p in plan.predictions]
    assert keys == sorted(keys)
    assert str(plan.predictions[0].combination) == "AdamW, float32"
    assert len(plan.predictions) == len(FEW) * 2 * 2 * 2
    assert len(plan.best_of_each()) == len(FEW)
    assert plan.parameters == num_parameters(LLAMA.build_model())


def test_what_is_held_at_the_peak_adds_up_and_every_way_has_its_reasons(plan: Plan):
    for prediction in plan.predictions:
        assert tuple(prediction.at_peak) == KINDS
        assert sum(prediction.at_peak.values()) == prediction.peak
        assert all(prediction.at_peak[kind] <= peak for kind, peak in prediction.peaks.items())
        assert 0 <= prediction.flops_share < 1 and 0 < prediction.moved_share < 1
        one = prediction.combination
        assert len(prediction.costs) == 1 + one.in_backward + one.checkpointing + (one.dtype == "bfloat16")


def test_letting_go_earlier_needs_less(plan: Plan):
    found = {
        (p.combination.method, p.combination.dtype, p.combination.in_backward, p.combination.checkpointing): p
        for p in plan.predictions
    }
    for (method, dtype, in_backward, checkpointing), prediction in found.items():
        if in_backward:
            assert prediction.peaks["gradients"] < found[method, dtype, False, checkpointing].peaks["gradients"]
        if checkpointing:
            assert prediction.peaks["activations"] < found[method, dtype, in_backward, False].peaks["activations"]
        if dtype == "bfloat16":
            assert 2 * prediction.peaks["parameters"] == found[method, "float32", False, False].peaks["parameters"]


def test_what_does_not_fit_comes_last_and_is_not_recommended(plan: Plan):
    memory = sorted(p.peak for p in plan.predictions)[len(plan.predictions) // 2]
    tight = make_plan(LLAMA, memory)
    assert [p.peak <= memory for p in tight.predictions] == sorted(p.peak <= memory for p in tight.predictions)[::-1]
    for best in tight.best_of_each():
        same = [p for p in tight.fitting if p.combination.method == best.combination.method]
        assert not same or best is same[0]


def test_where_nothing_fits_it_says_by_how_much_and_what_would_have_to_give(plan: Plan):
    least = min(p.peak for p in plan.predictions)
    much, little = make_plan(LLAMA, least - 1000, "bfloat16"), make_plan(LLAMA, 1000, "bfloat16")
    assert not much.fitting
    assert "nothing fits" in much.advice[0] and "0.0 MB more" in much.advice[0]
    assert any("batch 1 instead of 2" in line and "fits" in line for line in much.advice)
    assert any("state alone take" in line for line in little.advice)
    smaller = predict(LLAMA.resized(batch=1, context=32), min(much.predictions, key=lambda p: p.peak).combination)
    assert smaller.peak <= least - 1000


def test_dtype_is_the_only_format_where_it_is_given():
    assert {p.combination.dtype for p in make_plan(LLAMA, 10**8, "bfloat16").predictions} == {"bfloat16"}


def test_a_model_without_hidden_matrices_gets_no_rank():
    subject = Subject(**{**vars(mlp()), "build_model": lambda: MLP(32, classes=4, hidden=())})
    names = {p.combination.method for p in make_plan(subject, 10**8, "float32").predictions}
    assert names == {method.name for method in FEW if method.rank is None}


def test_seven_billion_parameters_are_counted_without_being_there():
    rehearsal = Rehearsal(named("llama-7b"), torch.bfloat16)
    found = rehearsal.forward_and_backward()
    assert found.parameters == found.gradients == 2 * 6_738_415_616
    assert found.largest_gradient == 2 * 32_000 * 4096
    assert shorter_side(rehearsal.model) == 4096
    assert {param.untyped_storage().device.type for param in rehearsal.model.parameters()} == {"meta"}


# What may be planned.


def test_a_recipe_brings_its_own_optimizers_and_they_come_first():
    subject = from_recipe(RECIPES / "demo.yaml")
    assert list(subject.own or {}) == ["adamw", "galore", "muon"]
    assert subject.shape == {"batch": 16, "context": 64}
    assert subject.resized(batch=4, context=32).batch().inputs.shape == (4, 32)
    plan = make_plan(subject, 10**9, "float32")
    assert [p.combination.method for p in plan.predictions[:3]] != [] and plan.predictions[0].combination.own
    assert {p.combination.method for p in plan.predictions if p.combination.own} == {"adamw", "galore", "muon"}


def test_runs_that_train_other_models_are_not_one_plan(tmp_path: Path):
    base = {
        "model": {"class": "MLP", "hidden": [16]},
        "data": {"class": "Sklearn", "name": "digits"},
        "optim": {"class": "torch.optim.AdamW"},
        "steps": 1,
        "batch_size": 16,
    }
    recipe = tmp_path / "several.yaml"
    recipe.write_text(dump({"base": base, "baseline": "a", "runs": {"a": {}, "b": {"model.hidden": [8]}}}))
    with pytest.raises(UsageError, match="run b"):
        from_recipe(recipe)


def test_a_hugging_face_configuration_in_a_folder(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        subject = named(str(path), batch=2, context=16)
        prediction = predict(subject, Combination("ours", "float32", False, False, MAKES["ours"]))
        measured = measure(subject, MAKES["ours"])
        assert prediction.peaks["parameters"] == measured.by_kind["parameters"]
        assert prediction.peaks["optimizer_state"] == measured.by_kind["optimizer_state"]
        assert measured.peak == pytest.approx(prediction.peak, rel=0.1)
    with pytest.raises(UsageError, match="at most 32"):
        named(str(tmp_path), context=33)


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("llama-7B", {}, "did you mean 'llama-7b'"),
        ("gpt-5", {}, "nothing is downloaded"),
        ("torch.nn.Linear", {}, "--recipe"),
        ("os.path", {}, "--allow"),
        ("llama-7b", {"batch": 0}, "batch=0"),
        ("llama-7b", {"context": -1}, "context=-1"),
    ],
)
def test_what_cannot_be_planned_is_refused(name: str, sizes: dict[str, int], words: str):
    with pytest.raises(UsageError) as error:
        named(name, **sizes)
    assert words in str(error.value)


@pytest.mark.parametrize("content", ["{}", "[]", "not json", '{"model_type": "no-such-model"}'])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: str):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=r"config\.json"):
        named(str(tmp_path))


# The specification's byte table.


@pytest.mark.parametrize(
    ("size", "projected", "everything", "weights", "adam", "std", "reverse", "saving"),
    [
        ("60M", 25.30e6, 58.07e6, 0.116, 0.232, 0.164, 0.160, 0.295),
        ("130M", 84.93e6, 134.11e6, 0.268, 0.536, 0.343, 0.32, 0.361),
        ("350M", 302.38e6, 367.97e6, 0.736, 1.472, 0.653, 0.59, 0.556),
        ("1B", 1207.9e6, 1339.1e6, 2.678, 5.356, 2.083, 1.83, 0.611),
        ("7B", 6476.0e6, 6738.4e6, 13.48, 26.95, 9.40, 8.05, 0.651),
    ],
)
def test_the_byte_table(size, projected, everything, weights, adam, std, reverse, saving):
    row = byte_table.count(size)
    assert (row.projected, row.parameters) == pytest.approx((projected, everything), rel=3e-4)
    found = [row.weights / 1e9, row.adam / 1e9, row.std / 1e9, row.reverse_std / 1e9]
    assert found == pytest.approx([weights, adam, std, reverse], rel=0.011)
    assert row.saving == pytest.approx(saving, abs=6e-4)


def test_eight_bit_galore_saves_what_is_said():
    saved = byte_table.eight_bit_savings()
    assert saved["bf16"] == pytest.approx(0.79, abs=0.005)
    assert saved["8-bit"] >= 0.82
    assert saved["4-bit"] > saved["8-bit"]


def test_only_chains_are_proposed():
    with torch.device("meta"):
        model = LLAMA.build_model()
    assert all(isinstance(optimizer, Chain) for method in METHODS for optimizer in method.make(model))
