"""Tensors as few bytes: rounded to whole numbers of steps, which are then entropy-coded. Øland and Raj's exchange.

    q       = clip(round((x - low) / step))      x: float [any shape], q: whole numbers, coded by `integer_coder`
    decoded = low + q step                       float32, the same bits on every machine

    mode        low         step                 bits a number
    rel         0           c RMS(x)             about 2.05 - log2 c, for c up to 1, the default
    abs         0           s reference          about 2.05 + log2(RMS(x) / step): falls as x falls; s = 1/64
    snapshot    min(x)      (max - min) / 255    at most 8, for the weights themselves (`bits`)
    lossless    (see `lossless`)                 about 27 of 32, or 11 of 16: every bit is kept

Saves: 32 / bits of the bytes of float32. Costs: an error of up to step / 2 a number, for which the sender keeps a
residual (see `averaging`), and a core that codes some hundred MB of float32 a second: lost time on a fast link.
Numbers beyond 32767 steps, or beyond the grid of a snapshot that leaves out outliers, become the nearest that can be
said; what was cut off is part of the residual like any other error.

Sources: Øland & Raj 2015 (ICASSP) and Øland 2024 (CMU-CS-24-147) for coding quantised weights in numbers of bits that
follow their RMS. The details of the modes are this package's own.
"""

from __future__ import annotations

import math
import struct
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from leantrain.errors import UsageError, nearest
from leantrain.exchange.codecs import lossless
from leantrain.exchange.codecs.integer_coder import decode_integers, encode_integers
from leantrain.exchange.packet import Kind, PacketError, seal, unseal

Mode = Literal["rel", "abs", "snapshot", "lossless"]
MODES: tuple[Mode, ...] = get_args(Mode)

FURTHEST = 2**15 - 1
"""Steps from 0 that `rel` and `abs` can say."""

_SHAPE = struct.Struct("<BB")
_GRID = struct.Struct("<ff")
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


class Quantised(NamedTuple):
    """Whole numbers of steps."""

    integers: Tensor
    """int32, of the shape of the numbers."""
    low: float
    step: float
    """Both are float32 numbers, as they are sent."""


def encode(
    tensor: Tensor,
    mode: Mode = "rel",
    *,
    step: float | None = None,
    bits: int = 8,
    outliers: float = 0.0,
    reference: float = 1.0,
) -> bytes:
    """A tensor as a packet that `decode` reads.

    Args:
        tensor: float, of any shape, on any device.
        mode: what the numbers are rounded to; "lossless" rounds nothing and takes float32, bfloat16 and float16.
        step: of `rel`, in units of the tensor's RMS (default 1); of `abs`, in units of `reference` (default 1/64).
        bits: of `snapshot`: its grid has 2^bits values, 1 to 16.
        outliers: of `snapshot`: this part of the numbers may lie beyond either end of the grid, and is cut off there.
        reference: of `abs`: the tensor's standard deviation when training began.

    Raises:
        UsageError: an argument is out of range, or a number to be rounded is NaN or infinite.
    """
    return Entropy(mode, step=step, bits=bits, outliers=outliers).encode(tensor, reference).numpy().tobytes()


def decode(packet: Tensor | bytes) -> Tensor:
    """The tensor of a packet, in its shape; float32, or what it was where the packet is lossless.

    Raises:
        PacketError: it is damaged, cut off, of another kind, or contradicts itself.
    """
    found = unseal(packet, Kind.ENTROPY)
    payload = found.payload.numpy()
    if len(payload) < _SHAPE.size:
        raise PacketError("a packet of coded numbers says nothing of their shape")
    code, dims = _SHAPE.unpack(payload[: _SHAPE.size].tobytes())
    body = _SHAPE.size + 8 * dims
    if len(payload) < body:
        raise PacketError(f"a packet of coded numbers is cut off in its shape of {dims} axes")
    shape = tuple(int(size) for size in np.frombuffer(payload[_SHAPE.size : body].tobytes(), "<u8"))
    if dims > 64 or math.prod(shape) != found.numel:
        raise PacketError(f"a packet of {found.numel} numbers cannot have the shape {list(shape)}")
    if code >= len(MODES):
        raise PacketError(f"a packet of coded numbers has mode {code}, and there are {len(MODES)}")
    if MODES[code] == "lossless":
        return lossless.unpack(payload[body:], found.numel).view(shape)
    if len(payload) < body + _GRID.size:
        raise PacketError("a packet of coded numbers says nothing of its grid")
    low, step = _GRID.unpack(payload[body : body + _GRID.size].tobytes())
    if not (math.isfinite(low) and 0 < step < math.inf):
        raise PacketError(f"a packet of coded numbers has a grid from {low} in steps of {step}")
    integers = torch.from_numpy(decode_integers(payload[body + _GRID.size :], found.numel))
    return dequantised(Quantised(integers, low, step)).view(shape)


