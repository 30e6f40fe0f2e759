"""Signs in one bit each, and the vote on them: 32 times fewer bytes than float32.

    pack        bit_i = 1 if x_i >= 0 else 0        x: [n] -> uint8 [ceil(n / 8)]
    unpack      x_i   = 2 bit_i - 1                 +1 or -1
    majority    bit_i = 1 where more than half of the voters have 1, 0 where fewer; a tie is a choice

The first number is in the most significant bit of the first byte, as `numpy.packbits` has it, and what fills the last
byte is 0. Zero counts as positive. The vote is counted on packed bytes: bit j of the counts of eight numbers is one
byte of plane j, and a voter is added to all eight by exclusive-or and carry.

Packing runs at the speed of memory: on a CPU a comparison and `numpy.packbits`, and back a table of the eight numbers
of every byte; on a GPU the kernels of `leantrain.exchange.codecs.signs_triton` where Triton is installed.

Sources: Bernstein, Wang, Azizzadenesheli & Anandkumar 2018 (ICML) for signs and vote; Bernstein, Zhao,
Azizzadenesheli & Anandkumar 2019 (ICLR) for zero as +1; Karimireddy, Rebjock, Stich & Jaggi 2019 (ICML) for the scale
of `OneBit`.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leantrain.errors import RunError, UsageError
from leantrain.exchange.packet import Kind, PacketError, seal, unseal

_FORMATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def pack_signs(values: Tensor) -> Tensor:
    """The signs of float numbers of any shape, 8 to a byte: uint8 [ceil(n / 8)] on their device.

    Raises:
        UsageError: they are not of a float format of 16 to 64 bits.
        RunError: one of them is NaN, which has no sign.
    """
    if values.dtype not in _FORMATS:
        raise UsageError(f"pack_signs takes float16, bfloat16, float32 or float64, got {values.dtype}")
    flat = values.detach().reshape(-1)
    if not flat.numel():
        return flat.new_empty(0, dtype=torch.uint8)
    packed, has_nan = _pack_here(flat) if flat.device.type == "cpu" else _pack_elsewhere(flat)
    if has_nan:
        raise RunError("there is a NaN among the numbers whose signs are to be packed")
    return packed


def unpack_signs(bits: Tensor, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The first `numel` signs of packed ones, uint8 [ceil(numel / 8)], as +1 and -1 [numel] of `dtype`.

    Raises:
        UsageError: there are not as many bytes as `numel` signs fill.
    """
    check_packed(bits, numel)
    out = torch.empty(bits.numel(), 8, dtype=dtype, device=bits.device)
    if bits.device.type == "cpu":
        # Rows are moved as bytes, so that one call serves every format; "clip" has no bounds to check for a byte.
        rows, table = (tensor.view(torch.uint8).numpy() for tensor in (out, _table(dtype, bits.device)))
        np.take(table, bits.numpy(), axis=0, out=rows, mode="clip")
    elif (kernels := kernels_for(bits.device)) and bits.numel():
        kernels.unpack(bits.contiguous(), out)
    else:
        torch.index_select(_table(dtype, bits.device), 0, bits.int(), out=out)
    return out.view(-1)[:numel]


def majority(stack: Tensor, ties: Tensor | None = None) -> Tensor:
    """The vote of every column of bits of packed signs: uint8 [voters, bytes] -> uint8 [bytes].

    Args:
        stack: packed signs of the same numbers, one row per voter. Bits that fill the last bytes stay 0.
        ties: packed signs [bytes] that decide where exactly half of the voters have +1; None: +1.

    Raises:
        UsageError: there is no voter, or a shape is another.
    """
    if stack.dtype != torch.uint8 or stack.dim() != 2 or not len(stack):
        raise UsageError(
            f"majority takes uint8 [voters, bytes] with at least one voter, got {stack.dtype} {list(stack.shape)}"
        )
    if ties is not None and (ties.dtype != torch.uint8 or ties.shape != stack.shape[1:]):
        raise UsageError(f"ties must be uint8 {list(stack.shape[1:])}, got {ties.dtype} {list(ties.shape)}")
    if (kernels := kernels_for(stack.device)) and stack.numel():
        return kernels.majority(stack.contiguous(), ties)
    planes: list[Tensor] = []  # the bits of the counts, the lowest first
    for voters, carry in enumerate(stack, start=1):
        for j, plane in enumerate(planes):
            planes[j], carry = plane ^ carry, plane & carry
        if voters.bit_length() > len(planes):
            planes.append(carry)
    half = len(stack) // 2
    more, equal = torch.zeros_like(stack[0]), torch.full_like(stack[0], 0xFF)
    for j, plane in reversed(list(enumerate(planes))):
        if half >> j & 1:
            equal &= plane
        else:
            more |= equal & plane
            equal &= ~plane
    if len(stack) % 2:
        return more
    return more | (equal if ties is None else equal & ties)


