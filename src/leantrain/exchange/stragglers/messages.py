"""Messages over sockets between the process that decodes and the others: one packet each, its length before it.

    bytes   0-7       8-39            40-41           42-43         44-47         48-
            length    packet header   topic, number   how many      bytes of      values (float64), numbers, rest
                                      size in bytes   values        rest

The packet's tag is the step. What arrives is checked by the packet's checksum and by the sizes it gives; nothing is
ever unpickled. Reading takes what is there and goes on later, so that one thread can serve many sockets.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from leantrain.exchange.packet import HEADER, Kind, PacketError, seal, unseal

_LENGTH = struct.Struct("<Q")
_CONTENTS = struct.Struct("<BBHI")
_TYPES = {0: None, 4: torch.float32, 8: torch.float64}
_NOTHING = torch.empty(0, dtype=torch.uint8)


class Topic(IntEnum):
    """What a message is about."""

    ANSWER = 1
    """A worker's coded gradient of a step."""
    PASS = 2
    """A worker has nothing to say of a step: it was decided without it."""
    DECIDED = 3
    """The decoded gradient of a step."""
    MEET = 4
    """A worker has come to where all wait for one another."""
    MET = 5
    """All have."""
    FAILED = 6
    """It cannot go on; `rest` is why, in UTF-8."""


@dataclass(frozen=True)
class Message:
    """One message.

    Args:
        topic: what it is about.
        step: which one, counted from 0.
        values: a few control numbers.
        numbers: float32 or float64 [numbers] on the CPU, or None.
        rest: uint8 [bytes].
    """

    topic: Topic
    step: int
    values: tuple[float, ...] = ()
    numbers: Tensor | None = None
    rest: Tensor = _NOTHING

    def pieces(self) -> list[memoryview]:
        """What goes through the socket, one after the other. A large packet is not copied to have its length in it."""
        size = 0 if self.numbers is None else self.numbers.element_size()
        contents = _CONTENTS.pack(self.topic, size, len(self.values), self.rest.numel())
        control = contents + struct.pack(f"<{len(self.values)}d", *self.values)
        pieces = [torch.frombuffer(bytearray(control), dtype=torch.uint8), self.rest]
        if self.numbers is not None:
            pieces.insert(1, self.numbers.view(torch.uint8))
        numel = 0 if self.numbers is None else self.numbers.numel()
        packet = seal(Kind.CODED, torch.cat(pieces), numel, tag=self.step & 0xFFFFFFFF)
        return [memoryview(_LENGTH.pack(packet.numel())), packet.numpy().data]

    @staticmethod
    def from_packet(data: Tensor) -> Message:
        """The message in a packet that arrived.

        Raises:
            PacketError: it is damaged, of another kind, or its sizes contradict one another.
        """
        packet = unseal(data, Kind.CODED)
        if packet.payload.numel() < _CONTENTS.size:
            raise PacketError(f"a message has {packet.payload.numel()} bytes, and its contents begin after more")
        topic, size, count, rest = _CONTENTS.unpack(packet.payload[: _CONTENTS.size].numpy().tobytes())
        if topic not in Topic._value2member_map_ or size not in _TYPES:
            raise PacketError(f"a message has topic {topic} and numbers of {size} bytes, which do not exist")
        start = _CONTENTS.size + 8 * count
        if start + size * packet.numel + rest != packet.payload.numel():
            raise PacketError(
                f"a message of {packet.payload.numel()} bytes says it has {count} values, {packet.numel} numbers of "
                f"{size} bytes and {rest} more bytes"
            )
        values = struct.unpack(f"<{count}d", packet.payload[_CONTENTS.size : start].numpy().tobytes())
        dtype = _TYPES[size]
        numbers = None if dtype is None else packet.numbers(dtype, start, packet.numel)
        return Message(Topic(topic), packet.tag, values, numbers, packet.payload[packet.payload.numel() - rest :])


def message_bytes(values: int, numbers: int, number_size: int, rest: int) -> int:
    """Bytes that a message takes with so many values, numbers of so many bytes, and bytes of rest."""
    return _LENGTH.size + HEADER + _CONTENTS.size + 8 * values + number_size * numbers + rest


class Inbox:
    """Puts together what arrives on a socket, blocking or not.

    Args:
        most: bytes that no packet may exceed.
    """

    def __init__(self, source: socket.socket, most: int) -> None:
        self.source, self.most = source, most
        self._begin(_LENGTH.size, is_length=True)

    def read(self) -> Tensor | None:
        """The next packet, uint8 [bytes], still sealed; None if the socket has no more of it now.

        Raises:
            PacketError: a packet that is longer than any can be.
            ConnectionError: the other side is gone.
        """
        while True:
            while self._filled < self._data.numel():
                try:
                    received = self.source.recv_into(self._memory[self._filled :])
                except (BlockingIOError, InterruptedError):
                    return None
                if received == 0:
                    raise ConnectionResetError("the connection was closed")
                self._filled += received
            whole = self._data
            if not self._is_length:
                self._begin(_LENGTH.size, is_length=True)
                return whole
            (length,) = _LENGTH.unpack(self._memory)
            if not HEADER <= length <= self.most:
                raise PacketError(f"a packet of {length} bytes is announced, allowed are {HEADER} to {self.most}")
            self._begin(length, is_length=False)

    def _begin(self, size: int, is_length: bool) -> None:
        self._data = torch.empty(size, dtype=torch.uint8)
        self._memory = self._data.numpy().data
        self._filled, self._is_length = 0, is_length
