"""AdamW (Loshchilov & Hutter, ICLR 2019): the baseline that every other method here is measured against.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g * g
    w = w - lr (decay w + m^ / (sqrt(v^) + eps))           ^ = corrected for the zero start

It keeps two numbers per parameter. The class is PyTorch's own, with its fused kernel: there is nothing to gain by
writing it again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with the fused kernel on and no weight decay unless asked for.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: step size, >= 0.
        betas: decay of the averages of g and of g * g, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled decay; each step multiplies a weight by `1 - lr * weight_decay`.

    Raises:
        ValueError: a value outside its range, or no parameters.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
