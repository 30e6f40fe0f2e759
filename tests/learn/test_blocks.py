"""A model in blocks: what it looks like to optimizers, exchanges and checkpoints, and how it is evaluated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leantrain.errors import UsageError
from leantrain.layers import output_layer
from leantrain.learn import Backprop, LocalUpdates
from leantrain.learn.blocks import Blocks, WithAuxiliaries
from leantrain.optim import hidden_matrices
from tests.gloo import in_processes
from tests.learn.small_networks import Examples, equal, gradients, language_model, network, points, sentences


def blocks(model: nn.Module, batch: Examples, cut: list[str], **how: Any) -> Blocks:
    return Blocks(model, "classification", sample=batch.inputs[:2], cut=cut, **how)


# --- one roof ---


def test_the_models_names_stay_and_heads_stand_beside_them() -> None:
    model = network()
    model.scale = nn.Parameter(torch.ones(1))
    model.register_buffer("count", torch.zeros(1))
    model.register_buffer("scratch", torch.zeros(1), persistent=False)
    names = list(model.state_dict())
    learner = blocks(model, points(), ["2", "4"])
    together = learner.module
    assert isinstance(together, WithAuxiliaries)
    assert [name for name in together.state_dict() if not name.startswith("auxiliary.")] == names
    assert list(model.state_dict()) == names
    own = dict(model.named_parameters())
    assert all(param is own[name] for name, param in together.named_parameters() if name in own)
    assert {name.split(".")[1] for name in dict(together.named_parameters()) if name not in own} == {"0", "1"}
    assert "scratch" in dict(together.named_buffers())


def test_one_block_needs_no_roof() -> None:
    model = network()
    learner = blocks(model, points(), [])
    assert learner.module is model
    assert learner.head_parameters(0) == []
    assert learner.state_dict() == {"auxiliaries": {}}
    attached = nn.Identity()
    learner.attach(attached)
    assert learner.model is attached


def test_every_trained_parameter_is_in_one_part() -> None:
    model = network()
    model[1].requires_grad_(False)
    learner = blocks(model, points(), ["3", "5"])
    trained = [param for param in learner.module.parameters() if param.requires_grad]
    assert sorted(id(p) for part in learner.parts for p in part.params) == sorted(map(id, trained))
    assert len(learner.parts) == 3
    for number, part in enumerate(learner.parts):
        assert part.rate == 1.0
        assert part.params == (*learner.cut.parameters[number], *learner.head_parameters(number))


def test_low_rank_optimizers_see_the_hidden_matrices_that_they_saw_before() -> None:
    model = language_model()
    before, output = hidden_matrices(model), output_layer(model)
    together = LocalUpdates(model, "next_token", sample=sentences().inputs, blocks=3).module
    assert [name for name in hidden_matrices(together) if not name.startswith("auxiliary.")] == before
    assert output is not None


def test_a_model_that_names_its_output_layer_still_does() -> None:
    class Named(nn.Sequential):
        def get_output_embeddings(self) -> nn.Module:
            return self[3]

    model = Named(*network())
    assert output_layer(blocks(model, points(), ["2", "4"]).module) is model[3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_heads_are_of_the_features_type(dtype: torch.dtype) -> None:
    batch = points(dtype=dtype)
    learner = blocks(network(dtype=dtype), batch, ["2", "4"])
    assert {param.dtype for param in learner.module.parameters()} == {dtype}
    learner.evaluate(batch)


def test_making_a_learner_leaves_the_models_weights_and_modes() -> None:
    model = network()
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    blocks(model, points(), ["2", "4"])
    assert equal(dict(model.state_dict()), dict(before))
    assert [module.training for module in model] == [False, True, True, True, True, True]


# --- handing gradients over ---


def test_handing_over_gives_each_parameter_the_gradient_it_has() -> None:
    batch = points()
    learner = LocalUpdates(network(), "classification", sample=batch.inputs, cut=["2", "4"])
    learner.step(batch)
    before = {name: gradient.clone() for name, gradient in gradients(learner.module).items() if gradient is not None}
    learner.hand_over()  # nothing is wrapped
    assert equal(gradients(learner.module), dict(before))
    first = next(learner.module.parameters())
    first.grad = None
    learner.attach(_Calls(learner.module))
    learner.hand_over()
    found = gradients(learner.module)
    name = next(iter(found))
    assert torch.equal(found[name], torch.zeros_like(first))  # type: ignore[arg-type]
    assert equal({k: v for k, v in found.items() if k != name}, {k: v for k, v in before.items() if k != name})


class _Calls(nn.Module):
    """As DDP: calls what it wraps without arguments of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self) -> Tensor:
        result: Tensor = self.module()
        return result


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(accumulate: int) -> None:
    def learner(how: dict[str, Any]) -> LocalUpdates:
        torch.manual_seed(3)
        sample = points(dtype=torch.float64).inputs
        return LocalUpdates(network(dtype=torch.float64), "classification", sample=sample, **how)

    def work(rank: int, how: dict[str, Any]) -> list[dict[str, Tensor]]:
        own, found = learner(how), []
        attached = DistributedDataParallel(own.module, gradient_as_bucket_view=True)
        own.attach(attached)
        for step in range(3):
            batch = points(8, step, torch.float64)
            inputs, targets = batch.inputs.chunk(2)[rank], batch.targets.chunk(2)[rank]
            parts = list(zip(inputs.chunk(accumulate), targets.chunk(accumulate), strict=True))
            for number, part in enumerate(parts, start=1):
                if number < len(parts):
                    with attached.no_sync():
                        own.step(Examples(*part), weight=1 / accumulate)
                else:
                    own.step(Examples(*part), weight=1 / accumulate)
                    own.hand_over()
            found.append({name: param.grad.clone() for name, param in own.module.named_parameters()})
            own.module.zero_grad()
        return found

    for how in ({"cut": ["2", "4"]}, {"cut": ["2", "4"], "scheme": "overlapping"}):
        one, expected = learner(how), []
        for step in range(3):
            one.step(points(8, step, torch.float64))
            expected.append({name: param.grad.clone() for name, param in one.module.named_parameters()})
            one.module.zero_grad()
        for found in in_processes(2, work, how):
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.keys() == theirs.keys()
                for name in theirs:
                    torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-13)


