"""From one basis to the next: how numbers that were expressed in the old directions are expressed in the new ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from leantrain.optim.bases.basis import Basis
from leantrain.optim.bases.columns import Columns
from leantrain.optim.rules import State


class Change(Protocol):
    """A change of basis, P_old^T P_new [K, R, R], in the form that is cheapest to apply."""

    def carry(self, moment: Tensor, order: int, right: bool) -> Tensor:
        """An average in the new basis: one of g (order 1) turns with it, one of g * g (order 2), as if its numbers were
        uncorrelated, with the change's squares. [K, L, R] if `right`, else [K, R, L]."""
        ...

    def overlap(self) -> Tensor:
        """||P_old^T P_new||^2 / R, [K] in float64 on the CPU: 1 where the subspace stayed where it was."""
        ...


def change_of_basis(basis: Basis, old: State, new: State, size: int, rank: int, like: Tensor) -> Change:
    """The change between two stored forms of this basis for gradients like these."""
    if isinstance(basis, Columns):
        return _Places(*basis.carried(old, new))
    before, after = (basis.directions(stored, size, rank, like) for stored in (old, new))
    return _Turn(before.mT @ after)


@dataclass(frozen=True)
class _Turn:
    change_KRR: Tensor

    def carry(self, moment: Tensor, order: int, right: bool) -> Tensor:
        turn = self.change_KRR.square() if order == 2 else self.change_KRR
        moment = moment.to(turn.dtype)
        return moment @ turn if right else turn.mT @ moment

    def overlap(self) -> Tensor:
        return self.change_KRR.square().sum(dim=(-2, -1)).double().cpu() / self.change_KRR.shape[-1]


@dataclass(frozen=True)
class _Places:
    """Columns that stay take their numbers with them, exactly; new ones begin with none."""

    place_KR: Tensor
    kept_KR: Tensor

    def carry(self, moment: Tensor, order: int, right: bool) -> Tensor:
        side, other = (-1, -2) if right else (-2, -1)
        place, kept = self.place_KR.unsqueeze(other), self.kept_KR.unsqueeze(other)
        return moment.gather(side, place.expand_as(moment)) * kept

    def overlap(self) -> Tensor:
        return self.kept_KR.double().mean(dim=-1).cpu()
