"""Bases: the r directions of a gradient matrix that a low-rank method keeps.

Shape suffixes: K = matrices in the stack, L, S = the sides of the gradient whose S side is projected, R = rank.
A basis is S x R with orthonormal columns; L x R = G_LS @ basis_SR is what is left of the gradient. Which side is
projected is the caller's choice; the gradient comes as it is stored, with `right` saying whether S is its columns.
"""

from __future__ import annotations

from typing import Literal

from leantrain.optim.bases.basis import Basis, Dense, Total, alone, captured
from leantrain.optim.bases.change import Change, change_of_basis
from leantrain.optim.bases.columns import Columns, Coordinate, Identity, Norm
from leantrain.optim.bases.dct import DCT
from leantrain.optim.bases.random import Random
from leantrain.optim.bases.subspace import SubspaceIteration
from leantrain.optim.bases.svd import SVD, RandomizedSVD

BasisName = Literal["svd", "subspace", "rsvd", "dct", "random", "coordinate", "identity"]

BASES: dict[str, Basis] = {
    "svd": SVD(),
    "subspace": SubspaceIteration(),
    "rsvd": RandomizedSVD(),
    "dct": DCT(),
    "random": Random(),
    "coordinate": Coordinate(),
    "identity": Identity(),
}
"""Every basis by the name that optimizers know it by, in its default settings."""

__all__ = [
    "BASES",
    "DCT",
    "SVD",
    "Basis",
    "BasisName",
    "Change",
    "Columns",
    "Coordinate",
    "Dense",
    "Identity",
    "Norm",
    "Random",
    "RandomizedSVD",
    "SubspaceIteration",
    "Total",
    "alone",
    "captured",
    "change_of_basis",
]
