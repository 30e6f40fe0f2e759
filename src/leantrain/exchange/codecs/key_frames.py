"""Weights sent again and again, as what changed in their whole numbers since the last time.

    q_t        = round(w_t / step)              whole numbers, the same grid every time: step = s reference
    sent       = q_t - q_(t-1)                  with the checksum of q_(t-1), which the receiver must have
    key frame  = q_t                            the first time and every `key_every` times after it

Saves: weights that barely move cost a fraction of a bit each. Nothing drifts, since whole numbers are added: what a
receiver has is round(w_t / step) step, whichever frames it came by. Costs: the whole numbers of the last time, 4 bytes
a weight on both sides. Who joins late, or misses a frame, waits for a key frame: nothing is added to a wrong base.

Source: Øland & Raj 2015 (ICASSP) for entropy-coded weights; key frames are video coding's.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.exchange.codecs.entropy import Entropy, Quantised, dequantised
from leantrain.exchange.codecs.integer_coder import decode_integers, encode_integers
from leantrain.exchange.codecs.symbol_coders import Array
from leantrain.exchange.packet import Kind, PacketError, seal, unseal

_FRAME = struct.Struct("<BxxxIIf")
"""A change or a key, checksum of the base, checksum of the result, step."""

_CHANGE, _KEY = 128, 129
"""No modes of the entropy codec, whose packets are of the same kind: neither takes the other's."""


class WeightSender:
    """One end of a stream: turns a tensor, time after time, into packets.

    Args:
        step: of the grid, in units of `reference`; the error is at most half of it.
        key_every: one packet in this many is a key frame.
        reference: the tensor's standard deviation when training began.

    Examples:
        >>> sender, receiver = WeightSender(), WeightReceiver()
        >>> received = receiver.receive(sender.send(torch.tensor([0.5, -0.25])))
        >>> received.tolist()
        [0.5, -0.25]
    """

    def __init__(self, step: float = 1 / 64, key_every: int = 50, reference: float = 1.0) -> None:
        if key_every < 1:
            raise UsageError(f"key_every must be >= 1, got key_every={key_every}")
        self.codec = Entropy("abs", step=step)
        self.key_every = key_every
        self.reference = reference
        self._round = 0
        self._last: Array | None = None

    def send(self, tensor: Tensor) -> Tensor:
        """The next packet, uint8 [bytes].

        Raises:
            UsageError: the tensor holds NaN or infinities, or has another number of elements than before.
        """
        integers, _, step = self.codec.quantised(tensor.detach().cpu(), self.reference)
        now = integers.reshape(-1).numpy()
        key = self._round % self.key_every == 0 or self._last is None
        if self._last is not None and len(self._last) != len(now):
            raise UsageError(f"a stream of {len(self._last)} weights cannot go on with {len(now)}")
        base = np.zeros_like(now) if key or self._last is None else self._last
        head = _FRAME.pack(_KEY if key else _CHANGE, _checksum(base), _checksum(now), step)
        payload = torch.frombuffer(bytearray(head + encode_integers(now - base)), dtype=torch.uint8)
        self._last = now
        self._round += 1
        return seal(Kind.ENTROPY, payload, len(now), tag=(self._round - 1) % 2**32)

    def state_dict(self) -> dict[str, Any]:
        """What the stream goes on from."""
        last = torch.empty(0, dtype=torch.int32) if self._last is None else torch.from_numpy(self._last.copy())
        return {"round": self._round, "last": last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another sender was."""
        self._round = int(state["round"])
        self._last = state["last"].numpy().copy() if self._round else None


class WeightReceiver:
    """The other end: turns the packets back into weights."""

    def __init__(self) -> None:
        self._last: Array | None = None

    def receive(self, packet: Tensor | bytes) -> Tensor | None:
        """The weights, float32 [weights]; None for one who joined late and has yet to see a key frame.

        Raises:
            PacketError: the packet is damaged, or continues weights other than those last received here. The receiver
                stays as it was, and goes on with the next key frame.
        """
        found = unseal(packet, Kind.ENTROPY)
        data = found.payload.numpy()
        if len(data) < _FRAME.size:
            raise PacketError("a frame of weights is cut off")
        frame, base_sum, sum_after, step = _FRAME.unpack(data[: _FRAME.size].tobytes())
        if frame not in (_CHANGE, _KEY) or not 0 < step < float("inf"):
            raise PacketError(f"not a frame of weights: it is of type {frame}, in steps of {step}")
        key = frame == _KEY
        if not key and self._last is None:
            return None
        base = np.zeros(found.numel, np.int32) if key or self._last is None else self._last
        if len(base) != found.numel or _checksum(base) != base_sum:
            raise PacketError(f"frame {found.tag} of weights does not continue what was received last")
        now = base + decode_integers(data[_FRAME.size :], found.numel)
        if _checksum(now) != sum_after:
            raise PacketError(f"frame {found.tag} of weights leads to other weights than the sender's")
        self._last = now
        return dequantised(Quantised(torch.from_numpy(now.copy()), 0.0, step))


def _checksum(integers: Array) -> int:
    return zlib.crc32(integers.astype("<i4", copy=False).data)
