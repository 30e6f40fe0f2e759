"""Columns of the cosine matrix: directions that need no decomposition, and indices instead of a stored basis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import get_args

import torch
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.optim.bases.basis import Total, alone
from leantrain.optim.bases.columns import Columns, Norm, highest, norms
from leantrain.optim.rules import State


@dataclass(frozen=True)
class DCT(Columns):
    """The r cosines of the discrete cosine transform (DCT-II) that hold most of the gradient.

        C      S x S, column i: sqrt(2 / S) cos(pi i (2 j + 1) / (2 S)) for j = 0 ... S - 1, column 0 divided by sqrt(2)
        score  of column i: the l1 or l2 norm of G C_i
        P      the columns of C with the R highest scores

    Cost: a fast Fourier transform of each row of the gradient per refresh (of each column on the left side). C is the
    same for all matrices of one size S: made once per device and kept, S * S numbers (beyond S = 8192 it is never
    whole). Modoranu et al. 2025, arXiv:2505.17967. With "l2" no other R columns of C leave a smaller rest
    |G - G P P^T|; how much C itself is worth on a model is for the control to say, `Coordinate`. Over several processes
    N numbers travel.

    Args:
        norm: "l1" as the paper's, or "l2".
    """

    norm: Norm = "l1"

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise UsageError(f"norm must be one of {get_args(Norm)}, got norm={self.norm!r}")

    def fit(self, grad_KMN: Tensor, stored: State, fresh: bool, rank: int, right: bool, total: Total = alone) -> State:
        grad_KLS = grad_KMN if right else grad_KMN.mT
        return {"columns": highest(total(norms(grad_KLS, self.norm, dct)), rank)}

    def directions(self, stored: State, size: int, rank: int, like: Tensor | None = None) -> Tensor:
        return cosines(stored["columns"], size, torch.float32 if like is None else like.dtype).mT


_FAST_FROM = 256
"""Size from which the Fourier transform beats the product with the matrix, on one CPU thread."""

_KEPT_WHOLE = 8192
"""Size up to which the cosine matrix is kept: 256 MiB of float32. Beyond it, cosines are computed when needed."""


def dct(rows: Tensor) -> Tensor:
    """The orthonormal DCT-II of each row: `rows @ C` with the C of `DCT`. float32 or float64, [..., S]."""
    size = rows.shape[-1]
    if size < _FAST_FROM:
        return rows @ _all_cosines(size, rows.dtype, rows.device).mT
    return fast_dct(rows)


def fast_dct(rows: Tensor) -> Tensor:
    """`dct` in O(S log S) per row: a Fourier transform of the even places followed by the odd ones backwards.

    Makhoul, IEEE Transactions on Acoustics, Speech, and Signal Processing, 1980. Of a real signal half the transform
    is enough: the imaginary parts are the other half of the result, backwards.
    """
    size = rows.shape[-1]
    half = torch.fft.rfft(torch.cat((rows[..., ::2], rows[..., 1::2].flip(-1)), dim=-1))
    frequency = torch.arange(half.shape[-1], dtype=torch.float64, device=rows.device)
    length = torch.full_like(frequency, math.sqrt(2 / size)).masked_fill_(frequency == 0, math.sqrt(1 / size))
    half *= torch.polar(length, frequency * (-math.pi / (2 * size))).to(half.dtype)
    return torch.cat((half.real, -half.imag[..., 1 : (size + 1) // 2].flip(-1)), dim=-1)


def cosines(columns: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Columns [..., R] of the cosine matrix of this size, as rows: [..., R, S]."""
    if size > _KEPT_WHOLE:
        return _cosines(columns, size, dtype)
    return _all_cosines(size, dtype, columns.device)[columns.long()]


@cache
def _all_cosines(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The whole matrix, transposed: row i is the i-th direction. In blocks, as the integers on the way are wide."""
    blocks = torch.arange(size, device=device).split(256)
    return torch.cat([_cosines(block, size, dtype) for block in blocks])


def _cosines(columns: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    # The angle is reduced while it is an integer, since the cosine of a large float is wrong in its last digits. That
    # leaves 4 S angles, whose cosines are taken in float64 and rounded once.
    angles = torch.arange(4 * size, dtype=torch.float64, device=columns.device) * (math.pi / (2 * size))
    table = (torch.cos(angles) * math.sqrt(2 / size)).to(dtype)
    place = 2 * torch.arange(size, device=columns.device) + 1
    found = table[columns.long().unsqueeze(-1) * place % (4 * size)]
    return found.masked_fill_((columns == 0).unsqueeze(-1), math.sqrt(1 / size))
