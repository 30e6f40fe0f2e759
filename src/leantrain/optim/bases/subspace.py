"""A subspace that follows the gradient's by one power step per refresh."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leantrain.optim.bases.basis import Dense, Total, alone
from leantrain.optim.rules import State


@dataclass(frozen=True)
class SubspaceIteration(Dense):
    """One power step from the previous basis and a QR: P = qr(G^T (G P)).

    Cost: 4 M N R operations and a thin QR per matrix and refresh, no decomposition of G. Gradients' leading subspaces
    move slowly, so a step from where the subspace was is enough to follow it; a matrix without a basis starts from
    random directions drawn from `seed` and makes `first` steps. Block power iteration: Halko, Martinsson & Tropp, SIAM
    Review 2011; warm-started over training in the manner of PowerSGD (Vogels et al., NeurIPS 2019). Over several
    processes N * R numbers travel per step.

    Args:
        first: power steps of a matrix that has no basis yet, >= 1.
        seed: of the random directions it starts from. The same on every process, so all find the same basis.
    """

    first: int = 1
    seed: int = 0

    def fit(self, grad_KMN: Tensor, stored: State, fresh: bool, rank: int, right: bool, total: Total = alone) -> State:
        grad_KLS = grad_KMN if right else grad_KMN.mT
        basis = self._start(grad_KLS, rank) if fresh else stored["basis"].to(grad_KMN.dtype)
        for _ in range(self.first if fresh else 1):
            basis = torch.linalg.qr(total(grad_KLS.mT @ (grad_KLS @ basis))).Q
        return {"basis": basis.contiguous()}

    def _start(self, grad_KLS: Tensor, rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randn(grad_KLS.shape[-1], rank, generator=generator, dtype=grad_KLS.dtype)
        return start.to(grad_KLS.device).expand(grad_KLS.shape[0], -1, -1)
