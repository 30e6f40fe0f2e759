"""The operations of `leantrain.exchange.codecs.signs` as Triton kernels: one pass over the memory on a GPU.

Used for CUDA tensors where Triton is installed. Bits are the same as NumPy's; the tests compare them in Triton's
interpreter.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,import-not-found,import-untyped,unused-ignore"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BYTES = 1024
"""Packed bytes that one program works on."""


def pack(flat: Tensor) -> tuple[Tensor, bool]:
    """Packed signs of contiguous numbers [n], and whether there is a NaN (which waits for the device)."""
    packed = torch.empty(triton.cdiv(flat.numel(), 8), dtype=torch.uint8, device=flat.device)
    nan = torch.zeros(1, dtype=torch.int32, device=flat.device)
    _pack[_grid(packed)](flat, packed, nan, flat.numel(), BYTES=_BYTES)
    return packed, bool(nan.item())


def unpack(bits: Tensor, out: Tensor) -> None:
    """+1 and -1 of packed signs [bytes] into `out` [bytes, 8]."""
    _unpack[_grid(bits)](bits, out, bits.numel(), BYTES=_BYTES)


def majority(stack: Tensor, ties: Tensor | None) -> Tensor:
    """As `leantrain.exchange.codecs.signs.majority`, of a contiguous stack."""
    voters, size = stack.shape
    vote = torch.empty(size, dtype=torch.uint8, device=stack.device)
    decide = stack if ties is None else ties.contiguous()
    _majority[_grid(vote)](stack, decide, vote, voters, size, TIES=ties is not None, BYTES=_BYTES)
    return vote


def _grid(packed: Tensor) -> tuple[int]:
    return (triton.cdiv(packed.numel(), _BYTES),)


@triton.jit
def _pack(values, packed, nan, numel, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)  # 64 bits, for there may be many numbers
    place = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    x = tl.load(values + place, mask=place < numel, other=0.0)
    if x.dtype != tl.float64:
        x = x.to(tl.float32)  # costs nothing here, and the interpreter does not compare bfloat16
    positive = (x >= 0) & (place < numel)  # what fills the last byte is 0
    bits = positive.to(tl.int32) << (7 - tl.arange(0, 8))[None, :]
    tl.store(packed + byte, tl.sum(bits, axis=1).to(tl.uint8), mask=byte * 8 < numel)
    if tl.max(tl.max((x != x).to(tl.int32), axis=1), axis=0) > 0:
        tl.store(nan, 1)  # whoever writes last writes the same


@triton.jit
def _unpack(bits, out, size, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    packed = tl.load(bits + byte, mask=byte < size, other=0).to(tl.int32)
    sign = ((packed[:, None] >> (7 - tl.arange(0, 8))[None, :]) & 1) * 2 - 1
    place = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + place, sign.to(tl.float32).to(out.dtype.element_ty), mask=(byte < size)[:, None])


@triton.jit
def _majority(stack, ties, vote, voters, size, TIES: tl.constexpr, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    there = byte < size
    shift = (7 - tl.arange(0, 8))[None, :]
    count = tl.zeros((BYTES, 8), tl.int32)
    place = byte
    for _ in range(voters):
        packed = tl.load(stack + place, mask=there, other=0).to(tl.int32)
        count += (packed[:, None] >> shift) & 1
        place += size
    more, equal = (2 * count > voters).to(tl.int32), (2 * count == voters).to(tl.int32)
    if TIES:
        equal &= (tl.load(ties + byte, mask=there, other=0).to(tl.int32)[:, None] >> shift) & 1
    tl.store(vote + byte, tl.sum((more | equal) << shift, axis=1).to(tl.uint8), mask=there)
