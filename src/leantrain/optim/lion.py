"""Lion's rule: a step of the same size for every coordinate, from one average (Chen et al., NeurIPS 2023, Program 1).

    update = sign(b1 m + (1 - b1) g)
    m = b2 m + (1 - b2) g

One number of state per number of the gradient, half of Adam's. Every coordinate moves by the whole learning rate, so
that is usually three to ten times smaller than Adam's, and the weight decay as many times larger (the authors' advice).
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
class Lion:
    """Lion's rule: `Chain(params, Lion(), lr=1e-4, weight_decay=1.0)`.

    Args:
        betas: weight of the average in the step, and the average's decay, each in [0, 1).

    Raises:
        UsageError: a value outside its range.
    """

    betas: tuple[float, float] = (0.9, 0.99)

    moments: ClassVar[Mapping[str, int]] = {"exp_avg": 1}
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"betas must be two numbers in [0, 1), got betas={self.betas}")

    def init(self, param: Tensor) -> State:
        return {"exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format)}

    def update(self, grad: Tensor, state: State, step: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        mean = load(state, "exp_avg")
        update = mean.lerp(grad, 1 - beta1).sign_()
        store(state, "exp_avg", mean.lerp_(grad, 1 - beta2))
        return update
