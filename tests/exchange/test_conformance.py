"""Every exchange in 2, 3 and 4 real processes, and alone: all that `conformance.CASES` lists keep the same promises."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from leantrain.errors import LeantrainError
from tests.exchange.conformance import CASES, Case, Run, counted
from tests.gloo import in_processes

STEPS, HALF, COUNTED = 8, 4, 6
EVERYWHERE = [(name, world) for name, case in CASES.items() for world in case.worlds]


@pytest.mark.parametrize(("name", "world"), EVERYWHERE)
def test_it_keeps_its_promises_among_processes(name: str, world: int) -> None:
    case = CASES[name]
    found = in_processes(world, promises, world, case)
    first = found[0]
    for each in found:
        assert torch.equal(each["weights"], first["weights"]), "replicas differ when training ends"
        same_bits = torch.equal(each["resumed"], each["weights"])
        assert same_bits or world in case.rounds, "stopping and going on is not never stopping"
        torch.testing.assert_close(each["resumed"], each["weights"], atol=1e-3, rtol=1e-2)
        assert each["accumulated"] < case.accumulation, "two halves are not the whole batch"
        left_out = case.abstains and each["not finite"] == "passed over"
        assert each["not finite"] == "refused" or left_out or not case.make(world).replicated, each["not finite"]
        # The exchanges that are PyTorch's alone go by parameters, where PyTorch goes by buckets.
        counted_ = pytest.approx(each["counted"], rel=0.03 if case.rings else 0)
        assert each["said"] == counted_ or name == "Dense" or case.sockets, "it does not count what it sends"
        if case.prediction is not None:
            assert each["predicted"] == pytest.approx(each["said"], rel=case.prediction), "predicted bytes are others"
    assert (min(first["sent"][2:]) > 0) == case.sends
    assert first["trained"] < 0.95, "it does not train"


@pytest.mark.parametrize("name", CASES)
def test_it_trains_alone_and_sends_nothing(name: str) -> None:
    run = Run(CASES[name], 1)
    before = run.loss()
    for step in range(STEPS):
        run.step(step, last=step == STEPS - 1)
    assert run.loss() < 0.95 * before
    assert run.sent == [0] * STEPS


@pytest.mark.parametrize("name", CASES)
def test_its_state_is_made_fit_for_more_and_for_fewer_processes(name: str) -> None:
    case = CASES[name]
    states = in_processes(3, state_after_some_steps, case)
    for world in (1, 2, 4):
        found = (
            in_processes(world, goes_on_from, world, case, states) if world > 1 else [goes_on_from(0, 1, case, states)]
        )
        assert all(torch.isfinite(each).all() for each in found)
        assert all(torch.equal(each, found[0]) for each in found)


def promises(rank: int, world: int, case: Case) -> dict[str, Any]:
    run = Run(case, world)
    before = run.loss()
    saved: dict[str, Any] = {}
    said = sent = 0
    for step in range(STEPS):
        if step == HALF:
            saved = run.saved()
        with counted() as count:
            run.step(step, last=step == STEPS - 1)
        if step == COUNTED:
            said, sent = run.sent[-1], count[0]
    params = [param for param in run.plain.parameters() if param.requires_grad]
    return {
        "weights": run.weights(), "trained": run.loss() / before, "sent": run.sent, "said": said, "counted": sent,
        "predicted": run.exchange.predicted_bytes(params, world), "resumed": resumed(case, world, saved),
        "accumulated": accumulated(case, world), "not finite": not_finite(case, world, rank),
    }  # fmt: skip


def resumed(case: Case, world: int, saved: dict[str, Any]) -> Tensor:
    run = Run(case, world)
    run.restore(saved)
    for step in range(HALF, STEPS):
        run.step(step, last=step == STEPS - 1)
    return run.weights()


def accumulated(case: Case, world: int) -> float:
    """The largest difference of a gradient from two micro-batches from that of the whole."""
    whole, halves = Run(case, world), Run(case, world)
    whole.find_gradients(0)
    halves.find_gradients(0, accumulate=2)
    return (whole.gradients() - halves.gradients()).abs().max().item()


def not_finite(case: Case, world: int, rank: int) -> str:
    """What happens where one process's gradients are NaN: "refused" if all notice and no state has changed."""
    run = Run(case, world)
    for step in range(2):
        run.step(step)
    before = copy.deepcopy(run.exchange.state_dict())
    try:
        run.find_gradients(2, spoil=rank == 1)
        noticed = not torch.isfinite(run.gradients()).all()
    except LeantrainError:
        noticed = True
    after = run.exchange.state_dict()
    if not noticed:
        return "passed over" if all_finite(after) else "a gradient that is not finite has gone unnoticed"
    return "refused" if same(before, after) else "its state has changed in a step that must not be"


def all_finite(state: Any) -> bool:
    if isinstance(state, Tensor):
        return bool(torch.isfinite(state).all())
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return all(all_finite(each) for each in values)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def state_after_some_steps(rank: int, case: Case) -> dict[str, Any]:
    run = Run(case, 3)
    for step in range(5):
        run.step(step)
    return run.saved()


def goes_on_from(rank: int, world: int, case: Case, states: list[dict[str, Any]]) -> Tensor:
    run = Run(case, world)
    shared = copy.deepcopy(states[0])
    exchange_states = copy.deepcopy([each["exchange"] for each in states])
    shared["exchange"] = run.exchange.resized(exchange_states, rank, world)
    run.restore(shared)
    with run.exchange.consensus():
        agreed = {name: value.clone() for name, value in run.plain.state_dict().items()}
    run.plain.load_state_dict(agreed)
    for step in range(5, 9):
        run.step(step, last=step == 8)
    if dist.is_initialized():
        dist.barrier()
    return run.weights()
