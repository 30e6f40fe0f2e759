"""AdamW (Loshchilov & Hutter, ICLR 2019): the baseline that every other method here is measured against.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g * g
    w = w - lr (decay w + m^ / (sqrt(v^) + eps))           ^ = corrected for the zero start

It keeps two numbers per parameter. The step is PyTorch's own functional form, with its fused kernel wherever that reads
the parameter as it is meant: on the CPU the kernel silently moves the wrong numbers of a parameter with gaps in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from leantrain.optim.adam import Adam
from leantrain.optim.chain import Chain
from leantrain.optim.rules import Rule


class AdamW(Chain):
    """AdamW with PyTorch's fused kernel, and no weight decay unless asked for.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: step size, >= 0; a number or a tensor of one element.
        betas: decay of the averages of g and of g * g, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled decay, >= 0; each step multiplies a weight by `1 - lr * weight_decay`.

    Raises:
        UsageError: a value outside its range. It is a ValueError.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 2)
        >>> optimizer = AdamW(layer.parameters(), lr=1e-3, weight_decay=0.1)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)

    def rule_for(self, param: Tensor, group: dict[str, Any]) -> Rule:
        return Adam(tuple(group["betas"]), group["eps"])
