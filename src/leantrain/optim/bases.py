"""Bases: the r directions of a gradient matrix that a low-rank method keeps.

Shape suffixes: K = matrices in the stack, L, S = the sides of the gradient whose S side is projected, R = rank.
A basis is S x R with orthonormal columns; L x R = G_LS @ basis_SR is what is left of the gradient. Which side is
projected is the caller's choice; the gradient comes as it is stored, with `right` saying whether S is its columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Basis(Protocol):
    """A way to choose directions. Holds settings only; what it found lives in the caller's state."""

    def fit(self, grad_KMN: Tensor, previous_KSR: Tensor, fresh: bool, rank: int, right: bool) -> Tensor:
        """Orthonormal directions [K, S, R] for these gradients, in memory of their own.

        Args:
            grad_KMN: gradients, float32 or float64.
            previous_KSR: the basis in use until now; without meaning when `fresh`.
            fresh: whether these matrices have no basis yet.
            rank: R.
            right: S is N (columns) where true, M (rows) where false.

        Raises:
            torch.linalg.LinAlgError: the decomposition did not converge. The caller keeps the previous basis.
        """
        ...


@dataclass(frozen=True)
class SVD:
    """The leading singular vectors: the best r directions there are, at the price of a full decomposition.

    Cost: O(M N min(M, N)) per matrix and refresh. As in GaLore (Zhao et al. 2024, ICML).
    """

    def fit(self, grad_KMN: Tensor, previous_KSR: Tensor, fresh: bool, rank: int, right: bool) -> Tensor:
        left, _, right_h = torch.linalg.svd(grad_KMN, full_matrices=False)
        chosen = right_h[..., :rank, :].mT if right else left[..., :rank]
        # A clone, because a slice keeps the whole factor alive.
        return chosen.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class SubspaceIteration:
    """One power step from the previous basis and a QR: P = qr(G^T (G P)).

    Cost: 4 M N R operations and a thin QR per matrix and refresh, no decomposition of G. Gradients' leading subspaces
    move slowly, so a step from where the subspace was is enough to follow it; a matrix without a basis starts from
    random directions drawn from `seed` and makes `first` steps. Block power iteration: Halko, Martinsson & Tropp, SIAM
    Review 2011; warm-started over training in the manner of PowerSGD (Vogels et al., NeurIPS 2019).

    Args:
        first: power steps of a matrix that has no basis yet, >= 1.
        seed: of the random directions it starts from. The same on every process, so all find the same basis.
    """

    first: int = 1
    seed: int = 0

    def fit(self, grad_KMN: Tensor, previous_KSR: Tensor, fresh: bool, rank: int, right: bool) -> Tensor:
        grad_KLS = grad_KMN if right else grad_KMN.mT
        basis = self._start(grad_KLS, rank) if fresh else previous_KSR.to(grad_KMN.dtype)
        for _ in range(self.first if fresh else 1):
            basis = torch.linalg.qr(grad_KLS.mT @ (grad_KLS @ basis)).Q
        return basis.contiguous()

    def _start(self, grad_KLS: Tensor, rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randn(grad_KLS.shape[-1], rank, generator=generator, dtype=grad_KLS.dtype)
        return start.to(grad_KLS.device).expand(grad_KLS.shape[0], -1, -1)
