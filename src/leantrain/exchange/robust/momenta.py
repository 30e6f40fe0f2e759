"""A worker's momentum of its own gradients: m <- beta m + (1 - beta) g, one float32 (or float64) tensor per parameter.

With the factor 1 - beta (Polyak's averaging form) a momentum is as long as a gradient, whatever beta is, and starts
short: after t steps it has 1 - beta^t of its length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from leantrain.errors import UsageError


class Momenta:
    """Momenta by parameter name; none where beta is 0."""

    def __init__(self, params: Mapping[str, Tensor], beta: float) -> None:
        self.beta = beta
        self.by_name = {name: _start(param) for name, param in params.items() if beta > 0}

    def step(self, grads: Sequence[Tensor], scale: float = 1.0) -> list[Tensor]:
        """The momenta with these gradients in them, in the order of the parameters.

        Args:
            grads: one for every parameter. Where some are not finite they are given back, and leave no trace.
            scale: GradScaler's factor in the gradients. Momenta do not have it, since it changes between steps.
        """
        if self.beta == 0 or not all(is_finite(grad) for grad in grads):
            return [grad / scale if scale != 1 else grad for grad in grads]
        for momentum, grad in zip(self.by_name.values(), grads, strict=True):
            momentum.mul_(self.beta).add_(grad, alpha=(1 - self.beta) / scale)
        return list(self.by_name.values())

    def state_dict(self) -> dict[str, Any]:
        return {"beta": self.beta, "momenta": dict(self.by_name)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            UsageError: it was saved with another beta, or for other parameters.
        """
        if state["beta"] != self.beta:
            raise UsageError(f"momenta were saved with momentum={state['beta']}, and this exchange has {self.beta}")
        saved = state["momenta"]
        if different := sorted(saved.keys() ^ self.by_name.keys()):
            raise UsageError(f"momenta were saved for another model: {different[0]!r} is in one of the two only")
        for name, momentum in self.by_name.items():
            if saved[name].shape != momentum.shape:
                raise UsageError(
                    f"momenta were saved for another model: {name!r} was {list(saved[name].shape)}, "
                    f"and is {list(momentum.shape)}"
                )
            momentum.copy_(saved[name])


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    if not tensor.numel():
        return True
    least, most = torch.aminmax(tensor)  # either is NaN if any number is
    return bool(least.isfinite() & most.isfinite())


def _start(param: Tensor) -> Tensor:
    """Zeros. Sixteen bits would not notice a hundredth of a gradient."""
    return torch.zeros_like(param, dtype=torch.promote_types(param.dtype, torch.float32))
