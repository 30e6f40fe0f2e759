"""Bases that are chosen, not computed: columns of a fixed orthonormal matrix, here of the identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leantrain.optim.bases.basis import Total, alone
from leantrain.optim.rules import State

Norm = Literal["l1", "l2"]


class Columns:
    """The part that bases share which store R indices, 4 R bytes, ascending. Before a fit they are the first R."""

    def init(self, size: int, rank: int, like: Tensor) -> State:
        return {"columns": torch.arange(rank, dtype=torch.int32, device=like.device)}

    @staticmethod
    def carried(old: State, new: State) -> tuple[Tensor, Tensor]:
        """For each new column its place among the old ones, and whether it was one of them. Both [K, R].

        With old and new directions P and P', the r x r change of basis P^T P' has a one at [place[i], i] where column i
        was there before, and zeros everywhere else: what belongs to a column that stays goes with it, unchanged.
        """
        before, after = old["columns"].contiguous(), new["columns"].contiguous()
        place = torch.searchsorted(before, after).clamp_(max=before.shape[-1] - 1)
        return place, before.gather(-1, place) == after


@dataclass(frozen=True)
class Coordinate(Columns):
    """The r columns of the gradient itself with the largest l2 norm (its rows on the left side): axes, not directions.

    The cheapest basis that looks at the gradient, and the control for `DCT`. Cost: one pass over the gradient per
    refresh. As the columns of FRUGAL (Zmushko et al. 2024, arXiv:2411.07837). Over several processes N numbers travel.
    """

    def fit(self, grad_KMN: Tensor, stored: State, fresh: bool, rank: int, right: bool, total: Total = alone) -> State:
        grad_KLS = grad_KMN if right else grad_KMN.mT
        return {"columns": highest(total(norms(grad_KLS, "l2")), rank)}

    def directions(self, stored: State, size: int, rank: int, like: Tensor | None = None) -> Tensor:
        columns = stored["columns"].long().unsqueeze(-2)
        dtype = torch.float32 if like is None else like.dtype
        return torch.zeros(len(columns), size, rank, dtype=dtype, device=columns.device).scatter_(-2, columns, 1)


@dataclass(frozen=True)
class Identity:
    """The first r axes, whatever the gradient is. Stores nothing.

    Not a way to train: with R = S it makes a low-rank method the plain one, exactly, which is what tests need.
    """

    def init(self, size: int, rank: int, like: Tensor) -> State:
        return {}

    def fit(self, grad_KMN: Tensor, stored: State, fresh: bool, rank: int, right: bool, total: Total = alone) -> State:
        return {}

    def directions(self, stored: State, size: int, rank: int, like: Tensor | None = None) -> Tensor:
        if like is None:
            return torch.eye(size, rank).unsqueeze(0)
        return torch.eye(size, rank, dtype=like.dtype, device=like.device).expand(len(like), -1, -1)


def norms(rows_KLS: Tensor, norm: Norm, transform: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Of each column the part of its norm that adds up over rows: the l1 norm, or the square of the l2 norm.

    With a `transform` of rows, the columns are those of the transformed matrix, which is never whole.
    """
    at_once = (1 << 18 if rows_KLS.is_cpu else 1 << 24) // (len(rows_KLS) * rows_KLS.shape[-1])  # fits a CPU's cache
    sums = rows_KLS.new_zeros(len(rows_KLS), rows_KLS.shape[-1])
    for rows in rows_KLS.split(max(1, at_once), dim=-2):
        some = rows if transform is None else transform(rows)
        sums += (some.abs() if norm == "l1" else some.square()).sum(-2)
    return sums


def highest(scores_KS: Tensor, rank: int) -> Tensor:
    """Indices of the R highest scores, ascending. Of equal scores the first column's counts as higher, on any device.

    Raises:
        torch.linalg.LinAlgError: a score is not finite.
    """
    if not torch.isfinite(scores_KS).all():
        raise torch.linalg.LinAlgError("no columns can be chosen: their norms are not finite")  # type: ignore[attr-defined]
    order = scores_KS.argsort(dim=-1, descending=True, stable=True)
    return order[..., :rank].sort(-1).values.to(torch.int32)
