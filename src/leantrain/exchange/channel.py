"""Collectives of an exchange's own, which wait for their end and count what they send.

Bytes that each of W processes sends, for a tensor of S bytes:

    all_reduce            2 (W - 1) ceil(S / W)      a ring: reduce-scatter, then all-gather
    all_gather            (W - 1) S                  a ring
    all_to_all            (W - 1) S / W              S is the whole [W, k] tensor
    all_gather_packets    (W - 1) (8 + longest)      lengths, then packets padded to the longest

They run on a gloo group beside DDP's own, on CPU tensors, whatever the gradients' device: what a codec sends is small,
and gloo, unlike NCCL, sends bytes of any kind and notices within a second when a peer is gone.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.processes import timeout_s

_LENGTH = 8
"""Bytes in which the length of a packet is sent."""


def ring_bytes(numbers: int, bytes_each: int, world: int) -> int:
    """Bytes that each process sends in a ring all-reduce: the flat tensor is cut into `world` pieces of at most
    ceil(numbers / world), and `world - 1` pieces are sent in each of the two rounds."""
    return 2 * (world - 1) * -(-numbers // world) * bytes_each


class Collectives(Protocol):
    """What an exchange asks of its channel. All processes call the same in the same order."""

    rank: int
    size: int
    sent: int
    """Bytes sent by this process since `reset`."""

    def reset(self) -> None:
        """Count from 0 again."""
        ...

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """`tensor`, made the sum or maximum over all processes in place."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Everybody's `tensor` of the same shape: [size, *shape], in rank order."""
        ...

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """Row i of process j becomes row j of process i; [size, k] -> [size, k]."""
        ...

    def all_gather_packets(self, packet: Tensor) -> list[Tensor]:
        """Everybody's packet, uint8 [bytes] of any length, in rank order."""
        ...

    def broadcast(self, tensor: Tensor) -> Tensor:
        """`tensor`, made rank 0's in place."""
        ...


class Channel:
    """Collectives among all processes; without a process group there is only this one, and nothing is sent.

    Args:
        timeout_s: seconds that a peer may take, above 0; None: what LEANTRAIN_TIMEOUT_S says, else 600.

    Raises:
        UsageError: torch.distributed has no gloo here.
    """

    def __init__(self, timeout_s: float | None = None) -> None:
        self.sent = 0
        self.timeout_s = timeout_s
        self.group: dist.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if self.size > 1:
            self.join(list(range(self.size)))

    def join(self, ranks: list[int]) -> None:
        """Make the group of these ranks of the default group, and this process's place in it. All of them call it."""
        if not dist.is_gloo_available():
            raise UsageError("exchanges send their packets with gloo, which this build of PyTorch lacks")
        wait = timedelta(seconds=timeout_s() if self.timeout_s is None else self.timeout_s)
        group = dist.new_group(ranks, backend="gloo", timeout=wait, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        self.group, self.rank, self.size = group, ranks.index(dist.get_rank()), len(ranks)

    def reset(self) -> None:
        self.sent = 0

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        if self.group is not None:
            self.sent += ring_bytes(tensor.numel(), tensor.element_size(), self.size)
            dist.all_reduce(tensor, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=self.group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty(self.size, *tensor.shape)
        if self.group is None:
            return gathered.copy_(tensor.unsqueeze(0))
        self.sent += (self.size - 1) * tensor.numel() * tensor.element_size()
        dist.all_gather(list(gathered.unbind()), tensor.contiguous(), group=self.group)
        return gathered

    def all_to_all(self, tensor: Tensor) -> Tensor:
        if self.group is None:
            return tensor.clone()
        self.sent += (self.size - 1) * tensor[0].numel() * tensor.element_size()
        received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, tensor.contiguous(), group=self.group)
        return received

    def all_gather_packets(self, packet: Tensor) -> list[Tensor]:
        if self.group is None:
            return [packet]
        lengths = self.all_gather(torch.tensor([packet.numel()])).flatten().tolist()
        padded = packet.new_zeros(max(lengths))
        padded[: packet.numel()] = packet
        return [each[:length] for each, length in zip(self.all_gather(padded), lengths, strict=True)]

    def broadcast(self, tensor: Tensor) -> Tensor:
        if self.group is not None:
            self.sent += tensor.numel() * tensor.element_size()  # at most: how gloo's tree runs is its own business
            dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor


class Echo:
    """A channel without processes: `size` of them that all send what this one sends. For timing what a codec does.

    Counts also the `hops`: messages that have to wait for the one before.
    """

    def __init__(self, size: int) -> None:
        self.rank, self.size, self.sent, self.hops = 0, size, 0, 0

    def reset(self) -> None:
        self.sent = 0

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        self.sent += ring_bytes(tensor.numel(), tensor.element_size(), self.size)
        self.hops += 2 * (self.size - 1)
        return tensor.mul_(self.size) if op == "sum" else tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        self.sent += (self.size - 1) * tensor.numel() * tensor.element_size()
        self.hops += self.size - 1
        return torch.stack([tensor] * self.size)

    def all_to_all(self, tensor: Tensor) -> Tensor:
        self.sent += (self.size - 1) * tensor[0].numel() * tensor.element_size()
        self.hops += 1
        return torch.stack([tensor[self.rank]] * self.size)

    def all_gather_packets(self, packet: Tensor) -> list[Tensor]:
        self.sent += (self.size - 1) * (_LENGTH + packet.numel())
        self.hops += 2 * (self.size - 1)
        return [packet] * self.size

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor
