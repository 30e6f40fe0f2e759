"""How many bits numbers carry: the entropy of their histogram.

    H = - sum_i p_i log2 p_i          p_i: the part of the numbers that has value i          bits a number

No code that treats numbers alike, each by its value, needs fewer bits on average, and a range coder needs hardly more.
A histogram of floats says little; they are put on a grid first, and the grid has to be named beside the entropy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_WIDEST = 2**22
"""Bins of a histogram that is counted rather than sorted."""


def bits_per_symbol(counts: npt.NDArray[np.int64]) -> float:
    """Entropy in bits of a histogram [bins]; 0.0 of an empty one."""
    total = int(counts.sum())
    some = counts[counts > 0].astype(np.float64)
    return max(0.0, float(np.log2(total) - (some * np.log2(some)).sum() / total)) if total else 0.0


def integer_entropy(integers: Tensor) -> float:
    """Entropy in bits a number of an integer tensor of any shape; 0.0 of an empty one."""
    flat = integers.reshape(-1)
    if len(flat) == 0:
        return 0.0
    low, high = (int(end) for end in flat.aminmax())
    counts = torch.bincount(flat - low) if high - low < _WIDEST else flat.unique(return_counts=True)[1]
    return bits_per_symbol(counts.cpu().numpy())


def range_entropy(tensor: Tensor, bits: int = 8) -> float:
    """Entropy in bits a number of a float tensor on a grid of 2^bits values from its smallest to its largest."""
    if tensor.numel() == 0:
        return 0.0
    numbers = tensor.detach().float()
    low, high = numbers.aminmax()
    step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    return integer_entropy(((numbers - low) / step).round_().to(torch.int64))
