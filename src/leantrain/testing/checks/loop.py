"""Does it live in anybody's training loop: accumulation, clipping, closures, frozen and late parameters, zero_grad."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from leantrain.testing.case import OptimizerCase
from leantrain.testing.problem import STEPS, SmallTask, Stream, assert_near, assert_same, copies, drive, same


def accumulated_gradients_equal_the_big_batch(case: OptimizerCase) -> None:
    """Four micro-batches with a quarter of the loss each take the way of one batch (float64, to 1e-6)."""

    def run(micro_batches: int) -> list[Tensor]:
        task = SmallTask(case, torch.float64)
        model = task.model()
        optimizer = case.build(model.parameters())
        for step in range(6):
            optimizer.zero_grad()
            inputs, targets = task.batch(step, size=32)
            for part in zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True):
                (task.loss(model, part) / micro_batches).backward()
            optimizer.step()
        return copies(model.parameters())

    start = SmallTask(case, torch.float64).model().parameters()
    assert_near(run(4), run(1), list(start), 1e-6, "accumulation over 4 micro-batches")


def clipped_gradients_are_the_ones_used(case: OptimizerCase) -> None:
    """clip_grad_norm_ before the step changes the way, to that of gradients scaled by hand."""

    def run(how: str) -> list[Tensor]:
        stream = Stream(case, torch.float64)
        params = stream.parameters()

        def clip(step: int) -> None:
            limit = 1.0 + step % 3  # not constant: a method that ignores scale would not notice
            grads = [param.grad for param in params if param.grad is not None]
            if how == "clip":
                clip_grad_norm_(params, limit)
            elif how == "by hand":
                norm = torch.stack([grad.norm() for grad in grads]).norm()
                for grad in grads:
                    grad.mul_((limit / (norm + 1e-6)).clamp(max=1.0))

        drive(case.build(params), params, stream, before_step=clip)
        return copies(params)

    clipped = run("clip")
    assert not same(clipped, run("not")), "clipping has no effect"
    assert_near(clipped, run("by hand"), Stream(case, torch.float64).parameters(), 1e-6, "clipping")


def gradients_are_left_as_they_were(case: OptimizerCase) -> None:
    """step() does not write into .grad: whoever logs or accumulates gradients sees what backward left."""
    stream = Stream(case)
    params = stream.parameters()
    optimizer = case.build(params)
    for step in range(3):
        drive(optimizer, params, stream, [step])
        kept = [param.grad for param in params if param.grad is not None]
        assert len(kept) == len(params), "step() removed a gradient"
        assert_same(kept, stream.gradients(step), f"gradients after step {step}")


def a_closure_is_called_with_gradients_and_its_loss_returned(case: OptimizerCase) -> None:
    """step(closure) evaluates the closure with gradients enabled, returns its loss, and moves as without closure."""
    task = SmallTask(case)
    plain, closed = task.model(), task.model()
    plain_optimizer, closed_optimizer = case.build(plain.parameters()), case.build(closed.parameters())
    for step in range(3):
        plain_optimizer.zero_grad()
        expected = task.loss(plain, task.batch(step))
        expected.backward()
        assert plain_optimizer.step() is None, "step() without a closure must return None"

        def closure(step: int = step) -> Tensor:
            assert torch.is_grad_enabled(), "the closure is called with gradients disabled"
            closed_optimizer.zero_grad()
            loss = task.loss(closed, task.batch(step))
            loss.backward()
            return loss

        returned = closed_optimizer.step(closure)  # type: ignore[arg-type]  # torch types it as () -> float
        assert returned is not None, "step(closure) returned None"
        value = torch.as_tensor(returned).item()
        assert value == expected.item(), f"step(closure) returned {value}, not {expected.item()}"
    assert_same(list(closed.parameters()), list(plain.parameters()), "with a closure")


def parameters_without_gradient_wait_and_join_later(case: OptimizerCase) -> None:
    """Without a gradient a parameter stands still (no decay either); its first step later is a first step."""
    stream = Stream(case)
    params = stream.parameters()
    late = params[::2]
    optimizer = case.build(params)

    def hide(step: int) -> None:
        for param in late:
            param.grad = None

    drive(optimizer, params, stream, range(3), before_step=hide)
    assert_same(late, Stream(case).parameters()[::2], "a parameter without gradient")
    start = copies(late)
    drive(optimizer, params, stream, [3])
    assert_near(late, _first_step(case, start, stream.gradients(3)[::2]), start, 1e-5, "first step of a late parameter")
    drive(optimizer, params, stream, [4], before_step=hide)
    drive(optimizer, params, stream, [5, 6])
    assert all(param.isfinite().all() for param in params), "weights are not finite after a gap"


def an_added_group_takes_part(case: OptimizerCase) -> None:
    """add_param_group works during a run: defaults filled in, a first step that is one, parameters taken only once."""
    stream = Stream(case)
    params = stream.parameters()
    early, late = params[::2], params[1::2]
    optimizer = case.build(early)
    for step in range(3):
        for param, gradient in zip(early, stream.gradients(step)[::2], strict=True):
            param.grad = gradient
        optimizer.step()
    start = copies(late)
    optimizer.add_param_group({"params": late})
    missing = set(optimizer.param_groups[0]) - set(optimizer.param_groups[1])
    assert not missing, f"options missing in the added group: {', '.join(sorted(missing))}"
    drive(optimizer, params, stream, [3])
    assert_near(late, _first_step(case, start, stream.gradients(3)[1::2]), start, 1e-5, "first step of an added group")
    try:
        optimizer.add_param_group({"params": [early[0]]})
    except ValueError:
        return
    raise AssertionError("a parameter could be added twice")


def zero_grad_leaves_nothing_to_do(case: OptimizerCase) -> None:
    """zero_grad() sets gradients to None, after which a step moves nothing; set_to_none=False sets them to zero."""
    stream = Stream(case)
    params = stream.parameters()
    optimizer = case.build(params)
    drive(optimizer, params, stream, range(2))
    optimizer.zero_grad(set_to_none=False)
    assert all(param.grad is not None and not param.grad.any() for param in params), "gradients are not zero"
    optimizer.zero_grad()
    assert all(param.grad is None for param in params), "gradients are not None"
    before = copies(params)
    optimizer.step()
    assert_same(params, before, "a step without gradients")


def all_zero_gradients_are_survived(case: OptimizerCase) -> None:
    """Gradients that are all zero, from the first step on, leave finite weights, and training can start after them."""
    stream = Stream(case)
    params = stream.parameters()
    optimizer = case.build(params)

    def zero(step: int) -> None:
        optimizer.zero_grad(set_to_none=False)

    drive(optimizer, params, stream, range(3), before_step=zero)
    drive(optimizer, params, stream, range(3, STEPS))
    assert all(param.isfinite().all() for param in params), "weights are not finite after gradients of zero"


def step_hooks_run(case: OptimizerCase) -> None:
    """Hooks registered with register_step_pre_hook and register_step_post_hook are called once per step."""
    stream = Stream(case)
    params = stream.parameters()
    optimizer = case.build(params)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    drive(optimizer, params, stream, range(2))
    assert calls == ["before", "after"] * 2, f"hooks called: {calls}"


def _first_step(case: OptimizerCase, start: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """Where a new optimizer goes from `start` in one step."""
    params = [nn.Parameter(weight.clone()) for weight in start]
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient
    case.build(params).step()
    return copies(params)


CHECKS = (
    accumulated_gradients_equal_the_big_batch,
    clipped_gradients_are_the_ones_used,
    gradients_are_left_as_they_were,
    a_closure_is_called_with_gradients_and_its_loss_returned,
    parameters_without_gradient_wait_and_join_later,
    an_added_group_takes_part,
    zero_grad_leaves_nothing_to_do,
    all_zero_gradients_are_survived,
    step_hooks_run,
)
