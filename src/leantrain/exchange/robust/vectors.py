"""Many tensors as one vector, and everybody's vectors as the rows of a matrix: what robust rules are applied to.

Each process sends its vector of P numbers to all others, (n - 1) (4P + headers) bytes, in packets of a million numbers.
What cannot be used of what arrives becomes NaN, which rules know to be a lie: a damaged packet stops nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from leantrain.exchange.channel import Collectives
from leantrain.exchange.packet import HEADER, Kind, PacketError, seal, unseal

CHUNK = 1 << 20
"""Numbers in a packet."""


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors one behind the other, [P] on the CPU: float32, or float64 where some are."""
    return torch.cat([tensor.to("cpu", _width(tensors)).reshape(-1) for tensor in tensors])


def write(vector: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy what `flat` made back into the tensors."""
    for tensor, part in zip(tensors, vector.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def gather(own: Tensor, channel: Collectives, outgoing: Callable[[Tensor], Tensor]) -> Tensor:
    """Everybody's vector, [n, P] in rank order; NaN where a packet cannot be used.

    Args:
        own: this process's, [P].
        outgoing: makes of it what is sent.
    """
    stack = own.new_empty(channel.size, own.numel())
    pieces, columns = outgoing(own).split(CHUNK), stack.split(CHUNK, dim=1)
    for tag, (piece, received) in enumerate(zip(pieces, columns, strict=True)):
        packet = seal(Kind.VECTOR, piece.contiguous().view(torch.uint8), piece.numel(), tag)
        for row, each in zip(received, channel.all_gather(packet), strict=True):
            row.copy_(opened(each, piece.numel(), piece.dtype, tag))
    return stack


def gathered_bytes(params: Sequence[Tensor], world: int) -> int:
    """What each process sends to gather these tensors."""
    numbers = sum(param.numel() for param in params)
    return (world - 1) * (numbers * _width(params).itemsize + HEADER * -(-numbers // CHUNK))


def opened(packet: Tensor, numel: int, dtype: torch.dtype, tag: int) -> Tensor:
    """The numbers in a packet, [numel]; NaN if it is not what it should be."""
    try:
        numbers = unseal(packet, Kind.VECTOR, numel, tag).numbers(dtype)
    except PacketError:
        numbers = torch.empty(0, dtype=dtype)
    return numbers if numbers.numel() == numel else torch.full((numel,), torch.nan, dtype=dtype)


def _width(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
