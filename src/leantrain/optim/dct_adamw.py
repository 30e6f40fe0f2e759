"""AdamW in columns of the discrete cosine transform (DCT-AdamW; Modoranu et al. 2025, arXiv:2505.17967).

Saves: optimizer state. 2 R L numbers and R indices of four bytes per L x S matrix instead of AdamW's 2 L S, and one
S x S cosine matrix per size S and device for the whole model. Costs: 4 M N R operations per step and matrix, and per
refresh a fast Fourier transform of the gradient's rows, cheap enough for a new choice at every step.

    every `refresh` steps   P = the R columns of the cosine matrix C in which G C is largest    (see `DCT`)
                            m, v follow: a column that stays keeps its averages, a new one starts at zero
    every step              R = G P                       (G M x N with M >= N; otherwise P^T G)
                            N = m^ / (sqrt(v^) + eps)     m, v: Adam's averages of R and R * R
                            W = W - lr (decay W + scale N P^T)

Matrices with no more than `rank` rows or columns, and vectors, take plain AdamW's step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from leantrain.optim.adam import Adam
from leantrain.optim.bases import DCT, Basis, Norm
from leantrain.optim.low_rank import OnRefresh, Side
from leantrain.optim.low_rank_chain import FULL_PRECISION_BELOW, Bits, LowRankChain
from leantrain.optim.rules import Rule


class DCTAdamW(LowRankChain):
    """AdamW that keeps its moments in `rank` columns of the cosine matrix, chosen anew every `refresh` steps.

    Every option may be set per parameter group, as with `GaLoreAdamW`.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: step size, >= 0; with `scale` 1 of the size of AdamW's.
        betas: decay of the averages of g and of g * g, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled decay, >= 0; each step multiplies a weight by `1 - lr * weight_decay`.
        rank: columns kept per matrix, >= 1; None is plain AdamW.
        refresh: steps between two choices of a matrix's columns, >= 1.
        scale: factor on projected updates, > 0.
        norm: what makes a column large: "l1" (the paper's) or "l2" (the least is projected away).
        on_refresh: moments at a new choice: "rotate" (the paper's) lets them follow their columns, "keep" and "reset"
            are GaLore's.
        stagger: spread the matrices' refreshes evenly over `refresh` steps.
        side: "std" projects a matrix's shorter side, "reverse_std" the longer, "left" rows, "right" columns.
        state_bits: 8 or 4 store the moments block-wise in so many bits; 32 keeps the parameters' own precision.
        full_precision_below: moments of fewer numbers than this keep their precision whatever `state_bits` is.
        settled: share of columns that stay, in (0, 1], from which a matrix is refreshed less and less often; None
            refreshes all alike.

    Raises:
        UsageError: a value outside its range, or a state of other settings. It is a ValueError.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(64, 32)
        >>> optimizer = DCTAdamW(layer.parameters(), lr=1e-3, rank=8)
        >>> layer(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[layer.weight]["columns"].dtype, optimizer.state[layer.weight]["exp_avg"].shape
        (torch.int32, torch.Size([8, 64]))
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
        refresh: int = 1,
        scale: float = 1.0,
        norm: Norm = "l1",
        on_refresh: OnRefresh = "rotate",
        stagger: bool = True,
        side: Side = "std",
        state_bits: Bits = 32,
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
            norm=norm,
            on_refresh=on_refresh,
            stagger=stagger,
            side=side,
            state_bits=state_bits,
            basis_bits=32,
            full_precision_below=full_precision_below,
            settled=settled,
        )

    def inner_rule(self, group: dict[str, Any]) -> Rule:
        return Adam(tuple(group["betas"]), group["eps"])

    def basis_for(self, group: dict[str, Any]) -> Basis:
        return DCT(group["norm"])
