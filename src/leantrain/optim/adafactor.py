"""Adafactor's rule: Adam's second moment from row and column means (Shazeer & Stern, ICML 2018, Algorithm 4).

    h = (t + 1)^decay_exponent                                          t = 0, 1, ...
    row_M1 = (1 - h) row + h mean over columns (G * G + eps)            column_1N: likewise, over rows
    U = G / sqrt(row column / mean(row))
    update = U / max(1, rms(U) / clip_threshold)                        with beta1: m = b1 m + (1 - b1) update

State of an M x N matrix: M + N numbers instead of Adam's 2 M N, and M N more with `beta1`. A vector is a matrix of one
row, for which the product is its second moment itself. Tensors of more dimensions count as [first, all others]. The
paper's relative step sizes are left out: the learning rate is the chain's, as for every rule.
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
class Adafactor:
    """Adafactor's rule: `Chain(params, Adafactor(), lr=1e-3)`.

    Args:
        decay_exponent: how fast the weight of a new gradient falls, < 0: the mean over t steps gives it about t to this
            power.
        eps: added to every squared gradient, > 0.
        clip_threshold: largest root mean square of an update, > 0.
        beta1: decay of an average of the updates, in [0, 1); None keeps no average.

    Raises:
        UsageError: a value outside its range.
    """

    decay_exponent: float = -0.8
    eps: float = 1e-30
    clip_threshold: float = 1.0
    beta1: float | None = None

    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.decay_exponent < 0:
            raise UsageError(f"decay_exponent must be < 0, got decay_exponent={self.decay_exponent!r}")
        for name in ("eps", "clip_threshold"):
            if not (value := getattr(self, name)) > 0:
                raise UsageError(f"{name} must be > 0, got {name}={value!r}")
        if self.beta1 is not None and not 0 <= self.beta1 < 1:
            raise UsageError(f"beta1 must be in [0, 1) or None, got beta1={self.beta1!r}")

    @property
    def moments(self) -> Mapping[str, int]:
        # The means keep the axis they are taken over, at length 1: along it there is nothing to bring to a new basis.
        means = {"exp_avg_sq_row": 2, "exp_avg_sq_col": 2}
        return means if self.beta1 is None else {"exp_avg": 1, **means}

    def init(self, param: Tensor) -> State:
        _, rows, columns = _as_matrices(param.unsqueeze(0)).shape
        wide = torch.promote_types(param.dtype, torch.float32)  # eps is too small for float16
        means = {
            "exp_avg_sq_row": param.new_zeros(rows, 1, dtype=wide),
            "exp_avg_sq_col": param.new_zeros(1, columns, dtype=wide),
        }
        return means if self.beta1 is None else {"exp_avg": torch.zeros_like(param), **means}

    def update(self, grad: Tensor, state: State, step: Tensor) -> Tensor:
        shape, grad = grad.shape, _as_matrices(grad).to(torch.promote_types(grad.dtype, torch.float32))
        newest = ((step + 1) ** self.decay_exponent).to(grad.device, grad.dtype).view(-1, 1, 1)
        square = grad.square().add_(self.eps)
        row = state["exp_avg_sq_row"].lerp_(square.mean(-1, keepdim=True), newest)
        column = state["exp_avg_sq_col"].lerp_(square.mean(-2, keepdim=True), newest)
        # Each has the mean of all squares as its mean, but what was turned to a new basis may have lost some of it.
        mean = torch.maximum(row.mean(-2, keepdim=True), column.mean(-1, keepdim=True))
        update = (row / mean).rsqrt_() * column.rsqrt() * grad
        rms = update.square().mean((-2, -1), keepdim=True).sqrt_()
        update = update.div_((rms / self.clip_threshold).clamp_(min=1)).view(shape)
        if self.beta1 is None:
            return update
        average = load(state, "exp_avg").lerp_(update, 1 - self.beta1)
        store(state, "exp_avg", average)
        return average.clone()


def _as_matrices(stack: Tensor) -> Tensor:
    """[K, ...] as [K, M, N]: vectors and single numbers are one row, tensors are [first, all others]."""
    return stack.flatten(2) if stack.ndim > 2 else stack.reshape(len(stack), 1, -1)
