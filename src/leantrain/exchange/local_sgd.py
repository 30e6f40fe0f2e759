"""Local SGD and DiLoCo: two settings of `Averaging` that are known under these names.

    LocalSGD    meet every 8 steps, take the mean of the weights
    DiLoCo      meet every 100 steps, take the mean change for the gradient of an outer SGD with Nesterov momentum

Sources: Stich 2019 (Local SGD, ICLR); Douillard et al. 2023 (DiLoCo, arXiv:2311.08105), whose inner optimizer is AdamW.
"""

from __future__ import annotations

from leantrain.exchange.averaging import Averaging
from leantrain.exchange.codecs.codec import Codec


class LocalSGD(Averaging):
    """Every process trains by itself; every `every` steps all take the mean of their weights.

    Args:
        every: optimizer steps from one meeting to the next, >= 1.
        codec: how changes travel: "float32", "float16", "bfloat16", "one-bit", "top-k", "entropy", or any `Codec`.
        residual: whether what a codec loses is kept and sent with the next change.
        timeout_s: seconds that a peer may take, above 0; None: what LEANTRAIN_TIMEOUT_S says, else 600.

    Examples:
        >>> from torch import nn
        >>> exchange = LocalSGD(every=4)
        >>> model = exchange.attach(nn.Linear(4, 2))
        >>> exchange.after_step()  # after every optimizer.step()
    """

    def __init__(
        self, every: int = 8, codec: str | Codec = "float32", residual: bool = True, timeout_s: float | None = None
    ) -> None:
        super().__init__(every=every, codec=codec, residual=residual, timeout_s=timeout_s)


class DiLoCo(Averaging):
    """Every process trains by itself; every `every` steps their mean change is the gradient of an outer step.

    Args:
        every: optimizer steps from one meeting to the next, >= 1. The paper meets every 500.
        codec: how changes travel: "float32", "float16", "bfloat16", "one-bit", "top-k", "entropy", or any `Codec`.
        residual: whether what a codec loses is kept and sent with the next change.
        outer_lr: learning rate of the outer step, above 0.
        outer_momentum: Nesterov momentum of the outer step, in [0, 1).
        timeout_s: seconds that a peer may take, above 0; None: what LEANTRAIN_TIMEOUT_S says, else 600.
    """

    def __init__(
        self,
        every: int = 100,
        codec: str | Codec = "float32",
        residual: bool = True,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        timeout_s: float | None = None,
    ) -> None:
        super().__init__(
            every=every, codec=codec, residual=residual, outer_lr=outer_lr, outer_momentum=outer_momentum,
            timeout_s=timeout_s,
        )  # fmt: skip
