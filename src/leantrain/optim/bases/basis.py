"""What a basis is: the r directions of a gradient matrix that a low-rank method keeps, and how it stores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from leantrain.optim.rules import State

Total = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes that hold other rows of the same matrices, and returns the sum on each of them."""


def alone(part: Tensor) -> Tensor:
    """The `Total` of a process that holds whole matrices: what it has."""
    return part


class Basis(Protocol):
    """A way to choose directions. Holds settings only; what it found lives in the caller's state, as tensors.

    What a matrix keeps is called its stored form: the directions themselves, or what they can be made from again, such
    as the indices of columns. In a stack of K matrices every entry has K in front.
    """

    def init(self, size: int, rank: int, like: Tensor) -> State:
        """The stored form of one matrix before its first fit: zeros of the right shapes.

        Args:
            size: S.
            rank: R.
            like: gives dtype and device; may be on the meta device.
        """
        ...

    def fit(self, grad_KMN: Tensor, stored: State, fresh: bool, rank: int, right: bool, total: Total = alone) -> State:
        """The stored form for these gradients, in memory of its own: the names and shapes of `init` with K in front.

        Args:
            grad_KMN: gradients, float32 or float64. Only this process's rows where `total` is given.
            stored: what is in use until now; without meaning when `fresh`, but for counters.
            fresh: whether these matrices have no basis yet.
            rank: R.
            right: S is N (columns) where true, M (rows) where false.
            total: sums over the processes that hold the other rows; needs `right`. The result is then the same on all
                of them, and the whole matrices' to rounding. No process ever sees more than its rows.

        Raises:
            torch.linalg.LinAlgError: there is none for these gradients: a decomposition did not converge, or numbers
                are not finite. The caller keeps what it has.
        """
        ...

    def directions(self, stored: State, size: int, rank: int, like: Tensor | None = None) -> Tensor:
        """The directions [K, S, R] of a stored form: orthonormal columns, unless the basis says otherwise.

        Args:
            stored: stacked, as `fit` gave it.
            size: S.
            rank: R.
            like: gradients [K, ...] in whose dtype and on whose device the directions are wanted. Without it they are
                float32, or wider where the stored form is, and lie where it does; a form that holds nothing of the
                matrix gives them on the CPU, for K = 1 if it has no tensors at all.
        """
        ...


class Dense:
    """The part that bases share which store their directions as they are: S * R numbers in the parameter's dtype."""

    def init(self, size: int, rank: int, like: Tensor) -> State:
        return {"basis": like.new_zeros(size, rank)}

    def directions(self, stored: State, size: int, rank: int, like: Tensor | None = None) -> Tensor:
        basis = stored["basis"]
        return basis.to(torch.promote_types(basis.dtype, torch.float32) if like is None else like.dtype)


def captured(grad: Tensor, directions: Tensor, right: bool) -> float:
    """Share of the gradient's energy |G|^2 that lies in these orthonormal directions, from 0 to 1.

    Args:
        grad: [M, N], or [K, M, N] for the share over all K together.
        directions: [S, R] or [K, S, R].
        right: S is N where true, M where false.
    """
    kept = grad @ directions if right else directions.mT @ grad
    energy = grad.double().square().sum().item()
    return kept.double().square().sum().item() / energy if energy else 1.0
