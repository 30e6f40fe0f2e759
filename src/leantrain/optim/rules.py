"""What a rule is: a pure transform of gradients, with its state kept outside it.

A rule is written for a *stack*: K parameters of one shape are joined along a new first axis, so the code below a rule's
`update` reads like the paper's line for one matrix and still steps many of them as one batched operation. Shape suffix:
K = parameters in the stack.

Rules compose by holding another rule (see `leantrain.optim.low_rank.LowRank`) and know nothing of learning rates,
weight decay or parameter groups: `leantrain.optim.chain.Chain` turns a rule into a `torch.optim.Optimizer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]
"""A parameter's state: tensors only, so that `torch.load(..., weights_only=True)` is enough to read it back.

Tensors of zero dimensions (counters) stay on the CPU in the dtype they were made in; the others live on the
parameter's device. In a stack each has one more axis, K, in front.
"""


@dataclass(frozen=True)
class Factored:
    """An update kept as a product `left_KMR @ right_KRN * scale`, so that the M x N update is never stored."""

    left: Tensor
    right: Tensor
    scale: float = 1.0

    def dense(self) -> Tensor:
        """The update itself, shape [K, M, N]."""
        return (self.left @ self.right).mul_(self.scale)


class Rule(Protocol):
    """One gradient transform: hyper-parameters in its fields, nothing else in the object."""

    @property
    def moments(self) -> Mapping[str, int]:
        """State entries that live in the gradient's space, each with its order: 1 averages g, 2 averages g * g.
        A rule that moves another rule to a new basis turns order 1 by C and order 2 by C * C."""
        ...

    @property
    def elementwise(self) -> bool:
        """Whether each number's step depends on that number's own gradients alone, so that any part of a parameter can
        be stepped without the rest."""
        ...

    def init(self, param: Tensor) -> State:
        """State of one parameter before its first step. `param` may be on the meta device: only its shape, dtype
        and device are read."""
        ...

    def update(self, grad: Tensor, state: State, step: Tensor) -> Tensor | Factored:
        """The step to take against, of `grad`'s shape [K, ...]; `state` (stacked) is changed in place.

        `step` is a float64 tensor [K] on the CPU: how many steps each parameter has made before this one.
        """
        ...


def load(state: State, key: str) -> Tensor:
    """A state tensor in the precision of the arithmetic: float32 for half-precision storage, otherwise itself."""
    stored = state[key]
    return stored.float() if stored.dtype in (torch.bfloat16, torch.float16) else stored


def store(state: State, key: str, value: Tensor) -> None:
    """Write back what `load` gave and the rule changed; nothing to do where they are the same memory."""
    if value.data_ptr() != state[key].data_ptr():
        state[key].copy_(value)


class EndsChain(Protocol):
    """A rule that can also take the whole step itself, on any number of parameters and without making the update."""

    def descend(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], lr: float | Tensor, weight_decay: float
    ) -> None:
        """Move `params` in place and count their steps: w = w - lr * (weight_decay * w + update)."""
        ...
