"""Momentum's rule: a step along the decayed sum of gradients (Polyak, USSR Computational Mathematics 1964).

    b = momentum b + (1 - dampening) g        at the first step b = g
    update = b                                or, with `nesterov`, g + momentum b

One number of state per number of the gradient. As `torch.optim.SGD` defines it, except that weight decay is decoupled:
it belongs to the chain that holds the rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.optim.rules import State, load, store


@dataclass(frozen=True)
class Momentum:
    """Stochastic gradient descent's rule with momentum: `Chain(params, Momentum(), lr=0.1)`.

    Args:
        momentum: decay of the sum of gradients, in [0, 1). 0 is plain gradient descent; the state is kept all the same.
        dampening: what is taken from the weight of every gradient but the first, in [0, 1).
        nesterov: look one step ahead (Nesterov 1983, in the form of Sutskever et al., ICML 2013). Needs a momentum and
            no dampening.

    Raises:
        UsageError: a value outside its range.
    """

    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False

    moments: ClassVar[Mapping[str, int]] = {"momentum_buffer": 1}
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("momentum", "dampening"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise UsageError(f"{name} must be in [0, 1), got {name}={value!r}")
        if self.nesterov and not (self.momentum > 0 and self.dampening == 0):
            raise UsageError(
                f"nesterov needs momentum > 0 and dampening = 0, got momentum={self.momentum} and "
                f"dampening={self.dampening}"
            )

    def init(self, param: Tensor) -> State:
        return {"momentum_buffer": torch.zeros_like(param, memory_format=torch.preserve_format)}

    def update(self, grad: Tensor, state: State, step: Tensor) -> Tensor:
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        buffer = load(state, "momentum_buffer").mul_(self.momentum)
        if self.dampening:
            first = (step == 0).to(grad.device).view(-1, *[1] * (grad.ndim - 1))
            buffer.add_(torch.where(first, grad, (1 - self.dampening) * grad))
        else:
            buffer.add_(grad)
        store(state, "momentum_buffer", buffer)
        return grad.add(buffer, alpha=self.momentum) if self.nesterov else buffer.clone()
