"""GaLore with quantised bases and moments, and fewer refreshes (Q-GaLore; Zhang et al. 2024, arXiv 2407.08296).

Saves: nearly all optimizer state. A quarter-rank L x S matrix with L = 4 S keeps about 7 % of AdamW's float32 bytes.
Costs: decoding and encoding at every step, and the noise of four-bit directions.

    bases      4 bits for each number, in groups of 256 with a scale and a zero point of their own
    moments    8 bits for each number, block-wise (Dettmers et al., ICLR 2022)
    refreshes  a matrix whose new bases overlap the old ones by `settled` or more is refreshed half as often, again and
               again; one that is settled no more goes back

The paper stores the weights in 8 bits as well: `leantrain.nn.int8_weights(model)`, before the optimizer is made.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from leantrain.optim.bases import BasisName
from leantrain.optim.galore import GaLoreAdamW
from leantrain.optim.low_rank import OnRefresh, Side
from leantrain.optim.low_rank_chain import FULL_PRECISION_BELOW, Bits


class QGaLoreAdamW(GaLoreAdamW):
    """`GaLoreAdamW` with 4-bit bases, 8-bit moments and refreshes that become rarer as subspaces settle.

    Only the defaults differ; see `GaLoreAdamW` for what the arguments mean. Two things differ from the paper's code on
    purpose. Two 4-bit numbers share a byte. And whether a subspace has settled is told by the overlap of whole bases,
    not by the cosine of their first vectors, whose sign is arbitrary.

    Raises:
        UsageError: a value outside its range, or a state of other settings. It is a ValueError.

    Examples:
        >>> import torch
        >>> from leantrain.optim import state_bytes
        >>> layer = torch.nn.Linear(512, 2048)
        >>> optimizer = QGaLoreAdamW(layer.parameters(), lr=1e-2, rank=128)
        >>> layer(torch.ones(1, 512)).sum().backward()
        >>> optimizer.step()
        >>> state_bytes(optimizer) / (2 * 4 * 512 * 2048) < 0.08
        True
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
        state_bits: Bits = 8,
        basis_bits: Bits = 4,
        full_precision_below: int = FULL_PRECISION_BELOW,
        settled: float | None = 0.4,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
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