# --- evaluation ---


@given(cut=st.lists(st.integers(1, 5), unique=True, max_size=5).map(sorted), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_evaluation_tells_what_every_head_would_predict(cut: list[int], seed: int) -> None:
    model, batch = network(seed=seed), points(9, seed)
    learner = blocks(model, batch, [str(each) for each in cut])
    found = learner.evaluate(batch)
    logits = {"": model(batch.inputs)}
    for number, end in enumerate(cut, start=1):
        logits[f"block{number}/"] = learner.local_loss(number - 1).head(nn.Sequential(*list(model)[:end])(batch.inputs))
    assert set(found) == {prefix + name for prefix in logits for name in ("loss_sum", "count", "correct")}
    for prefix, each in logits.items():
        torch.testing.assert_close(
            found[f"{prefix}loss_sum"], F.cross_entropy(each, batch.targets, reduction="sum"), check_dtype=False
        )
        assert found[f"{prefix}correct"] == (each.argmax(1) == batch.targets).sum()
        assert found[f"{prefix}count"] == 9


def test_evaluation_changes_nothing() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 4)]
    model, batch = nn.Sequential(*layers), points()
    learner = LocalUpdates(model, "classification", sample=batch.inputs, cut=["3", "5"])
    learner.step(batch)
    state = copy.deepcopy(learner.module.state_dict())
    found = {name: None if value is None else value.clone() for name, value in gradients(learner.module).items()}
    random = torch.get_rng_state()
    first, second = learner.evaluate(batch), learner.evaluate(batch)
    assert equal(dict(first), dict(second))
    assert not any(value.requires_grad for value in first.values())
    assert equal(dict(learner.module.state_dict()), dict(state))
    assert equal(gradients(learner.module), found)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in learner.module.modules())


def test_the_output_alone_is_judged_as_backpropagation_judges_it() -> None:
    batch = points(9)
    ours, theirs = (
        blocks(network(), batch, ["2"]).evaluate(batch),
        Backprop(network(), "classification").evaluate(batch),
    )
    assert equal({name: ours[name] for name in theirs}, dict(theirs))


# --- state ---


def test_the_state_is_the_heads_and_goes_back_exactly() -> None:
    batch = points()
    models = network(), network()
    first, second = (blocks(model, batch, ["2", "4"]) for model in models)
    assert not equal(dict(first.auxiliaries.state_dict()), dict(second.auxiliaries.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert equal(dict(first.auxiliaries.state_dict()), dict(second.auxiliaries.state_dict()))
    assert equal(dict(first.evaluate(batch)), dict(second.evaluate(batch)))


@pytest.mark.parametrize("state", [{}, {"auxiliaries": {}}, "another cut"])
def test_the_state_of_another_cut_is_refused(state: Any) -> None:
    batch = points()
    if state == "another cut":
        state = blocks(network(), batch, ["1", "2", "4"]).state_dict()
    with pytest.raises(UsageError, match="the state is of other blocks than from the input to the input of 2, from"):
        blocks(network(), batch, ["2", "4"]).load_state_dict(state)