class OneBit:
    """A codec of one bit a number: sign(x) * mean |x|. Meant for use with a residual, which it cannot do without.

        encode    s = sum |x| / n            4 bytes
                  b = x >= 0                 n / 8 bytes
        decode    s (2 b - 1)

    With the residual e of `leantrain.exchange.averaging`, x = g + e and e <- x - decode(encode(x)), this is EF-signSGD.
    The scale is a lever: unlike a bare vote it does not withstand workers that lie.
    """

    name = "one-bit"

    def encode(self, values: Tensor, reference: float = 1.0) -> Tensor:
        """A sealed packet; `reference` is not needed.

        Raises:
            RunError: a number is not finite.
        """
        numbers = values.detach().reshape(-1).to("cpu", torch.float32)
        scale = numbers.abs().mean().item() if numbers.numel() else 0.0
        if not math.isfinite(scale):
            raise RunError(f"one-bit coding of numbers whose mean magnitude is {scale}")
        head = torch.frombuffer(bytearray(_SCALE.pack(scale)), dtype=torch.uint8)
        return seal(Kind.SIGNS, torch.cat([head, pack_signs(numbers)]), numbers.numel())

    def decode(self, packet: Tensor | bytes) -> Tensor:
        """The numbers, float32 [n].

        Raises:
            PacketError: it is no packet of this codec, or not intact.
        """
        found = unseal(packet, Kind.SIGNS)
        expected = _SCALE.size + packed_bytes(found.numel)
        if found.payload.numel() != expected:
            raise PacketError(
                f"a one-bit packet of {found.numel} numbers has {found.payload.numel()} bytes, {expected} are expected"
            )
        (scale,) = _SCALE.unpack(bytes(found.payload[: _SCALE.size].numpy()))
        if not 0 <= scale < math.inf:
            raise PacketError(f"a one-bit packet has the scale {scale}")
        return unpack_signs(found.payload[_SCALE.size :], found.numel).mul_(scale)


def packed_bytes(numel: int) -> int:
    """Bytes of so many packed signs."""
    return -(-numel // 8)


def check_packed(bits: Tensor, numel: int) -> None:
    """Raise UsageError unless `bits` are `numel` packed signs."""
    if bits.dtype != torch.uint8 or bits.dim() != 1 or numel < 0 or bits.numel() != packed_bytes(numel):
        raise UsageError(f"{numel} packed signs are uint8 [{packed_bytes(numel)}], got {bits.dtype} {list(bits.shape)}")


@lru_cache
def kernels_for(device: torch.device) -> Any:
    """The module `leantrain.exchange.codecs.signs_triton` where it applies: on CUDA, with Triton installed."""
    if device.type != "cuda":
        return None
    try:
        from leantrain.exchange.codecs import signs_triton
    except ImportError:
        return None
    return signs_triton


_SCALE = struct.Struct("<f")


def _pack_here(flat: Tensor) -> tuple[Tensor, bool]:
    """Packed signs [n] of the CPU's memory, and whether there is a NaN."""
    if flat.dtype.itemsize > 2:
        numbers = flat.numpy()
        positive, has_nan = numbers >= 0, bool(np.isnan(numbers.min()))  # a minimum that keeps NaN is the cheapest test
    else:
        # NumPy has no bfloat16 and computes slowly with float16, but their bits are in order: up to 0x8000, which is
        # -0.0, they stand for numbers >= 0, and without the sign, above those of infinity, for NaN.
        bits = flat.view(torch.int16).numpy()
        infinity = torch.tensor(torch.inf, dtype=flat.dtype).view(torch.int16).item()
        positive, has_nan = bits.view(np.uint16) <= 0x8000, bool((bits & 0x7FFF).max() > infinity)
    return torch.from_numpy(np.packbits(positive)), has_nan


def _pack_elsewhere(flat: Tensor) -> tuple[Tensor, bool]:
    """Packed signs [n] on another device, and whether there is a NaN."""
    if kernels := kernels_for(flat.device):
        return kernels.pack(flat)
    return _pack_in_torch(flat), bool(flat.isnan().any())


def _pack_in_torch(flat: Tensor) -> Tensor:
    """As `numpy.packbits`, on any device, and a tenth as fast."""
    bits = torch.zeros(packed_bytes(flat.numel()) * 8, dtype=torch.uint8, device=flat.device)
    bits[: flat.numel()] = flat >= 0
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=flat.device)
    return (bits.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


@lru_cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight signs of every byte, [256, 8]."""
    bits = torch.arange(256)[:, None] >> torch.arange(7, -1, -1) & 1
    return (2 * bits - 1).to(device, dtype)
