"""Is it the method it says it is: training, the slow twin, the method turned off, repeatability, kinds of numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leantrain.testing.case import NotApplicable, OptimizerCase
from leantrain.testing.problem import (
    SmallTask,
    Stream,
    after_steps,
    assert_near,
    assert_same,
    copies,
    drive,
    same,
)

TWIN_STEPS = 20


def trains_a_small_model(case: OptimizerCase) -> None:
    """The loss on a small network falls below the promised fraction of the first one in 100 steps."""
    task = SmallTask(case)
    model = task.model()
    optimizer = case.build(model.parameters())
    held_out = task.batch(-1, size=256)
    first = task.loss(model, held_out).item()
    for step in range(100):
        optimizer.zero_grad()
        task.loss(model, task.batch(step)).backward()
        optimizer.step()
    last = task.loss(model, held_out).item()
    assert last <= case.trains_below * first, (
        f"loss went from {first:.4g} to {last:.4g} in 100 steps, which is not below {case.trains_below:g} of the first"
    )


def equals_its_slow_twin(case: OptimizerCase) -> None:
    """In float32, 20 steps agree with the float64 twin to 1e-5, for the settings and for every knob changed alone."""
    if case.twin is None:
        raise NotApplicable("the case names no twin")
    for changes in ({}, *({argument: value} for argument, value in case.knobs.items())):
        try:
            twin = case.build_twin(**changes)
        except NotImplementedError:  # the twin does not describe this value, and says so
            if not changes:
                raise
            continue
        stream = Stream(case)
        params = stream.parameters()
        start = copies(params)
        weights = [weight.double() for weight in start]
        drive(case.build(params, **changes), params, stream, range(TWIN_STEPS))
        for step in range(TWIN_STEPS):
            twin.step(weights, [gradient.double() for gradient in stream.gradients(step)])
        # float32 keeps 7 digits and 20 steps lose about one of them; the smallest real mistakes cost 1e-3.
        assert_near(params, weights, start, 1e-5, f"against the twin with {changes or 'the settings'}")


def off_equals_the_plain_optimizer(case: OptimizerCase) -> None:
    """Turned off, the method is bit for bit the optimizer it extends."""
    if case.off_equals is None:
        raise NotApplicable("the case does not say what it equals when it is off")
    settings, plain = case.off_equals
    stream = Stream(case)
    ours, theirs = stream.parameters(), stream.parameters()
    drive(case.optimizer_class(ours, **settings), ours, stream)
    drive(plain(list(theirs)), theirs, stream)
    assert_same(ours, theirs, "turned off, against the plain optimizer")


def identical_runs_are_bitwise_identical(case: OptimizerCase) -> None:
    """Two runs in one process, without seeding in between, reach the same bits."""
    assert_same(after_steps(case), after_steps(case), "second identical run")


def keeps_going_after_ten_million_steps(case: OptimizerCase) -> None:
    """With every step counter at 10,000,000 the weights stay finite, move, and the counters count on."""
    stream = Stream(case)
    params = stream.parameters()
    optimizer = case.build(params)
    drive(optimizer, params, stream, range(3))
    saved = optimizer.state_dict()
    counters = [entries for entries in saved["state"].values() if "step" in entries]
    if not counters:
        raise NotApplicable("no state is named 'step'")
    many = 10_000_000
    for entries in counters:
        step = entries["step"]
        entries["step"] = torch.full_like(step, many) if isinstance(step, Tensor) else many
    optimizer = case.build(params)
    optimizer.load_state_dict(saved)
    before = copies(params)
    drive(optimizer, params, stream, range(3, 6))
    assert all(param.isfinite().all() for param in params), "weights are no longer finite"
    assert not same(before, params), "weights no longer move"
    steps = sorted({int(entries["step"]) for entries in optimizer.state_dict()["state"].values()})
    assert steps == [many + 3], f"counters stand at {steps} after {many} + 3 steps"


def bf16_parameters_train_and_stay_bf16(case: OptimizerCase) -> None:
    """bfloat16 parameters move, stay finite and keep their dtype, and go where float32 ones go, roughly."""
    stream = Stream(case, torch.bfloat16)
    params = stream.parameters()
    start = copies(params)
    drive(case.build(params), params, stream)
    assert all(param.dtype == torch.bfloat16 for param in params), "dtype changed"
    assert all(param.isfinite().all() for param in params), "weights are no longer finite"
    assert all(not torch.equal(a, b) for a, b in zip(start, params, strict=True)), "a parameter did not move"
    for index, (before, after, exact) in enumerate(zip(start, params, after_steps(case), strict=True)):
        way, expected = (after - before).detach().double().flatten(), (exact - before).double().flatten()
        cosine = torch.dot(way, expected) / (way.norm() * expected.norm())
        # Small steps drown in 8 bits of a weight, and a basis may turn; pointing away would still be a mistake.
        assert cosine > 0.5, f"parameter {index}: bf16 and float32 go different ways (cosine {cosine:.2f})"


def memory_layout_does_not_matter(case: OptimizerCase) -> None:
    """Parameters and gradients that are not contiguous take the same way as contiguous ones."""
    stream = Stream(case)
    start = stream.parameters()
    expected = after_steps(case)
    for which in ("parameters", "gradients"):
        params = [nn.Parameter(_strided(p)) if which == "parameters" else p for p in stream.parameters()]

        def restride(step: int, params: list[nn.Parameter] = params, which: str = which) -> None:
            for param in params if which == "gradients" else ():
                assert param.grad is not None
                param.grad = _strided(param.grad)

        drive(case.build(params), params, stream, before_step=restride)
        # A different layout sums in a different order, which methods with bf16 inside turn into 1e-3.
        assert_near(params, expected, start, 1e-2, f"{which} not contiguous")


def maximize_is_minimize_of_the_opposite(case: OptimizerCase) -> None:
    """maximize=True with gradients g equals maximize=False with gradients -g."""
    if "maximize" not in case.arguments():
        raise NotApplicable("the class has no argument 'maximize'")
    stream = Stream(case)
    up, down = stream.parameters(), stream.parameters()
    drive(case.build(up, maximize=True), up, stream)

    def negate(step: int) -> None:
        for param in down:
            assert param.grad is not None
            param.grad = -param.grad

    drive(case.build(down, maximize=False), down, stream, before_step=negate)
    assert_same(up, down, "maximize=True against minimizing the opposite")


def complex_parameters_work_or_are_refused(case: OptimizerCase) -> None:
    """Complex parameters move in both parts, or raise an error that says 'complex'."""
    generator = torch.Generator().manual_seed(5)
    param = nn.Parameter(torch.randn(6, 5, dtype=torch.complex64, generator=generator))
    before = param.detach().clone()
    try:
        optimizer = case.build([param])
        for _ in range(3):
            param.grad = torch.randn(6, 5, dtype=torch.complex64, generator=generator)
            optimizer.step()
    except Exception as error:
        assert "complex" in str(error).lower(), (
            f"complex parameters raise {type(error).__name__}: {error}, which does not say 'complex'"
        )
        return
    moved = torch.view_as_real(param.detach() - before)
    assert moved.isfinite().all() and (moved != 0).any(dim=(0, 1)).all(), "a part of the complex parameter stood still"


def sparse_gradients_work_or_are_refused(case: OptimizerCase) -> None:
    """A sparse gradient gives the same step as the dense one, or raises an error that says 'sparse'."""
    stream = Stream(case)
    dense, sparse = stream.parameters()[0], stream.parameters()[0]
    start, gradient = dense.detach().clone(), stream.gradients(0)[0]
    gradient[::2] = 0
    dense.grad = gradient
    case.build([dense]).step()
    try:
        optimizer = case.build([sparse])
        sparse.grad = gradient.to_sparse(1)
        optimizer.step()
    except Exception as error:
        assert "sparse" in str(error).lower(), (
            f"a sparse gradient raises {type(error).__name__}: {error}, which does not say 'sparse'"
        )
        return
    assert_near([sparse], [dense], [start], 1e-5, "sparse gradient against the dense one")


def _strided(tensor: Tensor) -> Tensor:
    """The same values with gaps between them, last dimension first."""
    wide = torch.zeros(*reversed(tensor.shape), 2, dtype=tensor.dtype)
    view = wide[..., 0].permute(*reversed(range(tensor.ndim)))
    return view.copy_(tensor.detach())


CHECKS = (
    trains_a_small_model,
    equals_its_slow_twin,
    off_equals_the_plain_optimizer,
    identical_runs_are_bitwise_identical,
    keeps_going_after_ten_million_steps,
    bf16_parameters_train_and_stay_bf16,
    memory_layout_does_not_matter,
    maximize_is_minimize_of_the_opposite,
    complex_parameters_work_or_are_refused,
    sparse_gradients_work_or_are_refused,
)
