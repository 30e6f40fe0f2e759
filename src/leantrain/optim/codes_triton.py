"""The codes of `leantrain.optim.codes` and AdamW's step on them as Triton kernels: one pass over the memory on a GPU.

Used for CUDA tensors where Triton is installed and a block's size is a power of two. Codes are the same as those of the
code book's own operations, whose tables the kernels read; the tests compare them in Triton's interpreter.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,import-not-found,import-untyped,unused-ignore"

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from leantrain.optim.codes import Codebook

_NUMBERS = 2048
"""Numbers that one program works on: as many blocks as this makes."""

_LARGEST_SUBNORMAL = tl.constexpr(2.0**-126 - 2.0**-149)


def read(book: Codebook, codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """As `Codebook.read`, into `out`."""
    shape = _launch(out.numel(), len(scale))
    _read[shape.pop("grid")](codes, scale, book.values, out, len(scale), BITS=book.bits, **shape)


def write(book: Codebook, values: Tensor, codes: Tensor, scale: Tensor) -> None:
    """As `Codebook.write`, but the values stay as they are."""
    shape = _launch(values.numel(), len(scale))
    _write[shape.pop("grid")](values, codes, scale, book.cells, len(scale), BITS=book.bits, SIGNED=book.signed, **shape)


def adamw(
    weights: Tensor,
    grad: Tensor,
    mean: tuple[Codebook, Tensor, Tensor],
    square: tuple[Codebook, Tensor, Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of the weights [n] in place, with their moments' code books, codes and scales. `step` counts from 1."""
    (mean_book, mean_codes, mean_scale), (square_book, square_codes, square_scale) = mean, square
    blocks = len(mean_scale)
    shape = _launch(mean_codes.numel() * 8 // mean_book.bits, blocks)
    _adamw[shape.pop("grid")](
        weights, grad, mean_codes, mean_scale, square_codes, square_scale,
        mean_book.values, mean_book.cells, square_book.values, square_book.cells,
        weights.numel(), blocks,
        1 - lr * weight_decay, lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5,
        1 - betas[0], betas[1], 1 - betas[1], eps,
        BITS=mean_book.bits, **shape,
    )  # fmt: skip


def _launch(numel: int, blocks: int) -> dict:  # type: ignore[type-arg]
    block = numel // blocks
    rows = max(_NUMBERS // block, 1)
    return {"grid": (triton.cdiv(blocks, rows),), "BLOCK": block, "ROWS": rows}


@triton.jit
def _places(blocks, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The blocks [ROWS] of this program and the numbers [ROWS, BLOCK] in them; 64 bits, for there may be many."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _decode(codes, scale, values, row, place, blocks, BITS: tl.constexpr):
    there = (row < blocks)[:, None]
    if BITS == 8:
        code = tl.load(codes + place, mask=there, other=0).to(tl.int32)
    else:
        byte = tl.load(codes + place // 2, mask=there, other=0).to(tl.int32)
        code = (byte >> ((1 - place % 2) * 4).to(tl.int32)) & 15
    return tl.load(values + code) * tl.load(scale + row, mask=row < blocks, other=0.0)[:, None]


@triton.jit
def _encode(
    x, codes, scale, cells, row, place, blocks,
    BITS: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    largest = tl.max(tl.abs(x) if SIGNED else x, axis=1)
    largest = tl.where(largest <= _LARGEST_SUBNORMAL, 0.0, largest)
    largest = tl.where(tl.max((x != x).to(tl.int32), axis=1) > 0, float("nan"), largest)  # which a maximum may lose
    bits = (x * tl.div_rn(1.0, largest)[:, None]).to(tl.int32, bitcast=True)
    bits = bits ^ (bits >> 31) if SIGNED else bits & 0x7FFFFFFF
    code = (tl.load(cells + (bits >> 16)) + bits) >> 16
    tl.store(scale + row, largest, mask=row < blocks)
    if BITS == 8:
        tl.store(codes + place, code.to(tl.uint8), mask=(row < blocks)[:, None])
    else:
        first, second = tl.split(tl.reshape(code, (ROWS, BLOCK // 2, 2)))
        byte = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        tl.store(codes + byte, ((first << 4) | second).to(tl.uint8), mask=(row < blocks)[:, None])


@triton.jit
def _read(codes, scale, values, out, blocks, BITS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row, place = _places(blocks, BLOCK, ROWS)
    tl.store(out + place, _decode(codes, scale, values, row, place, blocks, BITS), mask=(row < blocks)[:, None])


@triton.jit
def _write(
    values, codes, scale, cells, blocks,
    BITS: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, place = _places(blocks, BLOCK, ROWS)
    x = tl.load(values + place, mask=(row < blocks)[:, None], other=0.0)
    _encode(x, codes, scale, cells, row, place, blocks, BITS, SIGNED, BLOCK, ROWS)


@triton.jit
def _adamw(
    weights, grad, mean_codes, mean_scale, square_codes, square_scale,
    mean_values, mean_cells, square_values, square_cells,
    numel, blocks, keep, rate, root_of_correction, share1, beta2, share2, eps,
    BITS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, place = _places(blocks, BLOCK, ROWS)
    there = place < numel
    g = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
    w = tl.load(weights + place, mask=there, other=0.0).to(tl.float32)
    m = _decode(mean_codes, mean_scale, mean_values, row, place, blocks, BITS)
    v = _decode(square_codes, square_scale, square_values, row, place, blocks, BITS)
    m = tl.where(there, m + (g - m) * share1, 0.0)  # what fills the last block must not set its scale
    v = tl.where(there, v * beta2 + g * g * share2, 0.0)
    w = w * keep - rate * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root_of_correction) + eps)
    tl.store(weights + place, w.to(weights.dtype.element_ty), mask=there)
    _encode(m, mean_codes, mean_scale, mean_cells, row, place, blocks, BITS, True, BLOCK, ROWS)
    _encode(v, square_codes, square_scale, square_cells, row, place, blocks, BITS, False, BLOCK, ROWS)
