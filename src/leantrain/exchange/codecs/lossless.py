"""Float tensors in fewer bytes without losing a bit: bytes of the same meaning are coded together.

    x: sign, exponent, mantissa    ->    rotated left by one bit    ->    one plane per byte, each coded by itself

    float32     exponent (8)                        mantissa 22-16 + mantissa 15-8 + mantissa 7-0 and sign
    bfloat16    exponent (8)                        mantissa (7) and sign
    float16     exponent (5) and mantissa 9-7       mantissa 6-0 and sign

Weights of a network have a few dozen different exponents: 2 to 3 bits of entropy in 8. Their mantissas are noise, which
`integer_coder` stores as it is. So about 11 of 16 bits of bfloat16 are left, 27 of 32 of float32: for checkpoints and
broadcasts in which every bit counts. NaN and infinities are bits like others.

Source: Zhang et al. 2025 (DFloat11, arXiv:2504.11651) for entropy-coded exponents of weights.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.exchange.codecs.integer_coder import Bytes, decode_integers, encode_integers
from leantrain.exchange.codecs.symbol_coders import Array
from leantrain.exchange.packet import PacketError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_PLANE = struct.Struct("<Q")


def pack(values: Tensor) -> bytes:
    """The bits of a float tensor on the CPU, coded.

    Raises:
        UsageError: its type is not one of DTYPES.
    """
    if values.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise UsageError(f"lossless coding takes {names}, got {str(values.dtype).removeprefix('torch.')}")
    flat = values.reshape(-1).contiguous()
    if values.element_size() == 4:
        planes = _planes(flat.view(torch.int32).numpy().view("u4"))
    else:
        planes = _planes(flat.view(torch.int16).numpy().view("u2"))
    coded = [encode_integers(plane) for plane in planes]
    pieces = [bytes([DTYPES.index(values.dtype)])]
    for plane in coded:
        pieces += [_PLANE.pack(len(plane)), plane]
    return b"".join(pieces)


def unpack(data: Bytes, n: int) -> Tensor:
    """The tensor [n] that was packed.

    Raises:
        PacketError: the bytes contradict themselves or do not hold `n` numbers.
    """
    if len(data) == 0 or data[0] >= len(DTYPES):
        raise PacketError("losslessly coded numbers are of no known type")
    dtype = DTYPES[data[0]]
    data, planes = data[1:], []
    for place in range(dtype.itemsize):
        (size,) = _PLANE.unpack(data[: _PLANE.size].tobytes()) if len(data) >= _PLANE.size else (-1,)
        if not 0 <= size <= len(data) - _PLANE.size:
            raise PacketError(f"plane {place + 1} of {dtype.itemsize} of losslessly coded numbers is cut off")
        plane = decode_integers(data[_PLANE.size : _PLANE.size + size], n)
        if n and not 0 <= int(plane.min()) <= int(plane.max()) <= 255:
            raise PacketError(f"plane {place + 1} of losslessly coded numbers holds more than bytes")
        planes.append(plane.astype(np.uint8))
        data = data[_PLANE.size + size :]
    if len(data):
        raise PacketError(f"losslessly coded numbers are followed by {len(data)} bytes that belong to nothing")
    bits = 8 * dtype.itemsize
    rotated = np.stack(planes, 1).view(f"<u{dtype.itemsize}").reshape(-1)
    words = rotated >> 1 | rotated << (bits - 1)
    return torch.from_numpy(words.view(f"i{dtype.itemsize}")).view(dtype)


def _planes(words: npt.NDArray[np.unsignedinteger]) -> list[Array]:
    """The bytes of each word that was rotated left by one bit, lowest first: one int32 [n] for each byte."""
    rotated = words << 1 | words >> (8 * words.itemsize - 1)
    return [(rotated >> (8 * place) & 255).astype(np.int32) for place in range(words.itemsize)]
