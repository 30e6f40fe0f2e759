"""Real numbers as small integers: groups of numbers that share a grid of 2^bits evenly spaced values.

    value = low + scale * code          code = 0 .. 2^bits - 1          low, scale: float32, one each per group

The grid runs from the group's smallest to its largest number, wherever these lie: an integer zero point, clamped to the
codes as in common formats, would destroy a group whose numbers are all far from zero. The worst error is scale / 2 when
rounding to nearest, below scale when rounding stochastically, whose error is zero on average.

Shapes: G groups of `group` numbers each, in the order of memory; the last may be shorter. Codes have the shape of the
numbers, one byte each (`pack` puts 4-bit codes two to a byte).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from leantrain.errors import UsageError

_TINIEST = torch.finfo(torch.float32).tiny


class Integers(NamedTuple):
    """Codes and the grids they count on."""

    codes: Tensor
    """uint8, of the shape of the numbers."""
    scale: Tensor
    """float32 [G], >= 0. Zero where all numbers of a group are equal."""
    low: Tensor
    """float32 [G]."""


def encode(values: Tensor, bits: int = 8, group: int = 256, generator: torch.Generator | None = None) -> Integers:
    """The numbers on grids of their own, rounded to nearest, or stochastically with what `generator` draws.

    Raises:
        UsageError: bits is not in [1, 8] or group is below 1.
    """
    if not 1 <= bits <= 8:
        raise UsageError(f"bits must be in [1, 8], got bits={bits}")
    if group < 1:
        raise UsageError(f"group must be >= 1, got group={group}")
    grouped = in_groups(values.float(), group)
    scale, low = grids(grouped, bits)
    return Integers(on_grids(grouped, scale, low, bits, values.shape, generator), scale, low)


def decode(stored: Integers, group: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers, of the codes' shape."""
    codes, scale, low = stored
    if codes.numel() % group == 0:  # nothing to pad and to cut off: one pass less
        wide = codes.reshape(-1, group).to(torch.float32)
        return wide.mul_(scale[:, None]).add_(low[:, None]).view(codes.shape).to(dtype)
    grouped = in_groups(codes, group).to(torch.float32).mul_(scale[:, None]).add_(low[:, None])
    return grouped.flatten()[: codes.numel()].view(codes.shape).to(dtype)


def grids(grouped: Tensor, bits: int = 8, margin: float = 0.0) -> tuple[Tensor, Tensor]:
    """Scale and low [G] of the grids that just hold the numbers [G, group], widened by `margin` of their range on
    both sides."""
    low, high = grouped.aminmax(dim=1)
    spread = high - low
    return spread * ((1 + 2 * margin) / (2**bits - 1)), low - margin * spread


def on_grids(
    grouped: Tensor, scale: Tensor, low: Tensor, bits: int, shape: torch.Size, generator: torch.Generator | None = None
) -> Tensor:
    """Codes, uint8 of `shape`, of the numbers [G, group]; what lies outside its grid takes the grid's nearest end."""
    steps = (grouped - low[:, None]).div_(scale.clamp_min(_TINIEST)[:, None])
    if generator is None:
        steps.round_()
    else:
        noise = torch.rand(steps.shape, generator=generator, device=steps.device)
        steps.add_(noise).floor_()
    filled = steps.clamp_(0, 2**bits - 1).flatten()[: shape.numel()]
    return filled.to(torch.uint8).view(shape)


def in_groups(values: Tensor, group: int) -> Tensor:
    """The numbers as [G, group]. The last group is filled up with its last number, which does not change its range."""
    flat = values.reshape(-1)
    missing = -len(flat) % group
    if missing:
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    return flat.view(-1, group)


def pack(codes: Tensor) -> Tensor:
    """4-bit codes of any shape, two to a byte: uint8 [ceil(numel / 2)], the first of a pair in the low half."""
    flat = codes.reshape(-1)
    if len(flat) % 2:
        flat = pad(flat, (0, 1))
    return flat[::2] | (flat[1::2] << 4)


def unpack(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The codes of `shape` that `pack` was given."""
    both = torch.stack([packed & 15, packed >> 4], dim=-1).flatten()
    return both[: torch.Size(shape).numel()].view(shape)
