"""AdamW with its two averages in 8 or 4 bits (Dettmers et al., ICLR 2022; Li, Chen & Zhu, NeurIPS 2023).

Saves: optimizer state. 2 + 8 / 256 bytes per weight in 8 bits and 1 + 8 / 128 in 4, instead of AdamW's 8. Costs: the
time of reading and writing codes at every step, and the noise of rounding.

    m, v = decode(state)                                           per block of 256 (128) numbers
    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g * g             in float32, never for more than a chunk at a time
    w = w - lr (decay w + m^ / (sqrt(v^) + eps))                   ^ = corrected for the zero start
    state = encode(m, v)

See `leantrain.optim.codes` for the codes and `leantrain.optim.low_bit` for the same around other rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from leantrain.optim.adam import Adam
from leantrain.optim.chain import Chain
from leantrain.optim.codes import Bits
from leantrain.optim.low_bit import BLOCK, LowBit
from leantrain.optim.rules import Rule


class AdamW8bit(Chain):
    """AdamW with its moments in 8 bits, and no weight decay unless asked for.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: step size, >= 0; a number or a tensor of one element.
        betas: decay of the averages of g and of g * g, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled decay, >= 0; each step multiplies a weight by `1 - lr * weight_decay`.
        block: numbers of a moment that share a scale, a multiple of 8. None: 256 in 8 bits, 128 in 4.
        full_precision_below: parameters of fewer numbers keep their moments in the parameter's own precision, the rule
            of bitsandbytes and torchao. Norms and biases are small and sensitive. 0 stores all moments in few bits.
        stochastic_rounding: round bfloat16 weights at random, so that steps too small for their precision count on
            average. Slower. Nothing changes for float32 weights; float16 ones are refused.

    Raises:
        UsageError: a value outside its range, or a state of other settings. It is a ValueError.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(64, 64)
        >>> optimizer = AdamW8bit(layer.parameters(), lr=1e-3, weight_decay=0.1)
        >>> layer(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[layer.weight]["exp_avg"].dtype, optimizer.state[layer.bias]["exp_avg"].dtype
        (torch.uint8, torch.float32)
    """

    bits: ClassVar[Bits] = 8

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        block: int | None = None,
        full_precision_below: int = 4096,
        stochastic_rounding: bool = False,
    ) -> None:
        options: dict[str, Any] = {
            "betas": betas,
            "eps": eps,
            "block": block,
            "full_precision_below": full_precision_below,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, lr=lr, weight_decay=weight_decay, **options)

    def rule_for(self, param: Tensor, group: dict[str, Any]) -> Rule:
        adam = Adam(tuple(group["betas"]), group["eps"])
        return LowBit(adam, self.bits, group["block"], group["full_precision_below"], group["stochastic_rounding"])

    @classmethod
    def state_bytes(
        cls, shape: tuple[int, ...], *, block: int | None = None, full_precision_below: int = 4096, itemsize: int = 4
    ) -> int:
        """Bytes of state that a parameter of this shape takes, scales included and counters left out.

        `itemsize` is that of the parameter's own numbers, which matters below `full_precision_below`.
        """
        numel = math.prod(shape)
        if numel < full_precision_below:
            return 2 * numel * itemsize
        return LowBit.state_bytes(numel, cls.bits, BLOCK[cls.bits] if block is None else block)


class AdamW4bit(AdamW8bit):
    """AdamW with its moments in 4 bits: `AdamW8bit` with half the state and more noise. The arguments are the same.

    Examples:
        >>> import torch
        >>> AdamW8bit.state_bytes((1024, 1024)) / 2**20, AdamW4bit.state_bytes((1024, 1024)) / 2**20
        (2.03125, 1.0625)
    """

    bits: ClassVar[Bits] = 4
