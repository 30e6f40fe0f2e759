"""What travels between processes: one header, one payload, one checksum.

    bytes   0-3    4        5     6-7    8-11  12-19    20-27          28-31    32-
            LTPK   version  kind  flags  tag   numel    payload bytes  CRC-32   payload      little-endian

`numel` is how many numbers the payload stands for, `tag` what sender and receiver agreed to call it (a bucket, a
round). The checksum covers the header before it and the payload. A packet that was cut off, damaged, or meant for
somebody else is refused before anything in it is believed.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum, IntFlag

import torch
from torch import Tensor

from leantrain.errors import RunError

HEADER = 32
_MAGIC, _VERSION = b"LTPK", 1
_FIELDS = struct.Struct("<4sBBHIQQ")
_CHECKSUM = struct.Struct("<I")


class PacketError(RunError):
    """A packet that cannot be used: damaged, cut off, of another kind, or with contents that contradict themselves."""


class Kind(IntEnum):
    """What the payload is, and so who can read it."""

    SIGNS = 1
    TOP_K = 2
    ENTROPY = 3
    DENSE = 4
    VECTOR = 5
    CODED = 6


class Flag(IntFlag):
    """What else the sender has to say."""

    NONE = 0
    NON_FINITE = 1
    """Its numbers are not finite: the step should not be taken anywhere."""


@dataclass(frozen=True)
class Packet:
    """The contents of a packet that was found intact."""

    payload: Tensor
    """uint8 [bytes], a view of what arrived; it may be unaligned for wider types: `numbers` copies where needed."""
    numel: int
    tag: int
    flags: Flag

    def numbers(self, dtype: torch.dtype, start: int = 0, count: int | None = None) -> Tensor:
        """`count` numbers of `dtype` that begin at byte `start`; by default all to the end.

        Raises:
            PacketError: the payload does not hold so many, or ends within a number.
        """
        end = self.payload.numel() if count is None else start + count * dtype.itemsize
        if not 0 <= start <= end <= self.payload.numel() or (end - start) % dtype.itemsize:
            raise PacketError(
                f"a packet's payload of {self.payload.numel()} bytes has no bytes {start} to {end} of {dtype}"
            )
        piece = self.payload[start:end]
        return (piece.clone() if piece.data_ptr() % dtype.itemsize else piece).view(dtype)


def seal(kind: Kind, payload: Tensor, numel: int, tag: int = 0, flags: int = Flag.NONE) -> Tensor:
    """The packet that carries `payload`.

    Args:
        payload: uint8 [bytes] on the CPU.
        numel: numbers that it stands for.
        tag: 32 bits by which the receiver knows that this is what it waits for.

    Returns:
        uint8 [HEADER + bytes].
    """
    packet = torch.empty(HEADER + payload.numel(), dtype=torch.uint8)
    packet[HEADER:] = payload
    memory = packet.numpy().data
    _FIELDS.pack_into(memory, 0, _MAGIC, _VERSION, kind, flags, tag, numel, payload.numel())
    _CHECKSUM.pack_into(memory, _FIELDS.size, _checksum(memory))
    return packet


def unseal(
    packet: Tensor | bytes, kind: Kind | None = None, numel: int | None = None, tag: int | None = None
) -> Packet:
    """Check a packet and open it.

    Args:
        packet: what arrived, uint8 [bytes]. Bytes behind its end (padding) are left out.
        kind, numel, tag: what it must be; None: anything.

    Raises:
        PacketError: it is damaged or not the one expected. The message names the first difference.
    """
    data = torch.frombuffer(bytearray(packet), dtype=torch.uint8) if isinstance(packet, bytes) and packet else packet
    if not isinstance(data, Tensor) or data.numel() < HEADER:
        raise PacketError(f"a packet has {len(packet)} bytes, and its header alone has {HEADER}")
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise PacketError(f"a packet is uint8 [bytes], got {data.dtype} {list(data.shape)}")
    memory = data.contiguous().numpy().data
    magic, version, found, flags, found_tag, found_numel, size = _FIELDS.unpack_from(memory)
    if magic != _MAGIC:
        raise PacketError(f"not a packet of leantrain: it begins with {bytes(magic)!r} instead of {_MAGIC!r}")
    if version != _VERSION:
        raise PacketError(f"a packet has format {version}, this version reads {_VERSION}")
    if size > len(memory) - HEADER:
        raise PacketError(f"a packet is cut off: {len(memory) - HEADER} of {size} bytes of payload are there")
    memory = memory[: HEADER + size]
    (expected,) = _CHECKSUM.unpack_from(memory, _FIELDS.size)
    if (crc := _checksum(memory)) != expected:
        raise PacketError(f"a packet is damaged: its checksum is {crc:08x}, and {expected:08x} was sent")
    if kind is not None and found != kind:
        raise PacketError(f"a packet is of kind {_name(found)}, and {kind.name} is expected")
    if numel is not None and found_numel != numel:
        raise PacketError(f"a packet stands for {found_numel} numbers, and {numel} are expected")
    if tag is not None and found_tag != tag:
        raise PacketError(f"a packet has tag {found_tag:#x}, and {tag:#x} is expected: the processes are out of step")
    return Packet(data[HEADER : HEADER + size], found_numel, found_tag, Flag(flags))


def split(message: Tensor) -> list[Tensor]:
    """The packets of which a message consists, one behind the other. Only their lengths are looked at.

    Raises:
        PacketError: the message ends within a packet, or what is there is none.
    """
    packets, start, memory = [], 0, message.contiguous().numpy().data
    while start < len(memory):
        if len(memory) - start < HEADER or bytes(memory[start : start + 4]) != _MAGIC:
            raise PacketError(f"a message of {len(memory)} bytes has no packet at byte {start}")
        end = start + HEADER + _FIELDS.unpack_from(memory, start)[-1]
        if end > len(memory):
            raise PacketError(f"a message is cut off: it has {len(memory)} of {end} bytes")
        packets.append(message[start:end])
        start = end
    return packets


def _checksum(memory: memoryview) -> int:
    return zlib.crc32(memory[HEADER:], zlib.crc32(memory[: _FIELDS.size]))


def _name(kind: int) -> str:
    return Kind(kind).name if kind in Kind._value2member_map_ else str(kind)
