"""Stepping in backward takes the ordinary optimizer's steps, with less in memory, and says so when it cannot."""

from __future__ import annotations

import argparse
import copy
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint as recompute

from leantrain import checkpoint
from leantrain.errors import RunError, UsageError
from leantrain.ledger.memory import MemoryMeter
from leantrain.nn import Llama
from leantrain.optim import Adafactor, AdamW, Chain, GaLoreAdamW
from leantrain.optim.in_backward import InBackward, step_in_backward
from leantrain.optim.projected_sum import ProjectedSum

pytestmark = pytest.mark.filterwarnings("ignore:rank=")  # the first layer is too narrow for it

WIDE, RANK, FLOAT = 24, 3, 4
SKETCH = 8


def galore(model: nn.Module, **options: Any) -> GaLoreAdamW:
    """Projects all matrices but the first."""
    return GaLoreAdamW(model.parameters(), **({"lr": 1e-2, "eps": 1e-3, "rank": RANK, "refresh": 3} | options))


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "GaLoreAdamW": galore,
    "GaLoreAdamW, subspace, rotate": lambda m: galore(m, basis="subspace", on_refresh="rotate", stagger=False),
    "AdamW": lambda m: AdamW(m.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.1),
    "Adafactor": lambda m: Chain(m.parameters(), Adafactor(), lr=1e-2),
    "torch.AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-3),
    "torch.AdamW, fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-3, fused=True),
    "torch.SGD": lambda m: torch.optim.SGD(
        [{"params": list(m.parameters())[:2], "lr": 0.1}, {"params": list(m.parameters())[2:]}], lr=0.03, momentum=0.9
    ),
    "torch.Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
each_clip = pytest.mark.parametrize("clip", ["previous", "exact"])


def small_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(2, WIDE), nn.Tanh(), nn.Linear(WIDE, 2 * WIDE), nn.Tanh(), nn.Linear(2 * WIDE, 5)]
    return nn.Sequential(*layers).to(dtype)


def loss_of(model: nn.Module, number: int, size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(size, 2, generator=generator, dtype=torch.float64)
    dtype = next(model.parameters()).dtype
    return model(inputs.to(dtype)).square().mean() * (1 + number % 3)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 8,
    accumulate: int = 1,
    before_step: Callable[[int], object] = lambda step: None,
    first: int = 0,
) -> list[float]:
    """The loop that is the same with and without hooks. Returns the norms of whole gradients that are still there."""
    norms = []
    for step in range(first, first + steps):
        for micro_batch in range(accumulate):
            (loss_of(model, accumulate * step + micro_batch) / accumulate).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        before_step(step)
        optimizer.step()
        optimizer.zero_grad()
    return norms


def assert_equal_weights(one: nn.Module, other: nn.Module, tolerance: float = 0.0) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item()), name


# The ordinary way, step for step.


@each_optimizer
def test_one_micro_batch_takes_the_ordinary_way_to_the_last_bit(make: Callable[[nn.Module], torch.optim.Optimizer]):
    model, reference = small_model(torch.float32), small_model(torch.float32)
    train(model, step_in_backward(model, make(model)))
    train(reference, make(reference))
    assert_equal_weights(model, reference)


