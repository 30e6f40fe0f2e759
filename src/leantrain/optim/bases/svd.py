"""Singular vectors of the gradient: all of them computed and the first kept, or the first found by random sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.optim.bases.basis import Dense, Total, alone
from leantrain.optim.rules import State


@dataclass(frozen=True)
class SVD(Dense):
    """The leading singular vectors: the best r directions there are, at the price of a full decomposition.

    Cost: O(M N min(M, N)) per matrix and refresh. As in GaLore (Zhao et al. 2024, ICML). Over several processes they
    are the eigenvectors of the sum of everybody's G^T G, in float64: N * N numbers travel, and O(N^3) on each.
    """

    def fit(self, grad_KMN: Tensor, stored: State, fresh: bool, rank: int, right: bool, total: Total = alone) -> State:
        if total is alone:
            left, _, right_h = torch.linalg.svd(grad_KMN, full_matrices=False)
            chosen = right_h[..., :rank, :].mT if right else left[..., :rank]
        else:
            wide = grad_KMN.double()
            ascending = torch.linalg.eigh(total(wide.mT @ wide)).eigenvectors
            chosen = ascending[..., -rank:].flip(-1).to(grad_KMN.dtype)
        # A clone, because a slice keeps the whole factor alive.
        return {"basis": chosen.clone(memory_format=torch.contiguous_format)}


@dataclass(frozen=True)
class RandomizedSVD(Dense):
    """The leading singular vectors of a random sample of the gradient's range, nearly those of the gradient itself.

        Omega  S x (R + oversample), Gaussian from `seed`
        Q      orthonormal basis of G Omega                           (and of G G^T G Omega with `power` = 1, ...)
        P      the first R right singular vectors of the small Q^T G

    Written for the right side; the left one is the same for G^T. Cost: 4 M N (R + oversample) operations, a thin QR and
    the SVD of a matrix with R + oversample rows, per matrix and refresh; 4 M N (R + oversample) more for each power.
    Unlike subspace iteration it needs no earlier basis. Halko, Martinsson & Tropp, SIAM Review 2011, Algorithms 4.4 and
    5.1; for GaLore in GaLore 2 (Su et al. 2025). Over several processes (R + oversample) * N numbers travel (twice that
    for each power), and a square of R + oversample.

    Args:
        oversample: directions sampled beyond R, >= 0.
        seed: of Omega. The same on every process and at every refresh.
        power: power steps before the small decomposition, >= 0: closer to the SVD where singular values fall slowly.
    """

    oversample: int = 5
    seed: int = 0
    power: int = 0

    def __post_init__(self) -> None:
        for name in ("oversample", "power"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must be >= 0, got {name}={getattr(self, name)!r}")

    def fit(self, grad_KMN: Tensor, stored: State, fresh: bool, rank: int, right: bool, total: Total = alone) -> State:
        grad_KLS = grad_KMN if right else grad_KMN.mT
        size = grad_KLS.shape[-1]
        generator = torch.Generator().manual_seed(self.seed)
        sample = torch.randn(size, min(rank + self.oversample, size), generator=generator, dtype=grad_KLS.dtype)
        range_KLR = _orthonormal(grad_KLS @ sample.to(grad_KLS.device), total)
        for _ in range(self.power):
            back = torch.linalg.qr(total(grad_KLS.mT @ range_KLR)).Q
            range_KLR = _orthonormal(grad_KLS @ back, total)
        small = total(range_KLR.mT @ grad_KLS)
        chosen = torch.linalg.svd(small, full_matrices=False).Vh[..., :rank, :].mT
        return {"basis": chosen.clone(memory_format=torch.contiguous_format)}


def _orthonormal(columns_KLR: Tensor, total: Total) -> Tensor:
    """Orthonormal columns of the same span; where rows are elsewhere, this process's rows of them.

    Those come from the Gram matrix, the one thing about the columns that can be summed. Squaring doubles the digits
    that a small direction needs, hence float64; a direction lost even there is left out as zeros.
    """
    if total is alone:
        return torch.linalg.qr(columns_KLR).Q
    wide = columns_KLR.double()
    values, vectors = torch.linalg.eigh(total(wide.mT @ wide))
    floor = values[..., -1:] * values.shape[-1] * torch.finfo(values.dtype).eps
    scale = torch.where(values > floor, values, torch.inf).rsqrt()
    return (wide @ (vectors * scale.unsqueeze(-2))).to(columns_KLR.dtype)
