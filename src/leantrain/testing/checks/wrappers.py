"""Does it work under what PyTorch wraps around a step: torch.compile and the gradient scaler of mixed precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from leantrain.testing.case import OptimizerCase
from leantrain.testing.problem import SmallTask, Stream, assert_near, assert_same, copies, drive

WARM_UP, MEASURED = 6, 6


def a_compiled_step_equals_the_plain_one(case: OptimizerCase) -> None:
    """torch.compile(optimizer.step) takes the way of optimizer.step, to 1e-5, and never runs out of recompilations."""
    stream = Stream(case)
    params = stream.parameters()
    optimizer = case.build(params)
    with _counting_compiler() as (compiled, _):
        drive(optimizer, params, stream, range(WARM_UP), take_step=compiled(optimizer.step))
    plain = stream.parameters()
    drive(case.build(plain), plain, stream, range(WARM_UP))
    assert_near(params, plain, stream.parameters(), 1e-5, "compiled step")


def a_new_lr_compiles_nothing_anew(case: OptimizerCase) -> None:
    """After a warm-up, a compiled step is not compiled again when a tensor lr is filled with another value each step.

    Counted with a compiler that does nothing else, so the check is about guards and not about generated code. A plain
    float lr is part of the compiled code by PyTorch's own design; its advice is a tensor, and so is ours.
    """
    stream = Stream(case)
    params = stream.parameters()
    optimizer = case.build(params, lr=torch.tensor(float(case.settings["lr"])))
    with _counting_compiler() as (compiled, count):
        step = compiled(optimizer.step)
        drive(optimizer, params, stream, range(WARM_UP), take_step=step)
        before = count()
        for index in range(WARM_UP, WARM_UP + MEASURED):
            for group in optimizer.param_groups:
                group["lr"] *= 0.9  # in place, where the lr is still the tensor it was
            drive(optimizer, params, stream, [index], take_step=step)
            assert count() == before, f"compiled again at step {index}, which differs from the one before in lr only"


def a_gradient_scaler_skips_what_overflowed(case: OptimizerCase) -> None:
    """Under torch.amp.GradScaler the way is that of unscaled gradients; a step with an infinite one changes nothing."""
    task = SmallTask(case)
    scaled, plain = task.model(), task.model()
    start = copies(plain.parameters())
    scaled_optimizer, plain_optimizer = case.build(scaled.parameters()), case.build(plain.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        overflow = step == 3
        scaled_optimizer.zero_grad()
        scaler.scale(task.loss(scaled, task.batch(step))).backward()
        if overflow:
            first = next(scaled.parameters())
            assert first.grad is not None
            first.grad.view(-1)[0] = torch.inf
        before, state = copies(scaled.parameters()), copy.deepcopy(scaled_optimizer.state_dict()["state"])
        scaler.step(scaled_optimizer)
        scaler.update()
        if overflow:
            assert_same(list(scaled.parameters()), before, "a step with an infinite gradient")
            assert _equal(scaled_optimizer.state_dict()["state"], state), "an infinite gradient changed the state"
            assert scaler.get_scale() == 512.0, f"the scale is {scaler.get_scale()} after an overflow, not halved"
            continue
        plain_optimizer.zero_grad()
        task.loss(plain, task.batch(step)).backward()
        plain_optimizer.step()
    assert_near(list(scaled.parameters()), list(plain.parameters()), start, 1e-5, "with a gradient scaler")


Compile = Callable[[Callable[[], object]], Callable[[], object]]


@contextmanager
def _counting_compiler() -> Iterator[tuple[Compile, Callable[[], int]]]:
    """(compile, count): torch.compile with a backend that counts graphs and runs them as they are."""
    graphs: list[int] = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    def compiled(step: Callable[[], object]) -> Callable[[], object]:
        return torch.compile(step, backend=backend)

    torch._dynamo.reset()
    # Without this a step that is compiled too often would silently run uncompiled, and pass.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield compiled, lambda: len(graphs)
    torch._dynamo.reset()


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one == other) or hasattr(one, "__dict__")  # objects of other packages: what cannot be compared may pass


CHECKS = (
    a_compiled_step_equals_the_plain_one,
    a_new_lr_compiles_nothing_anew,
    a_gradient_scaler_skips_what_overflowed,
)
