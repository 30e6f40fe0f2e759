"""The sum of a matrix' gradients in its basis, and an estimate of the norm that the whole sum has.

    R = sum_i(G_i P)           [M, r]       kept; P [N, r] is the basis
    Y = sum_i(S G_i)           [8, N]       kept; S [8, M] are random signs / sqrt(8), drawn again where they are needed
    |G|^2 ~ |R|^2 + |Y|^2 - |S R|^2         G = sum_i(G_i), which never exists

E |S X|^2 = |X|^2 for every X, so the estimate has no bias. With orthonormal P, the last two terms are the sketch of
what the basis left out: only that part is random. It is Hutch++ (Meyer et al. 2021, SOSA) with the optimizer's own
basis. Where rows are projected, it is the same with rows and columns exchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_SKETCH = 8


@dataclass
class ProjectedSum:
    """`projected` (R) and `sketch` (Y), in float32 at least: sums in half precision lose what is small.

    Without a sketch it is one projected gradient, whose norm is known from elsewhere.
    """

    projected: Tensor
    sketch: Tensor | None
    by_rows: bool
    """Whether the sketch adds up rows, as it does where columns are projected."""
    seed: int

    @classmethod
    def of(cls, grad_MN: Tensor, projected: Tensor, seed: int) -> ProjectedSum:
        """The sum that begins with this gradient. Its signs follow from `seed`."""
        by_rows = projected.shape[1] != grad_MN.shape[1]
        return cls(wide(projected), wide(_sums(grad_MN, by_rows, seed)), by_rows, seed)

    def add(self, grad_MN: Tensor, projected: Tensor) -> None:
        assert self.sketch is not None
        self.projected += projected
        self.sketch += _sums(grad_MN, self.by_rows, self.seed)

    def square(self) -> float:
        """The estimate of |G|^2. It can be negative if the basis is not orthonormal."""
        assert self.sketch is not None
        kept = _sums(self.projected, self.by_rows, self.seed)
        return square_of(self.projected) + square_of(self.sketch) - square_of(kept)


def square_of(tensor: Tensor) -> float:
    """Squared norm of a plain or sparse tensor."""
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    norm = float(torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32)))
    return norm * norm


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sums(matrix: Tensor, by_rows: bool, seed: int) -> Tensor:
    """`_SKETCH` random signed sums of the rows (columns) of `matrix`, always the same ones for a seed."""
    generator = torch.Generator(matrix.device).manual_seed(seed)
    size = (_SKETCH, matrix.shape[0]) if by_rows else (matrix.shape[1], _SKETCH)
    signs = torch.randint(2, size, generator=generator, dtype=matrix.dtype, device=matrix.device)
    signs.sub_(0.5).mul_(2 / math.sqrt(_SKETCH))
    return signs @ matrix if by_rows else matrix @ signs
