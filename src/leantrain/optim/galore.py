"""AdamW in a low-rank subspace of each gradient matrix (GaLore; Zhao et al., ICML 2024, Algorithm 2).

Saves: optimizer state. R (2 L + S) numbers per L x S matrix instead of AdamW's 2 L S, that is 29 % at R = S / 4 where
L = 4 S. Costs: 4 M N R operations per step and matrix, and a new basis every `refresh` steps.

    every `refresh` steps   P = leading R directions of G on its shorter side
    every step              R = G P                       (G M x N with M >= N; otherwise P^T G)
                            N = m^ / (sqrt(v^) + eps)     m, v: Adam's averages of R and R * R
                            W = W - lr (decay W + scale N P^T)

Matrices with no more than `rank` rows or columns, and vectors, take plain AdamW's step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from leantrain.optim.adam import Adam
from leantrain.optim.bases import BasisName
from leantrain.optim.low_rank import LowRank, OnRefresh, Side
from leantrain.optim.low_rank_chain import FULL_PRECISION_BELOW, Bits, LowRankChain
from leantrain.optim.rules import Rule


class GaLoreAdamW(LowRankChain):
    """AdamW that keeps its moments in `rank` directions of every matrix.

    Every option may be set per parameter group. The published recipe gives `rank` to the matrices of attention and
    feed-forward layers only and leaves embeddings and the head to plain AdamW:
    `parameter_groups(model, [{"params": "hidden", "rank": 128}])` makes such groups.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: step size, >= 0. Projected matrices move by `lr * scale`, so it is usually several times AdamW's.
        betas: decay of the averages of g and of g * g, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled decay, >= 0; each step multiplies a weight by `1 - lr * weight_decay`.
        rank: directions kept per matrix, >= 1; None is plain AdamW. A matrix with no more rows or columns than that
            takes the plain step, which a warning says once.
        refresh: steps between two computations of a matrix's basis, >= 1.
        scale: factor on projected updates (the paper's alpha), > 0.
        basis: "svd" is the paper's; "subspace" follows the subspace with one power step and a QR, many times cheaper;
            "rsvd" is a randomised SVD; "dct" and "coordinate" choose among fixed directions and store their numbers
            only; "random" and "identity" are controls.
        on_refresh: moments at a new basis: "keep" (the paper's), "rotate" into it, or "reset".
        stagger: spread the matrices' refreshes evenly over `refresh` steps instead of doing all in one. The paper's
            schedule is False.
        side: "std" (the paper's) projects a matrix's shorter side, "reverse_std" the longer, "left" rows, "right"
            columns. Matrices whose rows are sharded over processes (FSDP2) are projected on their columns.
        state_bits: 8 or 4 store the moments block-wise in so many bits; 32 keeps the parameters' own precision.
        basis_bits: 8 or 4 store the bases in so many bits; 32 keeps the parameters' own precision.
        full_precision_below: moments of fewer numbers than this keep their precision whatever `state_bits` is.
        settled: overlap of old and new basis, in (0, 1], from which a matrix is refreshed less and less often;
            None refreshes all alike.

    Raises:
        UsageError: a value outside its range, or a state of other settings. It is a ValueError.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(64, 32)
        >>> optimizer = GaLoreAdamW(layer.parameters(), lr=1e-2, rank=8, refresh=100)
        >>> layer(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[layer.weight]["exp_avg"].shape, optimizer.state[layer.bias]["exp_avg"].shape
        (torch.Size([8, 64]), torch.Size([32]))
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        refresh: int = 200,
        scale: float = 0.25,
        basis: BasisName = "svd",
        on_refresh: OnRefresh = "keep",
        stagger: bool = True,
        side: Side = "std",
        state_bits: Bits = 32,
        basis_bits: Bits = 32,
        full_precision_below: int = FULL_PRECISION_BELOW,
        settled: float | None = None,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            betas=betas,
            eps=eps,
            rank=rank,
            refresh=refresh,
            scale=scale,
            basis=basis,
            on_refresh=on_refresh,
            stagger=stagger,
            side=side,
            state_bits=state_bits,
            basis_bits=basis_bits,
            full_precision_below=full_precision_below,
            settled=settled,
        )

    def inner_rule(self, group: dict[str, Any]) -> Rule:
        return Adam(tuple(group["betas"]), group["eps"])

    @staticmethod
    def state_numel(shape: tuple[int, ...], rank: int | None) -> int:
        """Numbers of state that a parameter of this shape takes with the default side, bits and a dense basis; counters
        left out: R (2 L + S), or two for each of its own."""
        if rank is None or not LowRank.fits(shape, rank):
            return 2 * math.prod(shape)
        short, long = sorted((shape[0], math.prod(shape[1:])))
        return rank * (2 * long + short)
