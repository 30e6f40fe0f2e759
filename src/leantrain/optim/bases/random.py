"""Random directions, stored as a counter and made again whenever they are needed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from leantrain.optim.bases.basis import Total, alone
from leantrain.optim.bases.dct import cosines
from leantrain.optim.rules import State


@dataclass(frozen=True)
class Random:
    """r random directions, new ones at every refresh and blind to the gradient.

        orthonormal       P = diag(+-1, S random signs) @ (R random columns of the cosine matrix)
        not orthonormal   P = S x R numbers of N(0, 1 / R)

    Either way E[P P^T] is a multiple of the identity: (R / S) I for the first, which is a projector and has orthonormal
    columns (a subsampled randomised cosine transform; Halko, Martinsson & Tropp, SIAM Review 2011, section 4.6), and I
    for the second, which keeps lengths on average (APOLLO, Zhu et al. 2024).

    Stored is one number, how many draws a matrix has had. Directions are a function of `seed`, that number, S and R:
    matrices of one shape and the same number have the same. A caller who wants them apart starts the numbers apart,
    say at multiples of 2^32. Gaussian directions come from the device's own generator, so that a run continued on
    another kind of device meets other ones until its next refresh; orthonormal ones are the same everywhere.

    Args:
        seed: of all draws. The same on every process.
        orthonormal: which of the two.
    """

    seed: int = 0
    orthonormal: bool = True

    def init(self, size: int, rank: int, like: Tensor) -> State:
        return {"draw": torch.tensor(0)}

    def fit(self, grad_KMN: Tensor, stored: State, fresh: bool, rank: int, right: bool, total: Total = alone) -> State:
        return {"draw": stored["draw"] + 1}

    def directions(self, stored: State, size: int, rank: int, like: Tensor | None = None) -> Tensor:
        like = torch.empty(0) if like is None else like
        return torch.stack([self._draw(int(count), size, rank, like) for count in stored["draw"]])

    def _draw(self, count: int, size: int, rank: int, like: Tensor) -> Tensor:
        # Hashed, because a generator reads 32 bits of its seed only, and neighbouring seeds must not be related.
        name = f"{self.seed} {count} {size} {rank}".encode()
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big")
        if self.orthonormal:
            generator = torch.Generator().manual_seed(seed)
            columns = torch.randperm(size, generator=generator)[:rank]
            signs = torch.randint(2, (size, 1), generator=generator) * 2 - 1
            return cosines(columns.to(like.device), size, like.dtype).mT * signs.to(like)
        generator = torch.Generator(like.device).manual_seed(seed)
        return torch.randn(size, rank, generator=generator, dtype=like.dtype, device=like.device) * rank**-0.5
