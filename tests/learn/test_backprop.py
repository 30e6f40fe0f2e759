"""Backpropagation as a learner: exactly what a hand-written loop does, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leantrain.errors import UsageError
from leantrain.learn import Backprop, Learner
from leantrain.learn.losses import Task
from leantrain.ledger import record


@dataclass
class Examples:
    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)


def tokens(examples: int = 6, seed: int = 0) -> Examples:
    drawn = torch.randint(11, (examples, 8), generator=torch.Generator().manual_seed(seed))
    return Examples(drawn[:, :-1], drawn[:, 1:])


def points(examples: int = 6, seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    return Examples(torch.randn(examples, 5, generator=generator), torch.randint(4, (examples,), generator=generator))


def values(examples: int = 6, seed: int = 0) -> Examples:
    batch = points(examples, seed)
    return Examples(batch.inputs, batch.inputs.sum(1))


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 7), nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 11))


def network(outputs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.ReLU(), nn.Linear(9, outputs))


def gradients(model: nn.Module) -> list[Tensor]:
    found = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in found)
    return [gradient for gradient in found if gradient is not None]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# --- the gradient ---


def by_hand(task: Task, model: nn.Module, batch: Examples) -> Tensor:
    outputs = model(batch.inputs)
    if task == "next_token":
        return F.cross_entropy(outputs.view(-1, outputs.shape[-1]), batch.targets.reshape(-1))
    if task == "classification":
        return F.cross_entropy(outputs, batch.targets)
    return F.mse_loss(outputs[:, 0], batch.targets)


CASES = [
    ("next_token", language_model, tokens()),
    ("classification", network, points()),
    ("regression", lambda: network(outputs=1), values()),
]


@pytest.mark.parametrize(("task", "build", "batch"), CASES)
def test_a_step_is_bit_for_bit_the_hand_written_one(task: Task, build: object, batch: Examples) -> None:
    ours, theirs = build(), build()  # type: ignore[operator]
    torch.manual_seed(1)  # for dropout
    loss = by_hand(task, theirs, batch)
    loss.backward()
    torch.manual_seed(1)
    result = Backprop(ours, task).step(batch)
    assert torch.equal(result.loss, loss)
    assert equal(gradients(ours), gradients(theirs))
    assert result.examples_used == 6


@given(parts=st.integers(1, 5), size=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_equal_micro_batches_add_up_to_the_whole_batch(parts: int, size: int, seed: int) -> None:
    batch = tokens(parts * size, seed)
    whole, pieces = language_model().double(), language_model().double()
    expected = Backprop(whole, "next_token").step(batch).loss
    learner = Backprop(pieces, "next_token")
    losses = [
        learner.step(Examples(x, y), weight=1 / parts).loss
        for x, y in zip(batch.inputs.split(size), batch.targets.split(size), strict=True)
    ]
    torch.testing.assert_close(gradients(pieces), gradients(whole), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.stack(losses).mean(), expected, rtol=1e-12, atol=0)


def test_a_step_adds_to_the_gradient_that_is_there() -> None:
    model = language_model()
    learner = Backprop(model, "next_token")
    learner.step(tokens())
    once = [gradient.clone() for gradient in gradients(model)]
    learner.step(tokens())
    assert equal(gradients(model), [2 * gradient for gradient in once])


def test_the_weight_scales_the_gradient_and_not_the_reported_loss() -> None:
    plain, weighted = language_model(), language_model()
    loss = Backprop(plain, "next_token").step(tokens()).loss
    assert torch.equal(Backprop(weighted, "next_token").step(tokens(), weight=0.25).loss, loss)
    assert equal(gradients(weighted), [0.25 * gradient for gradient in gradients(plain)])


def test_frozen_parameters_get_no_gradient() -> None:
    model = language_model()
    model[0].requires_grad_(False)
    Backprop(model, "next_token").step(tokens())
    assert model[0].weight.grad is None
    assert model[1].weight.grad is not None


def test_a_result_keeps_no_graph_alive() -> None:
    result = Backprop(language_model(), "next_token").step(tokens())
    assert result.loss.shape == ()
    assert not result.loss.requires_grad


def test_an_output_with_logits_is_as_good_as_a_tensor() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = language_model()

        def forward(self, inputs: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.inner(inputs))

    ours, theirs = Wrapped(), language_model()
    Backprop(ours, "next_token").step(tokens())
    Backprop(theirs, "next_token").step(tokens())
    assert equal(gradients(ours), gradients(theirs))


def test_following_the_gradient_learns_the_batch() -> None:
    model = language_model()
    learner: Learner = Backprop(model, "next_token")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    # Each token is followed by the next number: predictable from the token alone.
    start = torch.arange(11)[:, None]
    batch = Examples(start, (start + 1) % 11)
    first = learner.step(batch).loss
    for _ in range(60):
        optimizer.step()
        optimizer.zero_grad()
        last = learner.step(batch).loss
    assert last < 0.1 * first
    assert learner.evaluate(batch)["correct"] == 11


# --- precision ---


def test_in_bf16_products_are_bfloat16_while_gradients_and_loss_stay_float32() -> None:
    exact, rounded = language_model(), language_model()
    seen: list[torch.dtype] = []
    rounded[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    exact_loss = Backprop(exact, "next_token").step(tokens()).loss
    learner = Backprop(rounded, "next_token", precision="bf16")
    loss = learner.step(tokens()).loss
    learner.evaluate(tokens())
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert loss.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in gradients(rounded))
    assert not torch.equal(loss, exact_loss)
    torch.testing.assert_close(loss, exact_loss, rtol=0.01, atol=0)
    for ours, theirs in zip(gradients(rounded), gradients(exact), strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


# --- evaluation ---


@pytest.mark.parametrize(("task", "build", "batch"), CASES)
def test_evaluation_changes_nothing(task: Task, build: object, batch: Examples) -> None:
    model = build()  # type: ignore[operator]
    learner = Backprop(model, task)
    learner.step(batch)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = [gradient.clone() for gradient in gradients(model)]
    random = torch.get_rng_state()
    result = learner.evaluate(batch)
    assert not any(tensor.requires_grad for tensor in result.values())
    assert equal(gradients(model), before)
    assert equal(list(model.state_dict().values()), list(state.values()))
    assert torch.equal(torch.get_rng_state(), random)


def test_evaluation_runs_in_evaluation_mode_and_puts_every_modules_mode_back() -> None:
    model = network()
    model[1].eval()  # a frozen normalisation
    learner = Backprop(model, "classification")
    assert torch.equal(learner.evaluate(points())["loss_sum"], learner.evaluate(points())["loss_sum"])
    assert [module.training for module in model] == [True, False, True, True, True]
    with pytest.raises(UsageError):
        learner.evaluate(Examples(points().inputs, points(3).targets))
    assert [module.training for module in model] == [True, False, True, True, True]


def test_sums_over_uneven_batches_give_the_mean_over_all_examples() -> None:
    model = network().double()
    learner = Backprop(model, "classification")
    batch = points(10)
    batch.inputs = batch.inputs.double()
    pieces = [
        learner.evaluate(Examples(x, y)) for x, y in zip(batch.inputs.split(4), batch.targets.split(4), strict=True)
    ]
    total = {name: sum(piece[name] for piece in pieces) for name in ("loss_sum", "count", "correct")}
    outputs = model.eval()(batch.inputs)
    torch.testing.assert_close(
        total["loss_sum"] / total["count"], F.cross_entropy(outputs, batch.targets), check_dtype=False
    )
    assert total["correct"] == (outputs.argmax(1) == batch.targets).sum()


# --- the ledger ---


def test_the_passes_are_recorded_as_phases_in_order() -> None:
    seen: list[str] = []

    class Recorder:
        @contextmanager
        def phase(self, name: str) -> Iterator[None]:
            seen.append(f"{name} begins")
            yield
            seen.append(f"{name} ends")

        def add(self, name: str, amount: float) -> None: ...

    model = language_model()
    model[3].register_forward_hook(lambda module, inputs, output: seen.append("the model runs"))
    model[3].register_full_backward_hook(lambda module, inputs, output: seen.append("gradients flow"))
    previous = record.activate(Recorder())
    try:
        Backprop(model, "next_token").step(tokens())
    finally:
        record.activate(previous)
    assert seen == [
        "forward begins", "the model runs", "forward ends", "backward begins", "gradients flow", "backward ends",
    ]  # fmt: skip


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "next_tokens"}, r"task 'next_tokens' is unknown; did you mean 'next_token'\?"),
        ({"loss": "regression", "precision": "fp16"}, r"precision 'fp16' is unknown.*allowed: bf16, fp32"),
        ({"loss": "regression", "model": nn.ReLU()}, r"the model ReLU has no parameters to train"),
        ({"loss": "regression", "model": nn.Linear(2, 2).requires_grad_(False)}, r"no parameters to train"),
    ],
)
def test_what_cannot_work_is_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Backprop(**{"model": nn.Linear(2, 2), **arguments})  # type: ignore[arg-type]
