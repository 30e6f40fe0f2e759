"""A linear read-out in closed form: ridge regression onto the classes, its strength chosen by leaving one out.

    W = argmin ||Y - X W||^2 + a ||W||^2        X [n, width] centred features, Y [n, classes] centred one-hot labels
      = V diag(s / (s^2 + a)) U' Y              X = U diag(s) V'
    e_i = (y_i - x_i W) / (1 - h_i)             the error at example i of a fit without it
    h   = diag(U diag(s^2 / (s^2 + a)) U') + 1/n

One decomposition serves all strengths a, of which the one with the least sum of e^2 is taken; nothing is trained.

Source: Hoerl & Kennard 1970; the errors of fits without one example: Allen 1974 (PRESS).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leantrain.analysis.hidden import pooled

STRENGTHS = tuple(10.0**power for power in range(-6, 4))
"""In units of the features' mean variance over the directions that they have, times n."""


class ReadOut(nn.Module):
    """Features [B, ...] in, scores [B, classes] out; of [B, T, C] features with `every_position`, [B, T, classes].

    Scores estimate probabilities by least squares: the largest one is the class, but they are no logits.
    """

    def __init__(self, weight: Tensor, bias: Tensor, every_position: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.every_position = every_position

    def forward(self, features: Tensor) -> Tensor:
        rows = features if self.every_position else pooled(features)
        return F.linear(rows.to(self.weight.dtype), self.weight, self.bias)


@dataclass(frozen=True)
class Ridge:
    """A fit, in float64."""

    weight: Tensor
    """[classes, width]."""
    bias: Tensor
    """[classes]."""
    strength: float
    """The a that was taken."""
    singular_values: Tensor
    """[rank] of the centred features."""

    def predicted(self, features: Tensor) -> Tensor:
        """[n] the class of each row of `features` [n, width]."""
        return F.linear(features.double(), self.weight, self.bias).argmax(-1)


def fit_ridge(features: Tensor, labels: Tensor, classes: int) -> Ridge:
    """Fit [n, width] features to [n] int64 labels below `classes`."""
    x, n = features.double(), len(features)
    mean, onehot = x.mean(0), F.one_hot(labels, classes).double()
    frequency = onehot.mean(0)
    x, y = x - mean, onehot - frequency
    left, s, right = _svd(x)
    if not len(s):  # all rows are the same
        return Ridge(torch.zeros(classes, x.shape[1], dtype=x.dtype), frequency, 0.0, s)
    along = left.T @ y
    squares = s.square()

    def error(strength: float) -> float:
        shrunk = squares / (squares + strength)
        leverage = left.square() @ shrunk + 1 / n
        return float(((y - left @ (shrunk[:, None] * along)) / (1 - leverage)[:, None]).square().sum())

    strength = min((each * float(squares.mean()) for each in STRENGTHS), key=error)
    weight = (right @ ((s / (squares + strength))[:, None] * along)).T
    return Ridge(weight, frequency - weight @ mean, strength, s)


def _svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, s and V of x = U diag(s) V' without directions that are rounding, by the smaller of the two Gram matrices."""
    wide = x.shape[1] > x.shape[0]
    squares, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    kept = squares > max(x.shape) * torch.finfo(x.dtype).eps * squares[-1].clamp_min(0)
    s, vectors = squares[kept].sqrt(), vectors[:, kept]
    if wide:
        return vectors, s, x.T @ vectors / s
    return x @ vectors / s, s, vectors
