"""Numbers stored in 8 or 4 bits, block by block: how optimizers keep their moments.

A *block* of numbers x shares one scale, and each number is the code of the nearest value of a fixed map Q in [-1, 1]:

    scale = max |x|          code = argmin_i |x / scale - Q_i|          x ~ Q[code] * scale

Q is dynamic: seven decades with 1, 2, 4, ... values each, so that small numbers keep a relative error, too (Dettmers et
al. 2022, ICLR, "8-bit Optimizers via Block-wise Quantization", section 1.3). Of two equally near values the upper is
taken. The maps of second moments have no zero: steps are divided by their root, and one stored as zero would leave
nothing but eps. In 4 bits theirs is linear (Li, Chen & Zhu 2023, NeurIPS, "Memory Efficient Optimizers with 4-bit
States"); in 8 bits 1e-7 takes zero's place, which differs from bitsandbytes.
Evenly spaced values between a group's own extremes are in `leantrain.integers`.

Speed. The upper 16 bits of a float32 name a cell so narrow that at most one boundary between two codes lies in it. A
table has, for every cell, the int32 that makes `(bits + table[cell]) >> 16` the code: the sum carries into the upper
half exactly from the boundary on. That is one look-up and a few integer operations per number, nearest to the last bit.

A block that holds NaN or an infinity decodes to NaN and infinities, all of it; other blocks are not touched. A block of
nothing but subnormal numbers (below 1.2e-38) is stored as zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from leantrain.errors import UsageError

Bits = Literal[8, 4]

_CHUNK = 1 << 17
"""Numbers that are coded at a time on a CPU: few enough for their intermediate results to stay in its caches, many
enough to outweigh the calls."""

_CHUNK_ELSEWHERE = 1 << 22
_LEAST = 1e-7
"""Of the 8-bit map without a sign: the lower end of its lowest decade."""
_LARGEST_SUBNORMAL = 2.0**-126 - 2.0**-149


def chunk_of(block: int, device: torch.device) -> int:
    """Numbers to code at a time on this device: whole blocks."""
    return max((_CHUNK if device.type == "cpu" else _CHUNK_ELSEWHERE) // block, 1) * block


def dynamic_map(bits: Bits = 8, *, signed: bool = True) -> Tensor:
    """The values of the codes, float32 [2 ** bits], ascending.

    Zero, one, and in each decade twice as many values as in the one below, in the middles of equal parts of it: 64 (or
    128, without a sign) between 0.1 and 1 in 8 bits. The same numbers as bitsandbytes' and torchao's, but for 1e-7 in
    the place of zero in 8 bits without a sign; in 4 bits without a sign they are torchao's 1/16, 2/16, ..., 1.
    """
    if bits == 4 and not signed:
        return torch.arange(1, 17, dtype=torch.float32) / 16
    decades = bits - 1
    values = [0.0 if signed else _LEAST, 1.0]
    for decade in range(decades):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float32)
        middles = (10 ** (decade + 1 - decades) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + ([-value for value in middles] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


@contextmanager
def large_chunks() -> Iterator[None]:
    """In the block, a CPU codes as many numbers at a time as other devices do: slower, in fewer operations."""
    global _CHUNK
    usual, _CHUNK = _CHUNK, _CHUNK_ELSEWHERE
    try:
        yield
    finally:
        _CHUNK = usual


class Codebook:
    """A map with the tables that read and write it. Made once per device by `codebook`.

    Codes are uint8, one per number in 8 bits; in 4 bits two per byte, the first in the upper half.
    """

    def __init__(self, bits: Bits, signed: bool, device: torch.device) -> None:
        self.bits, self.signed = bits, signed
        values = dynamic_map(bits, signed=signed)
        self.values = values.to(device)
        self.cells = _cells(values).to(device)
        self.pairs = _pairs(values, bits).to(device)
        self._sixteen, self._sign = torch.tensor([16, 31], dtype=torch.int32, device=device)
        self.zero = int(values.abs().argmin()) * (1 if bits == 8 else 17)
        """The byte of numbers that are zero, in a block whose scale is zero, too."""

    def empty_state(self, numel: int, block: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of `numel` zeros, on the device of `like` (which may be the meta device)."""
        blocks = -(-numel // block)
        codes = like.new_full((blocks * block * self.bits // 8,), self.zero, dtype=torch.uint8)
        return codes, like.new_zeros(blocks, dtype=torch.float32)

    def encode(self, values: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Codes [..., bytes] and scales [..., blocks] of values [..., n].

        The last block is filled up with zeros, so n may be anything. Without a sign, what is below zero counts as zero.
        """
        codes, scale = self.empty_state(values.shape[-1], block, values)
        codes = codes.expand(*values.shape[:-1], -1).contiguous()
        scale = scale.expand(*values.shape[:-1], -1).contiguous()
        self.encode_into(values, codes, scale)
        return codes, scale

    def encode_into(self, values: Tensor, codes: Tensor, scale: Tensor) -> None:
        """`encode` into codes and scales that are there, and contiguous."""
        if not values.numel():
            return
        if missing := codes.shape[-1] * 8 // self.bits - values.shape[-1]:
            values = pad(values, (0, missing))
        block = self._block(codes, scale)
        room = Room.empty(min(values.numel(), chunk_of(block, values.device)), block, values.device)
        for some, its_codes, its_scale in self._chunks(values, codes, scale):
            room = room.first(some.numel())
            room.values.copy_(some)
            if not self.signed:
                torch.threshold_(room.values, 0.0, 0.0)
            self.write(room, its_codes, its_scale)

    def decode(self, codes: Tensor, scale: Tensor, numel: int) -> Tensor:
        """The first `numel` values [..., numel], float32, of codes [..., bytes] and scales [..., blocks]."""
        values = torch.empty(*codes.shape[:-1], codes.shape[-1] * 8 // self.bits, device=codes.device)
        if not numel:
            return values
        block = self._block(codes, scale)
        room = Room.empty(min(values.numel(), chunk_of(block, values.device)), block, values.device)
        for some, its_codes, its_scale in self._chunks(values, codes, scale):
            room = room.first(some.numel())
            self.read(its_codes, its_scale, room)
            some.copy_(room.values)
        return values[..., :numel]

    def read(self, codes: Tensor, scale: Tensor, room: Room) -> None:
        """Whole blocks: room.values [n] = values[codes] * scale, for codes [bytes] and scales [blocks, 1]."""
        if room.kernels:
            room.kernels.read(self, codes, scale, room.values)
            return
        # Two numbers at a look-up: a byte of two codes, or two bytes.
        room.half.copy_(codes.view(torch.uint16) if self.bits == 8 else codes)
        torch.index_select(self.pairs, 0, room.half, out=room.doubles)
        room.blocks.mul_(scale)

    def write(self, room: Room, codes: Tensor, scale: Tensor) -> None:
        """Whole blocks: the codes [bytes] and scales [blocks, 1] of room.values [n], which are used up. They must be
        >= 0 where the map has no signs."""
        if room.kernels:
            room.kernels.write(self, room.values, codes, scale)
            return
        if self.signed:
            torch.abs(room.blocks, out=room.magnitudes)
            torch.amax(room.magnitudes, -1, True, out=scale)
        else:
            torch.amax(room.blocks, -1, True, out=scale)
        # What is smaller has no finite reciprocal. With a zero scale 0 * inf is NaN, which has a cell as well.
        torch.threshold_(scale, _LARGEST_SUBNORMAL, 0.0)
        room.blocks.mul_(scale.reciprocal())
        bits, index, cell = room.bits, room.index, room.cell
        if self.signed:
            bits.bitwise_xor_(torch.bitwise_right_shift(bits, self._sign, out=cell))  # ascending with the number
        else:
            room.values.abs_()  # NaN may have a sign
        torch.bitwise_right_shift(bits, self._sixteen, out=index)
        torch.index_select(self.cells, 0, index, out=cell)
        cell.add_(bits).bitwise_right_shift_(self._sixteen)
        if self.bits == 8:
            codes.copy_(cell)
        else:
            two = cell.view(torch.int64)  # the first code in its lower half
            both = torch.bitwise_left_shift(two, 4, out=index.view(torch.int64))
            codes.copy_(both.add_(two.bitwise_right_shift_(32)))

    def _block(self, codes: Tensor, scale: Tensor) -> int:
        return codes.shape[-1] * 8 // self.bits // scale.shape[-1]

    def _chunks(self, values: Tensor, codes: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The same whole blocks of all three, as many as make a chunk."""
        block = self._block(codes, scale)
        chunk = chunk_of(block, values.device)
        return zip(
            values.reshape(-1).split(chunk),
            codes.reshape(-1).split(chunk * self.bits // 8),
            scale.reshape(-1, 1).split(chunk // block),
            strict=True,
        )


class Room:
    """A chunk's numbers in float32, whole blocks of them, and the memory they are coded in: two integers for each.

    Made once and used for chunk after chunk; it holds the views that coding needs, for making them takes time.
    """

    def __init__(self, values: Tensor, integers: Tensor, block: int) -> None:
        self._integers, self._block = integers, block
        self.values, self.blocks = values, values.view(-1, block)
        self.doubles, self.bits = values.view(torch.float64), values.view(torch.int32)
        self.index, self.cell = integers
        self.half = self.index[: len(values) // 2]
        self.magnitudes = self.cell.view(torch.float32).view(-1, block)
        self.kernels = kernels_for(values.device, block)

    @classmethod
    def empty(cls, numel: int, block: int, device: torch.device) -> Room:
        """Room for `numel` numbers."""
        return cls(torch.empty(numel, device=device), torch.empty(2, numel, dtype=torch.int32, device=device), block)

    def another(self) -> Room:
        """Room for as many other numbers. They are coded in the same memory, one after the other."""
        return Room(torch.empty_like(self.values), self._integers, self._block)

    def first(self, numel: int) -> Room:
        """Room for so many numbers at the beginning of this one."""
        if numel == self.values.numel():
            return self
        return Room(self.values[:numel], self._integers[:, :numel], self._block)


@lru_cache
def codebook(bits: Bits, signed: bool, device: torch.device) -> Codebook:
    """The code book of so many bits, with its tables on `device`.

    Raises:
        UsageError: bits is neither 8 nor 4.
    """
    check_bits(bits)
    return Codebook(bits, signed, device)


@lru_cache
def kernels_for(device: torch.device, block: int) -> Any:
    """The module `leantrain.optim.codes_triton` where it applies: CUDA, blocks of a power of two, Triton installed."""
    if device.type != "cuda" or block & (block - 1):
        return None
    try:
        from leantrain.optim import codes_triton
    except ImportError:
        return None
    return codes_triton


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """bfloat16 numbers whose expected value is `values` (float32): each is one of its two neighbours, drawn.

    What a number is above the lower neighbour, as a share of their distance, is its chance to become the upper one.
    """
    # 16 random bits are added below the 16 that are kept; four times 16 are drawn at once.
    draws = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=generator.device)
    draws.random_(-(2**63), None, generator=generator)
    noise = draws.view(torch.uint16)[: values.numel()].to(values.device, torch.int32).view(values.shape)
    rounded = noise.add_(values.view(torch.int32)).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))


def check_bits(bits: int) -> None:
    """Raise UsageError unless `bits` is 8 or 4."""
    if bits not in get_args(Bits):
        raise UsageError(f"bits must be 8 or 4, got bits={bits!r}")


def check_block(name: str, block: int) -> None:
    """Raise UsageError unless `block`, called `name` by the user, is a positive multiple of 8."""
    if not isinstance(block, int) or block < 8 or block % 8:
        raise UsageError(f"{name} must be a multiple of 8, >= 8, got {name}={block!r}")


def _cells(values: Tensor) -> Tensor:
    """For the upper half of every float32, the integer that makes its sum with a number's bits the code << 16.

    Bits are read in ascending order: those of negative numbers are inverted (all but the sign are then ascending, and
    they follow after the positive ones). Such an order has 2^15 cells.
    """
    wide = values.double()
    middles = (wide[1:] + wide[:-1]) / 2
    boundary = middles.float()  # the first float32 that takes the upper code
    boundary = torch.where(boundary.double() < middles, boundary.nextafter(torch.tensor(torch.inf)), boundary)
    places = _ascending(boundary.view(torch.int32)).long()

    starts = torch.arange(1 << 15) << 16
    first = _ascending(starts.to(torch.int32), invert=starts >= 1 << 30).view(torch.float32)
    # Infinity and NaN have cells as well; what stands there is never decoded to something finite.
    code = torch.searchsorted(boundary, first.nan_to_num(0.0, 0.0, 0.0), right=True)
    carry_from = torch.full((1 << 15,), 1 << 16)
    inside = (places & 0xFFFF) > 0  # a boundary at a cell's start is in its code already
    carry_from[places[inside] >> 16] = places[inside] & 0xFFFF
    return ((code << 16) + (1 << 16) - carry_from - starts).to(torch.int32)


def _ascending(bits: Tensor, invert: Tensor | None = None) -> Tensor:
    return torch.where(bits < 0 if invert is None else invert, ~bits, bits)


def _pairs(values: Tensor, bits: Bits) -> Tensor:
    """Two values for every two codes, joined as one float64 to be moved in one piece."""
    if bits == 8:
        # Viewed as bytes in the order in which this machine keeps them.
        both = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.uint8).view(-1, 2)
    else:
        both = torch.arange(256)[:, None] >> torch.tensor([4, 0]) & 15
    return values[both.long()].contiguous().view(torch.float64).view(-1)