class Entropy:
    """The codec: `encode` and `decode` with settings of its own, in packets.

    Args:
        mode, step, bits, outliers: see `encode`.

    Raises:
        UsageError: one of them is out of range.

    Examples:
        >>> codec = Entropy("rel", step=2.0)
        >>> packet = codec.encode(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
        >>> 32 * 1000 / (8 * len(packet)) > 15
        True
    """

    name = "entropy"

    def __init__(self, mode: Mode = "rel", step: float | None = None, bits: int = 8, outliers: float = 0.0) -> None:
        if mode not in MODES:
            raise UsageError(f"mode {mode!r} of the entropy codec is unknown{nearest(str(mode), MODES)}")
        if step is not None and (mode not in ("rel", "abs") or not 0 < step < math.inf):
            raise UsageError(f"step must be a positive number, with mode 'rel' or 'abs', got step={step} with {mode!r}")
        if not 1 <= bits <= 16:
            raise UsageError(f"bits must be in [1, 16], got bits={bits}")
        if not 0 <= outliers < 0.5:
            raise UsageError(f"outliers must be in [0, 0.5), got outliers={outliers}")
        self.mode = mode
        self.step = {"rel": 1.0, "abs": 1 / 64}.get(mode, 0.0) if step is None else step
        self.bits = bits
        self.outliers = outliers

    def encode(self, values: Tensor, reference: float = 1.0) -> Tensor:
        """A sealed packet, uint8 [bytes]; `reference` is for mode "abs".

        Raises:
            UsageError: `values` are not of a float type, or hold NaN or infinities, which only "lossless" keeps.
        """
        values = values.detach().cpu()
        if not values.is_floating_point():
            raise UsageError(f"only tensors of floats can be entropy-coded, got {values.dtype}")
        if self.mode == "lossless":
            body = lossless.pack(values)
        else:
            grid = self.quantised(values, reference)
            body = _GRID.pack(grid.low, grid.step) + encode_integers(grid.integers.reshape(-1).numpy())
        shape = np.asarray(values.shape, "<u8").tobytes()
        payload = _SHAPE.pack(MODES.index(self.mode), values.dim()) + shape + body
        return seal(Kind.ENTROPY, torch.frombuffer(bytearray(payload), dtype=torch.uint8), values.numel())

    def decode(self, packet: Tensor | bytes) -> Tensor:
        """What a packet of any mode stands for, float32 [numbers]."""
        return decode(packet).float().view(-1)

    def quantised(self, values: Tensor, reference: float = 1.0) -> Quantised:
        """The whole numbers that `encode` codes, for a mode that rounds."""
        numbers = values.float()
        smallest, largest = _range(numbers)
        if self.mode == "snapshot":
            low, step = self._grid(numbers, smallest, largest)
            return Quantised(_rounded(numbers.double() - low, step, 0, 2**self.bits - 1), low, step)
        if self.mode == "rel":
            size = max(1, numbers.numel())
            scale = float(torch.linalg.vector_norm(numbers, dtype=torch.float64)) / math.sqrt(size)
        else:
            scale = reference
            if not 0 < reference < math.inf:
                raise UsageError(f"reference must be a positive number, got reference={reference}")
        step = _float32(self.step * scale)
        return Quantised(_rounded(numbers, step, -FURTHEST, FURTHEST), 0.0, step)

    def _grid(self, numbers: Tensor, smallest: float, largest: float) -> tuple[float, float]:
        if cut := int(self.outliers * numbers.numel()):
            ordered = numbers.reshape(-1)
            smallest = float(ordered.kthvalue(cut + 1).values)
            largest = float(ordered.kthvalue(numbers.numel() - cut).values)
        return smallest, _float32((largest - smallest) / (2**self.bits - 1))


def dequantised(grid: Quantised) -> Tensor:
    """The numbers that the whole numbers stand for, float32 of their shape: rounded once, so alike everywhere."""
    if grid.low == 0.0:
        return grid.integers.float().mul_(grid.step).clamp_(-_LARGEST, _LARGEST)
    return grid.integers.double().mul_(grid.step).add_(grid.low).clamp_(-_LARGEST, _LARGEST).float()


def _range(numbers: Tensor) -> tuple[float, float]:
    """The smallest and the largest number.

    Raises:
        UsageError: one of them all is NaN or infinite.
    """
    if numbers.numel() == 0:
        return 0.0, 0.0
    smallest, largest = (float(end) for end in numbers.aminmax())  # which NaN passes through
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        nans, infinite = int(numbers.isnan().sum()), int(numbers.isinf().sum())
        raise UsageError(f"a tensor with {nans} NaN and {infinite} infinite numbers cannot be rounded to steps")
    return smallest, largest


def _rounded(numbers: Tensor, step: float, lowest: int, highest: int) -> Tensor:
    return (numbers / step).round_().clamp_(lowest, highest).to(torch.int32)


def _float32(step: float) -> float:
    """The step as it is sent. That of a constant tensor, 0, becomes one that rounds everything to 0."""
    return float(np.float32(min(max(step, _SMALLEST), _LARGEST)))