@each_optimizer
def test_four_micro_batches_take_the_ordinary_way_to_rounding(make: Callable[[nn.Module], torch.optim.Optimizer]):
    model, reference = small_model(), small_model()
    train(model, step_in_backward(model, make(model), accumulate=4, basis_from="whole"), accumulate=4)
    train(reference, make(reference), accumulate=4)
    assert_equal_weights(model, reference, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_bases_that_stand_the_first_micro_batch_is_like_the_others(dtype: torch.dtype):
    model = small_model(dtype)
    ordinary = galore(model, refresh=100, stagger=False)
    train(model, ordinary, steps=2, accumulate=4)
    reference = copy.deepcopy(model)
    same = galore(reference, refresh=100, stagger=False)
    same.load_state_dict(ordinary.state_dict())
    train(model, step_in_backward(model, ordinary, accumulate=4), accumulate=4, first=2)
    train(reference, same, accumulate=4, first=2)
    assert_equal_weights(model, reference, 1e-9 if dtype == torch.float64 else 1e-6)


def test_a_basis_from_the_first_micro_batch_is_that_gradients():
    model, reference = small_model(), small_model()
    optimizer = step_in_backward(model, galore(model, stagger=False), accumulate=2)
    train(model, optimizer, steps=1, accumulate=2)
    (loss_of(reference, 0) / 2).backward()
    grad = reference[2].weight.grad
    leading = torch.linalg.svd(grad, full_matrices=False).Vh[:RANK].T
    basis = optimizer.state[model[2].weight]["basis"]
    torch.testing.assert_close(basis @ basis.T, leading @ leading.T)


@pytest.mark.parametrize("basis_from", ["first", "whole"])
def test_a_short_window_is_a_step_on_what_there_is(basis_from: Any):
    model, reference = small_model(), small_model()
    optimizer, ordinary = galore(model, refresh=2), galore(reference, refresh=2)
    hooked = step_in_backward(model, optimizer, accumulate=3, basis_from=basis_from)
    for net, each in ((model, hooked), (reference, ordinary)):
        loss_of(net, 0).backward()  # one backward pass, of three that were announced
        each.step()
        each.zero_grad()
    assert_equal_weights(model, reference, 1e-12)
    train(model, hooked, accumulate=3, steps=1)
    with pytest.raises(UsageError, match=r"another backward pass after accumulate=3.*without step\(\)"):
        for number in range(4):
            loss_of(model, number).backward()


def test_a_closure_is_called_once_per_step_and_its_loss_returned():
    model, reference = small_model(), small_model()
    optimizer = step_in_backward(model, galore(model))

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == loss_of(reference, 0).item()
    train(reference, galore(reference), steps=1)
    assert_equal_weights(model, reference)


def test_zero_grad_in_the_middle_throws_away_what_was_accumulated():
    model, reference = small_model(), small_model()
    optimizer = step_in_backward(model, galore(model), accumulate=2, basis_from="whole")
    loss_of(model, 99).backward()
    optimizer.zero_grad()
    train(model, optimizer, steps=2, accumulate=2)
    train(reference, galore(reference), steps=2, accumulate=2)
    assert_equal_weights(model, reference, 1e-9)


# Which parameters, and when.


class Tied(nn.Module):
    """A matrix used twice, one used in even passes only, one never, one frozen, and one that nobody trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.sometimes, self.never, self.frozen, self.alien = (nn.Linear(6, 6) for _ in range(4))
        self.frozen.requires_grad_(False)
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.alien(self.frozen(self.embedding(inputs)))
        if self.calls % 2 == 0:
            hidden = self.sometimes(hidden)
        self.calls += 1
        return self.head(hidden)

    def trained(self) -> Iterator[nn.Parameter]:
        aliens = set(self.alien.parameters())
        return (p for p in self.parameters() if p not in aliens)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, lambda params: GaLoreAdamW(params, rank=2, refresh=2)])
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_tied_unused_frozen_and_foreign_parameters_are_treated_as_ever(kind: Any, max_norm: float | None):
    model, reference = Tied().double(), Tied().double()
    optimizer = step_in_backward(model, kind(model.trained()), accumulate=2, basis_from="whole")
    ordinary = kind(reference.trained())
    arrivals: list[Tensor] = []
    model.embedding.weight.register_post_accumulate_grad_hook(arrivals.append)
    for number in range(6):
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randint(10, (4, 3), generator=generator)
        for net in (model, reference):
            net(inputs).square().mean().backward()
        if number % 2:
            torch.testing.assert_close(model.alien.weight.grad, reference.alien.weight.grad)
            foreign = copy.deepcopy(reference.alien.weight.grad)
            for each in (optimizer, ordinary):
                each.step()
                each.zero_grad()
            assert torch.equal(model.alien.weight.grad, foreign)
    assert len(arrivals) == 6
    assert_equal_weights(model, reference, 1e-12)
    assert not optimizer.state.get(model.never.weight)


def test_the_hooks_can_be_taken_off_and_the_optimizer_goes_on():
    model, reference = small_model(), small_model()
    ordinary = galore(model)
    optimizer = step_in_backward(model, ordinary, accumulate=2)
    with pytest.raises(UsageError, match="stepped in backward already"):
        step_in_backward(model, ordinary)
    loss_of(model, 0).backward()
    with pytest.raises(UsageError, match=r"remove\(\) in the middle"):
        optimizer.remove()
    optimizer.zero_grad()
    optimizer.remove()
    train(model, ordinary)
    train(reference, galore(reference))
    assert_equal_weights(model, reference)


def test_a_parameter_group_that_is_added_later_steps_in_backward_too():
    model, reference = small_model(), small_model()
    optimizer = step_in_backward(model, GaLoreAdamW(model[:3].parameters(), rank=RANK, lr=0.02))
    optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 0.1})
    loss_of(model, 0).backward()
    assert model[4].weight.grad is None
    optimizer.step()
    groups = [{"params": list(reference[:3].parameters())}, {"params": list(reference[4].parameters()), "lr": 0.1}]
    train(reference, GaLoreAdamW(groups, rank=RANK, lr=0.02), steps=1)
    assert_equal_weights(model, reference)


def test_activation_checkpointing_works_in_one_backward_pass_or_several():
    for reentrant in (False, True):
        model, reference = small_model(), small_model()
        optimizer = step_in_backward(model, galore(model))
        hidden = model[:2](torch.ones(3, 2, dtype=torch.float64))
        loss = model[4](recompute(model[2:4], hidden, use_reentrant=reentrant)).square().mean()
        loss.backward()
        optimizer.step()
        reference(torch.ones(3, 2, dtype=torch.float64)).square().mean().backward()
        galore(reference).step()
        assert_equal_weights(model, reference)


# What is held.


def gradient_peak(model: nn.Module, optimizer: torch.optim.Optimizer, accumulate: int, number: int = 0) -> int:
    """Peak bytes of gradients in one step, as the ledger sees them."""
    memory = MemoryMeter(model, [optimizer])
    for micro_batch in range(accumulate):
        loss = loss_of(model, number + micro_batch) / accumulate
        with memory.watching("backward", follow_operations=False):
            loss.backward()
        memory.observe()
    optimizer.step()
    optimizer.zero_grad()
    return memory.peaks["gradients"] or 0


def test_one_gradient_exists_at_a_time():
    model = small_model(torch.float32)
    optimizer = step_in_backward(model, galore(model))
    largest = max(p.numel() for p in model.parameters())
    for step in range(4):
        assert gradient_peak(model, optimizer, 1, step) == largest * FLOAT


@each_clip
def test_at_most_one_whole_gradient_of_a_projected_matrix_exists_while_accumulating(clip: Any):
    model = nn.Sequential(
        nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64), nn.Linear(64, 1)
    )
    projected = [model[2].weight, model[4].weight]
    alive: list[int] = []
    for param in projected:  # before the others, whose work it is to free it
        param.register_post_accumulate_grad_hook(lambda _: alive.append(sum(p.grad is not None for p in projected)))
    optimizer = step_in_backward(model, galore(model), accumulate=4, max_norm=1.0, clip=clip)
    kept = sum(RANK * max(p.shape) + SKETCH * min(p.shape) for p in projected)
    plain = sum(p.numel() for p in model.parameters()) - 2 * 64 * 96
    for step in range(4):
        peak = gradient_peak(model, optimizer, 4, step)
        # The largest moment: all sums are there, and the gradient of the last matrix arrives.
        assert (kept + plain) * FLOAT < peak <= (kept + plain + 64 * 96) * FLOAT
    assert alive == [1] * len(alive) and len(alive) == 4 * 4 * 2
    reference = copy.deepcopy(model)
    assert gradient_peak(reference, galore(reference), 4) == sum(p.numel() for p in reference.parameters()) * FLOAT


def test_a_whole_basis_keeps_only_the_matrices_that_are_due():
    model = small_model(torch.float32)
    optimizer = step_in_backward(model, galore(model, refresh=2, stagger=True), accumulate=2, basis_from="whole")
    train(model, optimizer, steps=1, accumulate=2)
    for _ in range(4):
        due = [p for p in (model[2].weight, model[4].weight) if optimizer.inner.basis_due(p)]
        loss_of(model, 0).backward()
        assert [p for p in (model[2].weight, model[4].weight) if p.grad is not None] == due
        loss_of(model, 1).backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()


# The norm.


def test_with_one_micro_batch_the_norm_is_exact():
    for make in OPTIMIZERS.values():
        model, reference = small_model(), small_model()
        optimizer = step_in_backward(model, make(model))
        assert math.isnan(optimizer.grad_norm)
        seen: list[float] = []
        for step in range(6):
            train(model, optimizer, steps=1, first=step)
            seen.append(float(optimizer.grad_norm))
        assert seen == pytest.approx(train(reference, make(reference), steps=6), rel=1e-6)


def test_on_text_the_estimated_norm_is_near_the_true_one():
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    torch.manual_seed(0)
    model = Llama(vocab_size=256, preset="tiny")
    reference = copy.deepcopy(model)
    options: dict[str, Any] = {"lr": 5e-3, "rank": 16, "refresh": 4}
    optimizer = step_in_backward(model, GaLoreAdamW(model.parameters(), **options), accumulate=4)
    errors = []
    for step in range(8):
        reference.load_state_dict(model.state_dict())
        reference.zero_grad()
        for micro_batch in range(4):
            start = 997 * (4 * step + micro_batch) % (len(text) - 300)
            part = text[start : start + 4 * 33].view(4, 33)
            for net in (model, reference):
                logits = net(part[:, :-1])
                (nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()) / 4).backward()
        true = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])
        optimizer.step()
        errors.append(float(optimizer.grad_norm / true - 1))
    # The mean of the steps: how far a single one is off depends on the text.
    assert sum(map(abs, errors)) / len(errors) < 0.015
    assert max(map(abs, errors)) < 0.1
    assert any(errors)  # it is an estimate


@settings(deadline=None, max_examples=12, derandomize=True)  # five standard errors may be exceeded by chance
@given(
    rows=st.integers(3, 12), columns=st.integers(3, 12), by_rows=st.booleans(), orthonormal=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_estimate_has_no_bias_and_is_exact_for_what_the_basis_keeps(
    rows: int, columns: int, by_rows: bool, orthonormal: bool, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(3, rows, columns, generator=generator, dtype=torch.float64)
    basis = torch.randn(columns if by_rows else rows, 2, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(basis).Q if orthonormal else basis
    true = grads.sum(0).square().sum().item()

    def estimate(grads: Tensor, seed: int) -> float:
        projected = [grad @ basis if by_rows else basis.T @ grad for grad in grads]
        total = ProjectedSum.of(grads[0], projected[0], seed)
        for grad, part in zip(grads[1:], projected[1:], strict=True):
            total.add(grad, part)
        return total.square()

    found = torch.tensor([estimate(grads, number) for number in range(200)])
    error = found.std().item() / math.sqrt(200)
    assert abs(found.mean().item() - true) < 5 * error + 1e-9
    if orthonormal:
        inside = grads @ basis @ basis.T if by_rows else basis @ basis.T @ grads
        assert estimate(inside, seed) == pytest.approx(inside.sum(0).square().sum().item(), rel=1e-9)


# Clipping.


@each_optimizer
def test_exact_clipping_is_that_of_pytorch(make: Callable[[nn.Module], torch.optim.Optimizer]):
    model, reference = small_model(), small_model()
    optimizer = step_in_backward(model, make(model), max_norm=0.05, clip="exact")
    train(model, optimizer)
    norms = train(
        reference, make(reference), before_step=lambda _: nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
    )
    assert min(norms) > 0.05
    assert_equal_weights(model, reference, 1e-6)


@each_optimizer
@each_clip
def test_accumulated_gradients_are_clipped_as_one(make: Callable[[nn.Module], torch.optim.Optimizer], clip: Any):
    """Against the ordinary way, scaled by the norms that were reported: those are estimates for projected matrices."""
    model, reference = small_model(), small_model()
    optimizer = step_in_backward(model, make(model), accumulate=3, max_norm=0.1, clip=clip, basis_from="whole")
    with pytest.MonkeyPatch.context() as patch:
        if clip == "previous":  # the first step is another test's
            patch.setattr(optimizer, "_previous", 0.5)
        norms = []
        for step in range(6):
            train(model, optimizer, steps=1, accumulate=3, first=step)
            norms.append(float(optimizer.grad_norm))

    def scale(step: int) -> None:
        norm = norms[step] if clip == "exact" else [0.5, *norms][step]
        for param in reference.parameters():
            param.grad.mul_(min(1.0, 0.1 / (norm + 1e-6)))

    true = train(reference, make(reference), steps=6, accumulate=3, before_step=scale)
    assert norms == pytest.approx(true, rel=0.1)
    assert_equal_weights(model, reference, 1e-6)


def test_the_first_step_is_scaled_by_what_has_arrived():
    model, reference = small_model(), small_model()
    arrived: list[int] = []
    for index, param in enumerate(model.parameters()):
        param.register_post_accumulate_grad_hook(lambda _, index=index: arrived.append(index))
    optimizer = step_in_backward(model, torch.optim.SGD(model.parameters(), lr=1.0), max_norm=0.1)
    train(model, optimizer, steps=1)

    loss_of(reference, 0).backward()
    params, square = list(reference.parameters()), 0.0
    for index in arrived:
        square += params[index].grad.square().sum().item()
        params[index].grad.mul_(min(1.0, 0.1 / (math.sqrt(square) + 1e-6)))
    torch.optim.SGD(params, lr=1.0).step()
    assert sorted(arrived) == list(range(len(params)))
    assert_equal_weights(model, reference, 1e-9)


# Schedules, saving, and other people's tools.


def test_a_scheduler_sets_the_rate_of_the_step_that_follows():
    model, reference = small_model(), small_model()
    optimizer, ordinary = step_in_backward(model, galore(model)), galore(reference)
    for net, each in ((model, optimizer), (reference, ordinary)):
        scheduler = LambdaLR(each, lambda step: 1 / (1 + step))
        train(net, each, before_step=lambda _: None, steps=1)
        for step in range(1, 5):
            scheduler.step()
            train(net, each, steps=1, first=step)
        assert each.param_groups[0]["lr"] == pytest.approx(1e-2 / 5)
    assert optimizer.param_groups is optimizer.inner.param_groups
    assert_equal_weights(model, reference)


@each_clip
@pytest.mark.parametrize("make", [galore, OPTIMIZERS["torch.AdamW"]], ids=["GaLoreAdamW", "torch.AdamW"])
@pytest.mark.parametrize("stop", range(6, 9))  # after the last step, in the middle of one, and just before its end
def test_resuming_is_exact_wherever_it_was_saved(make: Any, clip: Any, stop: int):
    accumulate = 2

    def go(model: nn.Module, optimizer: InBackward, passes: range) -> None:
        for number in passes:
            if number % accumulate == 0 and number:
                optimizer.step()
                optimizer.zero_grad()
            loss_of(model, number).backward()

    def begin() -> tuple[nn.Module, InBackward]:
        model = small_model()
        return model, step_in_backward(model, make(model), accumulate=accumulate, max_norm=0.2, clip=clip)

    model, optimizer = begin()
    go(model, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    go(model, optimizer, range(stop, 14))
    optimizer.step()

    resumed, continued = begin()
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.load_state_dict(saved["model"])
    continued.load_state_dict(saved["optimizer"])
    go(resumed, continued, range(stop, 14))
    continued.step()
    assert_equal_weights(resumed, model)
    assert torch.equal(continued.grad_norm, optimizer.grad_norm)


def test_a_checkpoint_of_a_run_holds_it(tmp_path: Path):
    model, optimizer = small_model(), None
    optimizer = step_in_backward(model, galore(model), accumulate=2, max_norm=0.2)
    train(model, optimizer, steps=3, accumulate=2)
    loss_of(model, 50).backward()
    path = checkpoint.save(tmp_path, 3, model, [optimizer], {}, keep=1)
    other = small_model()
    resumed = step_in_backward(other, galore(other), accumulate=2, max_norm=0.2)
    checkpoint.load(path, other, [resumed])
    for net, each in ((model, optimizer), (other, resumed)):
        loss_of(net, 51).backward()
        each.step()
        train(net, each, steps=2, accumulate=2)
    assert_equal_weights(model, other)


def test_the_state_of_the_bare_optimizer_is_taken_up():
    model, reference = small_model(), small_model()
    ordinary = galore(reference)
    train(reference, ordinary, steps=3)
    model.load_state_dict(reference.state_dict())
    optimizer = step_in_backward(model, galore(model))
    optimizer.load_state_dict(ordinary.state_dict())
    train(model, optimizer, first=3)
    train(reference, ordinary, first=3)
    assert_equal_weights(model, reference)


def test_a_state_from_the_middle_needs_the_same_accumulate():
    model = small_model()
    optimizer = step_in_backward(model, galore(model), accumulate=2)
    loss_of(model, 0).backward()
    state = optimizer.state_dict()
    other = small_model()
    with pytest.raises(UsageError, match="accumulate=2, got accumulate=3"):
        step_in_backward(other, galore(other), accumulate=3).load_state_dict(state)


def test_a_gradient_scaler_is_refused():
    model = small_model(torch.float32)
    optimizer = step_in_backward(model, torch.optim.SGD(model.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(UsageError, match="GradScaler"):
        scaler.step(optimizer)


def test_accelerate_and_its_scheduler_take_it_for_an_optimizer():
    accelerate = pytest.importorskip("accelerate")
    model, reference = small_model(), small_model()
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, step_in_backward(model, galore(model)))
    for step in range(3):
        accelerator.backward(loss_of(prepared, step))
        optimizer.step()
        optimizer.zero_grad()
    train(reference, galore(reference), steps=3)
    assert_equal_weights(model, reference)


def test_galore_torch_is_stepped_as_ever():
    peer = pytest.importorskip("galore_torch")

    def make(model: nn.Module) -> torch.optim.Optimizer:
        group = {"params": [model[2].weight], "rank": 2, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
        return peer.GaLoreAdamW([group], lr=1e-2, no_deprecation_warning=True)

    model, reference = small_model(torch.float32), small_model(torch.float32)
    train(model, step_in_backward(model, make(model), accumulate=2), accumulate=2)
    train(reference, make(reference), accumulate=2)
    assert_equal_weights(model, reference)


class CountsInTheGroup(torch.optim.SGD):
    """Keeps its step count where all parameters of a group share it, and makes smaller and smaller steps."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for param in group["params"]:
                if param.grad is not None:
                    param.data.sub_(param.grad, alpha=group["lr"] / group["count"])


class MeasuresTheGroup(torch.optim.SGD):
    """Keeps a number that depends on every gradient."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                group["seen"] = group.get("seen", 0.0) + param.grad.square().sum().item()


def test_what_an_optimizer_counts_per_group_is_counted_once_per_step():
    model, reference = small_model(), small_model()
    optimizer = step_in_backward(model, CountsInTheGroup(model.parameters(), lr=0.1))
    train(model, optimizer, steps=4)
    train(reference, CountsInTheGroup(reference.parameters(), lr=0.1), steps=4)
    assert optimizer.param_groups[0]["count"] == 4
    assert_equal_weights(model, reference)


def test_what_an_optimizer_knows_of_all_gradients_together_is_refused():
    model = small_model()
    step_in_backward(model, MeasuresTheGroup(model.parameters(), lr=0.1))
    with pytest.raises(UsageError, match="MeasuresTheGroup keeps seen for all of its parameters together"):
        loss_of(model, 0).backward()


# What goes wrong.


def poison(model: nn.Module, value: float) -> None:
    model[2].bias.register_hook(lambda grad: grad * value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
@each_clip
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(value: float, accumulate: int, clip: Any):
    model = small_model()
    optimizer = step_in_backward(model, galore(model), accumulate=accumulate, max_norm=10.0, clip=clip)
    train(model, optimizer, steps=2, accumulate=accumulate)
    before, norm = copy.deepcopy(model), float(optimizer.grad_norm)
    hooks = [p.register_hook(lambda grad: grad * value) for p in (model[2].bias, model[2].weight)]
    train(model, optimizer, steps=1, accumulate=accumulate)
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    exact = clip == "exact"
    assert same == [exact, exact, True, True, exact, exact]
    assert optimizer.skipped == (6 if exact else 2)
    assert math.isnan(optimizer.grad_norm)
    assert optimizer.state_dict()["in_backward"]["previous"] == pytest.approx(norm)
    assert all(p.grad is None for p in model.parameters()) and not list(optimizer.held_gradients())
    for hook in hooks:
        hook.remove()
    train(model, optimizer, steps=1, accumulate=accumulate)
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert math.isfinite(optimizer.grad_norm)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_basis_comes_of_a_first_gradient_that_is_not_finite(accumulate: int):
    model = small_model()
    optimizer = step_in_backward(model, galore(model), accumulate=accumulate)
    hook = model[2].weight.register_hook(lambda grad: grad * math.nan)
    train(model, optimizer, steps=1, accumulate=accumulate)
    hook.remove()
    assert optimizer.skipped == 1 and optimizer.inner.basis_due(model[2].weight)
    train(model, optimizer, steps=2, accumulate=accumulate)
    assert optimizer.skipped == 1 and all(p.isfinite().all() for p in model.parameters())


def test_on_request_it_stops_instead_and_names_the_parameter():
    model = small_model()
    step_in_backward(model, galore(model), nonfinite="raise")
    model[2].weight.register_hook(lambda grad: grad * math.nan)
    before = model[2].weight.clone()
    with pytest.raises(RunError, match=r"the gradient of 2\.weight is not finite"):
        loss_of(model, 0).backward()
    assert torch.equal(model[2].weight, before)


def test_sparse_and_complex_gradients_are_the_optimizers_business():
    table = nn.Embedding(7, 4, sparse=True)
    step_in_backward(table, AdamW(table.parameters()))
    with pytest.raises(UsageError, match="AdamW has no rule for sparse gradients"):
        table(torch.tensor([1, 2])).sum().backward()
    numbers = nn.ParameterList([nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    step_in_backward(numbers, AdamW(numbers.parameters()))
    with pytest.raises(UsageError, match="AdamW has no rule for complex gradients"):
        numbers[0].abs().sum().backward()

    table, reference = nn.Embedding(7, 4, sparse=True), nn.Embedding(7, 4, sparse=True)
    reference.load_state_dict(table.state_dict())
    optimizer = step_in_backward(table, torch.optim.SparseAdam(table.parameters()))
    ordinary = torch.optim.SparseAdam(reference.parameters())
    for net, each in ((table, optimizer), (reference, ordinary)):
        net(torch.tensor([1, 2, 2])).sum().backward()
        each.step()
    assert_equal_weights(table, reference)
    assert float(optimizer.grad_norm) == pytest.approx(math.sqrt(4 + 4 * 4))


def test_a_step_without_a_backward_pass_is_an_error():
    model = small_model()
    optimizer = step_in_backward(model, galore(model))
    with pytest.raises(UsageError, match=r"step\(\) without a backward pass"):
        optimizer.step()
    train(model, optimizer, steps=1)
    with pytest.raises(UsageError, match=r"step\(\) without a backward pass"):
        optimizer.step()


def test_gradients_set_by_hand_are_stepped_by_step():
    model, reference = small_model(), small_model()
    optimizer = step_in_backward(model, galore(model))
    for net, each in ((model, optimizer), (reference, galore(reference))):
        for param in net.parameters():
            param.grad = torch.linspace(0, 1, param.numel(), dtype=param.dtype).view_as(param).sin()
        each.step()
    assert_equal_weights(model, reference)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate": 0}, "accumulate must be an integer >= 1, got accumulate=0"),
        ({"accumulate": 1.5}, "accumulate=1.5"),
        ({"max_norm": 0.0}, "max_norm must be > 0 or None, got max_norm=0.0"),
        ({"clip": "later"}, r"clip must be one of \('previous', 'exact'\), got clip='later'"),
        ({"basis_from": "last"}, r"basis_from must be one of \('first', 'whole'\)"),
        ({"nonfinite": "ignore"}, r"nonfinite must be one of \('skip', 'raise'\)"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], words: str):
    model = small_model()
    with pytest.raises(UsageError, match=words):
        step_in_backward(model, galore(model), **options)
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())


def test_what_cannot_be_stepped_in_backward_is_refused():
    model = small_model()
    with pytest.raises(UsageError, match=r"must be a torch\.optim\.Optimizer, got str"):
        step_in_backward(model, "adamw")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="LBFGS calls backward"):
        step_in_backward(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(UsageError, match="the optimizer holds no parameter of this Sequential"):
        step_in_backward(model, galore(small_model()))
    with pytest.raises(UsageError, match="belongs to its model's hooks"):
        copy.deepcopy(step_in_backward(model, galore(model)))
