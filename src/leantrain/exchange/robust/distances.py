"""Distances between long vectors, and who is near whom: what robust aggregation is made of.

Distances are sums of squares of differences, in float64: norms of models that are close to each other would lose all
digits of their difference. Vectors are worked on by chunks of coordinates, so that little memory is needed beside them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_COLUMNS = 1 << 16
"""Coordinates that are worked on at a time."""
_EXACT = "donot_use_mm_for_euclid_dist"


def squared_distances(stack: Tensor, point: Tensor) -> Tensor:
    """Of every row to `point`, float64 [n]; infinity for rows that are not finite."""
    total = stack.new_zeros(len(stack), dtype=torch.float64)
    for columns in chunks(stack):
        total += torch.cdist(stack[:, columns].double(), point[None, columns].double(), compute_mode=_EXACT)[:, 0] ** 2
    return torch.where(total.isnan(), torch.inf, total)


def pairwise_squared_distances(stack: Tensor) -> Tensor:
    """Of every row to every other, float64 [n, n]; infinity for rows that are not finite."""
    total = stack.new_zeros(len(stack), len(stack), dtype=torch.float64)
    for columns in chunks(stack):
        part = stack[:, columns].double()
        total += torch.cdist(part, part, compute_mode=_EXACT) ** 2
    return torch.where(total.isnan(), torch.inf, total)


def nearest_rows(distances: Tensor, count: int, own: int) -> list[int] | None:
    """The `count` rows with the least distances, in ascending order: `own`, and of others at one distance the first.
    None if fewer are at a finite one."""
    order = [own, *(row for row in distances.argsort(stable=True).tolist() if row != own)][:count]
    return sorted(order) if bool(distances[order].isfinite().all()) else None


def central_row(stack: Tensor, f: int) -> int:
    """The row whose n - f - 1 nearest others are nearest to it: a liar's only if it lies among honest ones; n > 2f."""
    return int(neighbour_scores(pairwise_squared_distances(stack), len(stack) - f - 1).argmin())


def mean_of_rows(stack: Tensor, rows: list[int]) -> Tensor:
    """The mean of these rows, summed in their order as differences to the first: of equal rows it is the row itself."""
    first = stack[rows[0]]
    wide = first.to(torch.promote_types(first.dtype, torch.float32))
    total = torch.zeros_like(wide)
    for row in rows[1:]:
        total += stack[row] - wide
    return (wide + total / len(rows)).to(first.dtype)


def finite_rows(stack: Tensor) -> Tensor:
    """Which rows have neither NaN nor infinity, bool [n]."""
    least, most = stack.aminmax(dim=1)  # either is NaN if any number is
    return least.isfinite() & most.isfinite()


def neighbour_scores(distances: Tensor, neighbours: int) -> Tensor:
    """For every row the sum of its least distances to as many others; [n, n] -> [n]."""
    others = distances.clone().fill_diagonal_(torch.inf)
    return others.sort(1).values[:, :neighbours].sum(1)


def chunks(stack: Tensor) -> Iterator[slice]:
    """Slices that cover the coordinates."""
    for start in range(0, stack.shape[1], _COLUMNS):
        yield slice(start, start + _COLUMNS)
