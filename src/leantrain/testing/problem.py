"""The small problems every check runs on. All of them are pure functions of a seed: no hidden state, no files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.optim import Optimizer

from leantrain.testing.case import OptimizerCase

SHAPES = ((12, 5), (5, 12), (6, 6), (12, 5), (2, 3), (7,), (1,), (4, 3, 3))
"""Tall, wide, square, tall again (what is batched by shape has something to batch), tiny, 1-D, one element, 3-D."""

STEPS = 10
"""Long enough to cross two refreshes of 4 steps after the first, and to stop between and behind them."""


class Stream:
    """Parameters of several shapes and, for every step, a gradient for each: nothing depends on the weights.

    Every gradient is a part that stays plus a part that is drawn afresh, about one in size, so that its leading
    directions are well separated and drift from step to step.
    """

    def __init__(self, case: OptimizerCase, dtype: torch.dtype = torch.float32) -> None:
        self.shapes = tuple(shape for shape in SHAPES if len(shape) == 2 or not case.matrices_only)
        self.dtype = dtype

    def parameters(self) -> list[nn.Parameter]:
        """Fresh parameters, the same at every call."""
        return [nn.Parameter(weight.to(self.dtype, copy=True)) for weight in _draw(self.shapes, seed=1, size=0.2)]

    def gradients(self, step: int) -> list[Tensor]:
        """The gradients of step 0, 1, ..., one per parameter."""
        steady, fresh = _draw(self.shapes, seed=2, size=1.0), _draw(self.shapes, seed=100 + step, size=0.7)
        return [(a + b).to(self.dtype) for a, b in zip(steady, fresh, strict=True)]


@lru_cache(maxsize=256)
def _draw(shapes: tuple[tuple[int, ...], ...], seed: int, size: float) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(size * torch.randn(shape, generator=generator) for shape in shapes)


def drive(
    optimizer: Optimizer,
    params: Sequence[Tensor],
    stream: Stream,
    steps: Iterable[int] = range(STEPS),
    before_step: Callable[[int], object] | None = None,
    take_step: Callable[[], object] | None = None,
) -> None:
    """Give `params` the gradients of `steps` and step after each; `before_step(step)` sees the gradients in place."""
    for step in steps:
        for param, gradient in zip(params, stream.gradients(step), strict=True):
            param.grad = gradient
        if before_step is not None:
            before_step(step)
        (take_step or optimizer.step)()


def after_steps(case: OptimizerCase, dtype: torch.dtype = torch.float32, **changes: Any) -> list[Tensor]:
    """The weights that the case's optimizer reaches from the stream in STEPS steps, with some settings changed."""
    stream = Stream(case, dtype)
    params = stream.parameters()
    drive(case.build(params, **changes), params, stream)
    return copies(params)


class SmallTask:
    """A two-layer network, and batches whose targets come from a fixed network of the same form."""

    def __init__(self, case: OptimizerCase, dtype: torch.dtype = torch.float32) -> None:
        self.bias, self.dtype = not case.matrices_only, dtype
        self._teacher = self._network(seed=7)

    def model(self) -> nn.Sequential:
        """The network to be trained, the same at every call."""
        return self._network(seed=8)

    def batch(self, step: int, size: int = 32) -> tuple[Tensor, Tensor]:
        """Inputs [size, 8] and targets [size, 4] of one step."""
        generator = torch.Generator().manual_seed(1000 + step)
        inputs = torch.randn(size, 8, generator=generator).to(self.dtype)
        with torch.no_grad():
            return inputs, self._teacher(inputs)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean squared error of the model on the batch."""
        inputs, targets = batch
        return nn.functional.mse_loss(model(inputs), targets)

    def _network(self, seed: int) -> nn.Sequential:
        generator = torch.Generator().manual_seed(seed)
        # skip_init, because the layers' own initialisation would draw from the caller's generator.
        first, second = (skip_init(nn.Linear, *sizes, bias=self.bias) for sizes in ((8, 16), (16, 4)))
        network = nn.Sequential(first, nn.Tanh(), second)
        with torch.no_grad():
            for param in network.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) / max(param.shape[-1], 4) ** 0.5)
        return network.to(self.dtype)


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Detached copies of the values."""
    return [tensor.detach().clone() for tensor in tensors]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether all values are bit for bit equal."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """Fail with the first tensor that is not bit for bit equal, and by how much."""
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if not torch.equal(a, b):
            gap = (a.double() - b.double()).abs().max().item()
            raise AssertionError(f"{what}: parameter {index} of shape {tuple(a.shape)} differs by up to {gap:.3g}")


def assert_near(
    actual: Sequence[Tensor], expected: Sequence[Tensor], start: Sequence[Tensor], rtol: float, what: str
) -> None:
    """Fail when a tensor's way from `start` differs from the expected way by more than `rtol` of its length.

    Comparing ways and not weights: a step that is wrong by a tenth hardly shows beside a large weight.
    """
    for index, (a, b, s) in enumerate(zip(actual, expected, start, strict=True)):
        way = (b.detach().double() - s.detach().double()).norm()
        gap = (a.detach().double() - b.detach().double()).norm()
        if not gap <= rtol * way:  # also true when either is NaN
            raise AssertionError(
                f"{what}: parameter {index} of shape {tuple(a.shape)} is off by {gap / way:.3g} of its way "
                f"(allowed {rtol:g})"
            )
