"""From numbers to a packet and back: what every codec does, and the plain ones.

    float32    4 bytes a number, exact
    float16    2 bytes, 11 bits of precision, up to 65,504
    bfloat16   2 bytes, 8 bits of precision, the range of float32

A codec keeps nothing between calls. What it loses is put back by whoever keeps a residual (see `averaging`).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from leantrain.errors import UsageError, nearest
from leantrain.exchange.packet import Kind, PacketError, seal, unseal


class Codec(Protocol):
    """Turns a tensor into a packet and a packet into numbers; pure and deterministic."""

    @property
    def name(self) -> str:
        """What it is called in logs."""
        ...

    def encode(self, values: Tensor, reference: float = 1.0) -> Tensor:
        """A sealed packet, uint8 [bytes], for a float tensor of any shape.

        Args:
            reference: the tensor's standard deviation when training began, for codecs with absolute steps.
        """
        ...

    def decode(self, packet: Tensor | bytes) -> Tensor:
        """What the packet stands for, float32 [numbers].

        Raises:
            PacketError: it cannot be used.
        """
        ...


class Plain:
    """Numbers in a float format of PyTorch.

    Args:
        dtype: torch.float32, torch.float16 or torch.bfloat16.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = str(dtype).removeprefix("torch.")

    def encode(self, values: Tensor, reference: float = 1.0) -> Tensor:
        """See `Codec.encode`; `reference` is not needed."""
        numbers = values.detach().to("cpu", self.dtype).reshape(-1).contiguous()
        payload = numbers.view(torch.uint8) if numbers.numel() else torch.empty(0, dtype=torch.uint8)
        return seal(Kind.DENSE, payload, numbers.numel())

    def decode(self, packet: Tensor | bytes) -> Tensor:
        """See `Codec.decode`."""
        found = unseal(packet, Kind.DENSE)
        if found.payload.numel() != found.numel * self.dtype.itemsize:
            raise PacketError(
                f"a packet of {found.numel} numbers in {self.name} has {found.payload.numel()} bytes of payload, "
                f"and {found.numel * self.dtype.itemsize} are expected"
            )
        return found.numbers(self.dtype).float()


CODECS = ("float32", "float16", "bfloat16", "one-bit", "top-k", "entropy")


def named(codec: str | Codec) -> Codec:
    """The codec of that name with its default settings; a codec itself is given back.

    Raises:
        UsageError: there is none of that name.
    """
    if not isinstance(codec, str):
        return codec
    if codec in ("float32", "float16", "bfloat16"):
        return Plain(getattr(torch, codec))
    # Imported here because each of them imports this file.
    if codec == "one-bit":
        from leantrain.exchange.codecs.signs import OneBit

        return OneBit()
    if codec == "top-k":
        from leantrain.exchange.codecs.top_k import TopK

        return TopK()
    if codec == "entropy":
        from leantrain.exchange.codecs.entropy import Entropy

        return Entropy()
    raise UsageError(f"codec {codec!r} is unknown{nearest(codec, CODECS)}")
