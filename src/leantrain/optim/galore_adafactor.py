"""Adafactor in a low-rank subspace of each gradient matrix (GaLore; Zhao et al., ICML 2024, with Adafactor inside).

Saves: optimizer state. R (L + S) + L + R numbers per L x S matrix (L >= S): an average of updates, the basis, and a
mean for each row and each column of the projected gradient. GaLore with AdamW keeps R (2 L + S), Adafactor with its
average L S + L + S. Without the average (`beta1=None`) Adafactor alone keeps L + S, less than any basis takes.
Costs: GaLore's, 4 M N R operations per step and matrix and a new basis every `refresh` steps.

    every `refresh` steps   P = leading R directions of G on its shorter side
    every step              R = G P                           (G M x N with M >= N; otherwise P^T G)
                            N = Adafactor's update for R      (see `leantrain.optim.adafactor`; clipped before P^T)
                            W = W - lr (decay W + scale N P^T)

Matrices with no more than `rank` rows or columns, and vectors, take plain Adafactor's step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from leantrain.optim.adafactor import Adafactor
from leantrain.optim.bases import BasisName
from leantrain.optim.low_rank import LowRank, OnRefresh, Side, matrix_shape
from leantrain.optim.low_rank_chain import Bits, LowRankChain
from leantrain.optim.rules import Rule


class GaLoreAdafactor(LowRankChain):
    """Adafactor with an average of its updates, in `rank` directions of every matrix.

    Every option may be set per parameter group; `parameter_groups(model, [{"params": "hidden", "rank": 128}])` gives a
    rank to the hidden matrices and leaves the rest to plain Adafactor. Matrices have to be whole: FSDP is refused.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: step size, >= 0; not scaled by the size of the weights and not relative to the step.
        beta1: decay of the average of updates, in [0, 1); None keeps no average, and then plain Adafactor needs less.
        weight_decay: decoupled decay, >= 0; each step multiplies a weight by `1 - lr * weight_decay`.
        decay_exponent: how fast the weight of a new gradient falls, < 0.
        eps: added to every squared gradient, > 0.
        clip_threshold: largest root mean square of an update before it is projected back, > 0.
        rank: directions kept per matrix, >= 1; None is plain Adafactor.
        refresh: steps between two computations of a matrix's basis, >= 1.
        scale: factor on projected updates (GaLore's alpha), > 0.
        basis, on_refresh, stagger, side, basis_bits, settled: as in `GaLoreAdamW`.

    Raises:
        UsageError: a value outside its range, or a state of other settings. It is a ValueError.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(64, 32)
        >>> optimizer = GaLoreAdafactor(layer.parameters(), lr=1e-2, rank=8, refresh=100)
        >>> layer(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[layer.weight]["exp_avg_sq_row"].shape, optimizer.state[layer.weight]["exp_avg_sq_col"].shape
        (torch.Size([8, 1]), torch.Size([1, 64]))
    """

    whole_matrices = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        beta1: float | None = 0.9,
        weight_decay: float = 0.0,
        *,
        decay_exponent: float = -0.8,
        eps: float = 1e-30,
        clip_threshold: float = 1.0,
        rank: int | None = None,
        refresh: int = 200,
        scale: float = 0.25,
        basis: BasisName = "svd",
        on_refresh: OnRefresh = "keep",
        stagger: bool = True,
        side: Side = "std",
        basis_bits: Bits = 32,
        settled: float | None = None,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            decay_exponent=decay_exponent,
            eps=eps,
            clip_threshold=clip_threshold,
            beta1=beta1,
            rank=rank,
            refresh=refresh,
            scale=scale,
            basis=basis,
            on_refresh=on_refresh,
            stagger=stagger,
            side=side,
            state_bits=32,
            full_precision_below=0,
            basis_bits=basis_bits,
            settled=settled,
        )

    def inner_rule(self, group: dict[str, Any]) -> Rule:
        return Adafactor(group["decay_exponent"], group["eps"], group["clip_threshold"], group["beta1"])

    @staticmethod
    def state_numel(shape: tuple[int, ...], rank: int | None, beta1: float | None = 0.9) -> int:
        """Numbers of state that a parameter of this shape takes with the default side and bits and a dense basis;
        counters left out."""
        averages = 0 if beta1 is None else 1
        short, long = sorted(matrix_shape(shape) if len(shape) > 1 else (1, math.prod(shape)))
        if rank is None or not LowRank.fits(shape, rank):
            return averages * short * long + short + long
        return rank * (averages * long + short) + long + rank
