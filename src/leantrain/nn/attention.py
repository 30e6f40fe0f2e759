"""Multi-head self-attention, with or without rotary positions, causal or not.

Queries, keys and values have a matrix each, not one fused matrix: methods that work on a matrix at a time,
such as low-rank gradients, then see the three as the separate things they are.

Shapes: B examples, T positions, C channels, H heads, D = C / H channels per head.
Source: Vaswani et al. 2017, arXiv 1706.03762; rotary positions: Su et al. 2021, arXiv 2104.09864.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotary = tuple[Tensor, Tensor]
"""The cosines and signed sines that `rotate` multiplies with, each [T, D]."""


class Attention(nn.Module):
    """Self-attention over [B, T, C].

    Args:
        hidden: Channels C.
        heads: Heads H; divides `hidden`.
        causal: Whether position t sees only positions <= t.
        bias: Whether the four projections have a bias.
    """

    def __init__(self, hidden: int, heads: int, *, causal: bool, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.q_proj = nn.Linear(hidden, hidden, bias=bias)
        self.k_proj = nn.Linear(hidden, hidden, bias=bias)
        self.v_proj = nn.Linear(hidden, hidden, bias=bias)
        self.o_proj = nn.Linear(hidden, hidden, bias=bias)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, T, D], a view
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def rotary_table(
    length: int, head_dim: int, base: float, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> Rotary:
    """The rotation of every position 0..length-1: pair i turns by position * base^(-2i/D) radians.

    It is computed where it is used rather than kept in a buffer (30 microseconds for 128 positions), so there
    is nothing that `to_empty` leaves unset, that `.to(bfloat16)` rounds, or that a checkpoint carries.
    """
    pairs = torch.arange(0, head_dim, 2, device=device, dtype=dtype)
    angles = torch.outer(torch.arange(length, device=device, dtype=dtype), 1.0 / base ** (pairs / head_dim))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of [B, H, T, D] by its position's angle, in the table's precision.

    The pairs are those of Hugging Face's LLaMA weights (Meta's original files pair x[2i] with x[2i + 1]).
    """
    cos, signed_sin = rotary
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * signed_sin).to(x.dtype)
