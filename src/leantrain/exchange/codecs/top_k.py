"""The entries of largest magnitude, found by a sample, and the packet in which they travel.

    threshold   of every `stride`-th |x|, the one that about 1.15 k of all n entries exceed
    candidates  all entries at or above it: one pass over x
    chosen      the k largest candidates

Where there are at least k candidates, the k largest of them are the k largest of all: the sample decides how long the
search takes and never what it finds. Where a sample was misleading twice, all n are searched.

A kept entry takes 6 bytes (a float16 value and an int32 index), or 4 with `indices="gaps"`:

    bytes   0-3     4-5        6             7             8-              then
            count   exponent   value bytes   index bytes   indices         values x 2^(15 - exponent)

    int32   index, ascending
    gaps    uint16 number of entries left out since the last one; 65,535 means so many and no entry yet

Values in float16 are scaled by the power of two that brings the largest of a packet just below 2^15: none overflows,
and all down to 2^-29 of the largest keep 11 bits.

Sources: Lin, Han, Mao, Wang & Dally 2018 (Deep Gradient Compression, ICLR) for the sampled threshold and the run
lengths; Aji & Heafield 2017 (Sparse Communication for Distributed Gradient Descent, EMNLP) for dropping what is small.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.exchange.packet import Kind, PacketError, seal, unseal

Values = Literal["float16", "float32"]
Indices = Literal["int32", "gaps"]

_SLACK = 1.15
"""Candidates aimed at, in k: seldom fewer than k, seldom more than 1.3 k."""
_TAIL = 128
"""Numbers of the sample above the threshold: their count has a standard deviation of 9 %."""
_CHUNK = 1 << 18
"""Numbers that are compared at a time, so that their magnitudes stay in the cache."""


class TopK:
    """A codec that keeps the `keep` largest entries and forgets the rest: for use with a residual that does not.

    Args:
        keep: kept share of the entries, above 0 and at most 1; at least one entry is kept.
        values: "float16" (2 bytes) or "float32" (4).
        indices: "int32" (4 bytes) or "gaps" (2, and 2 more per 65,535 entries left out in a row).

    Raises:
        UsageError: an argument is not one of these.

    Examples:
        >>> codec = TopK(keep=0.5)
        >>> codec.decode(codec.encode(torch.tensor([0.1, -4.0, 2.0, 0.0]))).tolist()
        [0.0, -4.0, 2.0, 0.0]
    """

    name = "top-k"

    def __init__(self, keep: float = 0.001, values: Values = "float16", indices: Indices = "int32") -> None:
        check_share("keep", keep)
        self.keep = keep
        self.form = Form(values, indices)

    def encode(self, values: Tensor, reference: float = 1.0) -> Tensor:
        """A sealed packet of the largest entries; `reference` is not needed.

        Raises:
            UsageError: an entry is not finite.
        """
        flat = values.detach().flatten().float()
        if not all_finite(flat):
            raise UsageError("codec top-k orders entries by their size, and some of these are not finite")
        chosen = largest(flat, kept(flat.numel(), self.keep))
        return seal(Kind.TOP_K, self.form.pack(flat[chosen], chosen, flat.numel()), flat.numel())

    def decode(self, packet: Tensor | bytes) -> Tensor:
        """What the packet stands for, float32 [numel], with zeros for what was left out.

        Raises:
            PacketError: it is damaged, or holds fewer entries than this codec keeps of so many numbers.
        """
        found = unseal(packet, Kind.TOP_K)
        values, positions = unpack(found.payload, found.numel)
        if values.numel() < kept(found.numel, self.keep):  # also bounds the memory that a liar can make us fill
            raise PacketError(
                f"a packet has {values.numel()} of {found.numel} entries, and {self.keep:g} of them are kept"
            )
        return torch.zeros(found.numel).index_copy_(0, positions, values)


def kept(numel: int, keep: float) -> int:
    """Entries that are kept of `numel`: ceil(keep * numel), so one of any tensor that is not empty."""
    return min(numel, math.ceil(keep * numel * (1 - 1e-12)))  # 0.1 * 30 is a little more than 3


def largest(values: Tensor, k: int) -> Tensor:
    """Positions of the `k` entries of largest magnitude, in ascending order; equal ones are taken from all over.

    Args:
        values: finite floats [n], on any device.
        k: 0 <= k <= n.

    Returns:
        int64 [k], on the same device. Exact, and the same for the same values.
    """
    if k >= values.numel():
        return torch.arange(values.numel(), device=values.device)
    for slack in (_SLACK, 2 * _SLACK) if k >= 2 * _TAIL and 2 * _SLACK * k < values.numel() else ():
        candidates = at_least(values, sampled_threshold(values, k, slack))
        if candidates.numel() >= k:
            return candidates[_largest_exactly(values[candidates], k)]
    return _largest_exactly(values, k)


def sampled_threshold(values: Tensor, k: int, slack: float = _SLACK) -> float:
    """A magnitude that about `slack * k` of the values reach, judged by every (k / 128)-th of them."""
    stride = max(1, k // _TAIL) | 1  # odd: in step with few matrices' rows
    sample = values[stride // 2 :: stride].abs()
    rank = min(sample.numel(), math.ceil(slack * k * sample.numel() / values.numel()))
    return float(sample.topk(rank, sorted=False).values.min())


def at_least(values: Tensor, threshold: float) -> Tensor:
    """Positions of all non-zero entries whose magnitude reaches the threshold, in ascending order."""
    threshold = max(threshold, 1e-45)  # the smallest float32
    if values.device.type != "cpu":
        return (values.abs() >= threshold).nonzero().flatten()
    # NumPy's search of a mask with few hits is three times as fast as PyTorch's.
    scratch = values.new_empty(min(_CHUNK, values.numel()))
    found = []
    for start in range(0, values.numel(), _CHUNK):
        chunk = values[start : start + _CHUNK]
        reached = torch.abs(chunk, out=scratch[: chunk.numel()]).ge(threshold)
        found.append(np.flatnonzero(reached.numpy()) + start)
    return torch.from_numpy(np.concatenate(found)) if found else torch.empty(0, dtype=torch.int64)


def _largest_exactly(values: Tensor, k: int) -> Tensor:
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    sizes = values.abs()
    cut = sizes.topk(k, sorted=False).values.min()
    reached = (sizes >= cut).nonzero().flatten()
    if reached.numel() == k:
        return reached
    equal = sizes[reached] == cut
    above, ties = reached[~equal], reached[equal]
    missing = k - above.numel()
    spread = (2 * torch.arange(missing, device=values.device) + 1) * ties.numel() // (2 * missing)
    return torch.cat([above, ties[spread]]).sort().values


@dataclass(frozen=True)
class Form:
    """How values and indices are written."""

    values: Values = "float16"
    indices: Indices = "int32"

    def __post_init__(self) -> None:
        if self.values not in ("float16", "float32"):
            raise UsageError(f'values must be "float16" or "float32", got {self.values!r}')
        if self.indices not in ("int32", "gaps"):
            raise UsageError(f'indices must be "int32" or "gaps", got {self.indices!r}')

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry."""
        return (2 if self.values == "float16" else 4) + (4 if self.indices == "int32" else 2)

    def payload_bytes(self, entries: int) -> int:
        """Bytes of `entries` entries; with gaps a few more where long stretches are left out."""
        return _LEAD.size + entries * self.entry_bytes

    def pack(self, values: Tensor, positions: Tensor, numel: int) -> Tensor:
        """Entries as bytes.

        Args:
            values: finite floats [k], on any device.
            positions: int64 [k], ascending, from 0 to numel - 1.

        Returns:
            uint8 [bytes], on the CPU.

        Raises:
            UsageError: an index would not fit int32.
        """
        if self.indices == "int32" and numel > 2**31:
            raise UsageError(f'{numel} numbers in one message are too many for int32 indices; use indices="gaps"')
        written, exponent = values.detach().to("cpu", torch.float64).numpy(), 0
        if self.values == "float16":
            exponent = math.frexp(float(np.abs(written).max(initial=0.0)))[1]
            written = written * 2.0 ** (_TOP - exponent)
        where = positions.cpu().numpy()
        pieces = [
            _LEAD.pack(
                len(written), exponent, 2 if self.values == "float16" else 4, 4 if self.indices == "int32" else 2
            ),
            (where.astype("<i4") if self.indices == "int32" else _gaps(where)).tobytes(),
            written.astype("<f2" if self.values == "float16" else "<f4").tobytes(),
        ]
        return torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.uint8)


