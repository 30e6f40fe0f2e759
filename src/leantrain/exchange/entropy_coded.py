"""Øland and Raj's exchange: processes meet every few steps and send their weights, rounded and entropy-coded.

    changes     d = w_k - r + e_k    ->    whole numbers of steps, about 2 bits a weight        (default)
    weights     d = w_k + e_k        ->    a grid from the smallest to the largest weight       (mode "snapshot")

    all gather; everybody decodes all and takes the mean in rank order; e_k = d - what the others got to know

Saves: about 30 of 32 bits of a weight at a meeting, and all but one meeting in `every` steps. Costs: the agreed weights
and the residual, 4 bytes a weight each, and the coder's time (see `entropy`). Packets cannot be summed on the way: each
process sends its own to all W - 1 others, which for more than 64 / bits processes is more than a ring of float32 sends.

Source: Øland & Raj 2015 (ICASSP) and Øland 2024 (CMU-CS-24-147). The residual is not known to be theirs; without it
coarse steps lose accuracy.
"""

from __future__ import annotations

from typing import Literal

from leantrain.errors import UsageError
from leantrain.exchange.averaging import Averaging
from leantrain.exchange.codecs.entropy import Entropy, Mode
from leantrain.histogram import range_entropy


class EntropyCoded(Averaging):
    """Average entropy-coded changes of the weights, or the weights, every `every` steps.

    Args:
        every: optimizer steps from one meeting to the next, >= 1.
        mode: "rel", "abs", "snapshot" or "lossless", see `leantrain.exchange.codecs.entropy`; None: "rel" for changes
            and "snapshot" for weights.
        step: of "rel", in units of a change's RMS (default 1); of "abs", in units of a tensor's initial standard
            deviation (default 1/64). Larger ones send fewer bits.
        bits: of "snapshot": its grid has 2^bits values, 1 to 16.
        outliers: of "snapshot": this part of the weights may lie beyond either end of its grid.
        residual: whether what rounding loses is kept and sent with the next change.
        send: "changes" since the last meeting, or the "weights" themselves.
        timeout_s: seconds that a peer may take, above 0; None: what LEANTRAIN_TIMEOUT_S says, else 600.

    Raises:
        UsageError: an argument is out of its range, or weights are to be rounded to steps of their RMS.

    Examples:
        >>> from torch import nn
        >>> exchange = EntropyCoded(every=5)
        >>> model = exchange.attach(nn.Linear(4, 2))
        >>> exchange.after_step()  # after every optimizer.step()
    """

    def __init__(
        self,
        every: int = 5,
        mode: Mode | None = None,
        step: float | None = None,
        bits: int = 8,
        outliers: float = 0.0,
        residual: bool = True,
        send: Literal["changes", "weights"] = "changes",
        timeout_s: float | None = None,
    ) -> None:
        if mode is None:
            mode = "snapshot" if send == "weights" else "rel"
        if send == "weights" and mode == "rel":
            raise UsageError(
                "send='weights' with mode='rel' would round weights to multiples of their RMS: "
                "use mode='snapshot', 'abs' or 'lossless', or send='changes'"
            )
        codec = Entropy(mode, step=step, bits=bits, outliers=outliers)
        super().__init__(every=every, codec=codec, residual=residual, send=send, timeout_s=timeout_s)

    def metrics(self) -> dict[str, float]:
        """`bits_per_weight`: what this process said of each weight at the last meeting; `weight_entropy`: bits a weight
        of the agreed weights, each tensor on 256 values from its smallest to its largest weight."""
        weights = sum(tensor.numel() for tensor in self.agreed.values())
        bits = sum(range_entropy(tensor) * tensor.numel() for tensor in self.agreed.values())
        return {**super().metrics(), "weight_entropy": bits / max(1, weights)}