def unpack(payload: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """The entries that `Form.pack` wrote.

    Returns:
        Values, float32 [k], and positions, int64 [k], which ascend and are in range.

    Raises:
        PacketError: the bytes are not entries of `numel` numbers.
    """
    data = payload.numpy().tobytes()
    if len(data) < _LEAD.size:
        raise PacketError(f"a list of entries begins with {_LEAD.size} bytes, and there are {len(data)}")
    count, exponent, value_bytes, index_bytes = _LEAD.unpack_from(data)
    if value_bytes not in (2, 4) or index_bytes not in (2, 4):
        raise PacketError(f"a list of entries has values of {value_bytes} and indices of {index_bytes} bytes (2 or 4)")
    middle = len(data) - count * value_bytes
    codes = middle - _LEAD.size
    if count > numel or codes % index_bytes or codes < count * index_bytes or (index_bytes == 4 and codes != count * 4):
        raise PacketError(f"a list of {count} of {numel} entries cannot have {len(data)} bytes")
    if index_bytes == 4:
        where = np.frombuffer(data[_LEAD.size : middle], "<i4").astype(np.int64)
    else:
        where = _positions(np.frombuffer(data[_LEAD.size : middle], "<u2"))
    if len(where) != count:
        raise PacketError(f"a list of {count} entries has indices of {len(where)}")
    if count and (where[0] < 0 or where[-1] >= numel or (np.diff(where) <= 0).any()):
        raise PacketError(f"a list of entries has indices that do not ascend from 0 to {numel - 1}")
    values = np.frombuffer(data[middle:], f"<f{value_bytes}").astype(np.float64)
    with np.errstate(over="ignore"):
        values = (np.ldexp(values, exponent - _TOP) if value_bytes == 2 else values).astype(np.float32)
    if not np.isfinite(values).all():
        raise PacketError("a list of entries has values that are not finite")
    return torch.from_numpy(values), torch.from_numpy(where)


_LEAD = struct.Struct("<IhBB")
"""Count, exponent, bytes of a value, bytes of an index."""
_TOP = 15
"""Scaled values stay below 2^15: the largest float16 is 65,504."""
_SKIP = 65535


def _gaps(positions: NDArray[np.int64]) -> NDArray[np.uint16]:
    runs = np.diff(positions, prepend=-1) - 1
    skips = runs // _SKIP
    codes = np.full(len(runs) + int(skips.sum()), _SKIP, "<u2")
    codes[np.cumsum(skips + 1) - 1] = runs % _SKIP
    return codes


def _positions(codes: NDArray[np.uint16]) -> NDArray[np.int64]:
    ends = np.cumsum(np.where(codes == _SKIP, _SKIP, codes.astype(np.int64) + 1)) - 1
    return ends[codes != _SKIP]


def all_finite(values: Tensor) -> bool:
    """Whether all numbers are finite; faster than asking each."""
    return values.numel() == 0 or all(bool(bound.isfinite()) for bound in torch.aminmax(values))


def check_share(name: str, share: float) -> None:
    """Refuse what is not a share above 0.

    Raises:
        UsageError: naming it and its value.
    """
    if not (isinstance(share, int | float) and 0 < share <= 1):
        raise UsageError(f"{name} must be a share above 0 and at most 1, got {share!r}")
