"""signSGD with majority vote (Bernstein et al.): every process sends one bit per weight, and most of them decide.

    m_k <- b m_k + (1 - b) g_k                       momentum b of process k, g_k its own gradient; b = 0: signSGD
    v    = +1 where at least half of the m_k >= 0, else -1
    w   <- w - lr (v + wd w)                         the step, by torch.optim.SGD

Saves 31 of 32 bytes. Of S bytes of signs, and with 32 bytes of header to a packet, each of W processes sends per step

    route="sharded"     2 (W - 1) (32 + S / W)       everybody counts a part of the weights; then counts are gathered
    route="gather"      (W - 1) (32 + S)             everybody gets all signs and counts alone: one round of messages

and S = P / 8 for P weights, plus one bit for each row of a matrix and each element of a vector: whether its gradient is
other than zero here. Where it is zero in all processes (tokens that did not occur, units that are off) the result is 0;
the paper moves such weights by lr in every step. Costs 4 bytes of state per weight, the momentum, of which a second
copy is alive during the backward pass, and a learning rate like Adam's instead of SGD's.

No process can move the result by the size of its gradient: fewer than half of them may invert theirs, scale it, or send
noise. One whose gradient is not finite abstains. With "sharded" whoever counts must count honestly; with "gather"
nobody has to be believed.

Sources: Bernstein, Wang, Azizzadenesheli & Anandkumar 2018 (signSGD, ICML); Bernstein, Zhao, Azizzadenesheli &
Anandkumar 2019 (signSGD with majority vote, ICLR).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim import Optimizer

from leantrain.errors import UsageError
from leantrain.exchange.codecs.signs import majority, pack_signs, packed_bytes, unpack_signs
from leantrain.exchange.hook import Bucket, GradientHook, OnLost
from leantrain.exchange.packet import HEADER, Flag, Kind, PacketError, seal, unseal

Ties = Literal["plus", "previous", "random"]
Route = Literal["sharded", "gather", "auto"]

_WORTH_A_ROUND = 1 << 14
"""Bytes that a second round of messages must save: what 100 Mbit/s carry in 1.3 ms."""


class MajorityVote(GradientHook):
    """Exchange signs of momenta and step by the majority's, with plain `torch.optim.SGD` behind it.

    Args:
        momentum: b above, in [0, 1).
        ties: what an even number of processes does where it is divided: "plus" (+1), "previous" (what was decided last
            for this weight; keeps one bit per weight), "random" (a hash of step and weight, equal in all processes).
        route: "sharded", "gather", or "auto": "gather" where the second round would save less than 16 KiB.
        timeout_s: seconds that a peer may take, above 0; None: what LEANTRAIN_TIMEOUT_S says, else 600.
        on_lost: "raise" when a process is lost, or "continue" with those that are left; see `GradientHook`.

    Raises:
        UsageError: a value that is not allowed.

    Examples:
        >>> exchange = MajorityVote()
        >>> model = exchange.attach(torch.nn.Linear(64, 32))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, weight_decay=0.1)
        >>> exchange.connect([optimizer])
    """

    clips: ClassVar[bool] = False

    def __init__(
        self,
        momentum: float = 0.9,
        ties: Ties = "plus",
        route: Route = "sharded",
        timeout_s: float | None = None,
        on_lost: OnLost = "raise",
    ) -> None:
        super().__init__(timeout_s, on_lost)
        if not 0 <= momentum < 1:
            raise UsageError(f"momentum must be in [0, 1), got momentum={momentum!r}")
        for name, value, allowed in (("ties", ties, get_args(Ties)), ("route", route, get_args(Route))):
            if value not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}, got {name}={value!r}")
        self.momentum, self.ties, self.route = momentum, ties, route
        self._counted_at, self._voted, self._outvoted, self._abstained = -1, 0, 0, 0

    def check_optimizer(self, optimizer: type[Optimizer]) -> None:
        """Accept `torch.optim.SGD` alone.

        Raises:
            UsageError: it is another. They would scale the votes (Adam), or add up votes that momentum has been through
                already (momentum SGD, Lion).
        """
        if not issubclass(optimizer, torch.optim.SGD):
            raise _not_plain(optimizer.__name__)

    def connect(self, optimizers: Sequence[Optimizer]) -> None:
        """Accept SGD without momentum. Its weight decay is added to the vote, which it does not enter: so it is the
        decoupled decay of the paper.

        Raises:
            UsageError: it is another optimizer, or has a momentum of its own.
        """
        for optimizer in optimizers:
            self.check_optimizer(type(optimizer))
            for group in optimizer.param_groups:
                if group["momentum"]:
                    raise _not_plain(f"{type(optimizer).__name__} with momentum={group['momentum']}")

    def predicted_bytes(self, params: Sequence[Tensor], world: int) -> int:
        """By the formula above, for one bucket: every further one of DDP (25 MB) costs the headers once more."""
        signs = sum(packed_bytes(param.numel()) for param in params)
        rows = packed_bytes(sum(len(_by_rows(param)) for param in params))
        if not self._in_parts(signs, world):
            return (world - 1) * (HEADER + signs + rows)
        return 2 * (world - 1) * (HEADER + -(-signs // world) + -(-rows // world))

    def metrics(self) -> dict[str, float]:
        """agreement: share of this process's signs that were the majority's, 0.5 if they are noise; abstained: how
        many processes had gradients that were not finite."""
        return {"agreement": 1 - self._outvoted / max(self._voted, 1), "abstained": float(self._abstained)}

    def reduce(self, bucket: Bucket) -> list[Tensor]:
        """The vote, +1 and -1 in the shape of every gradient, and 0 in rows that no process has a gradient for."""
        if self._counted_at != self.steps:  # a new step's first bucket
            self._counted_at, self._voted, self._outvoted, self._abstained = self.steps, 0, 0, 0
        signs = [pack_signs(self._momentum(bucket, place)).cpu() for place in range(len(bucket.grads))]
        used = torch.cat([_used_rows(grad).cpu() for grad in bucket.grads])
        result = self._poll(bucket, torch.cat(signs), torch.from_numpy(np.packbits(used.numpy())))
        if result is None:
            return bucket.nan()
        votes = result[0].split([len(each) for each in signs])
        used = torch.from_numpy(np.unpackbits(result[1].numpy(), count=len(used))).bool()
        rows = used.split([len(_by_rows(grad)) for grad in bucket.grads])
        return [self._unpacked(*each) for each in zip(bucket.names, bucket.grads, votes, rows, strict=True)]

    def _momentum(self, bucket: Bucket, place: int) -> Tensor:
        """This process's momentum of a parameter, with the new gradient in it if that is finite."""
        name, grad = bucket.names[place], bucket.grads[place]
        if not self.momentum:
            return grad if bucket.finite else torch.zeros_like(grad)
        before = self.committed(name, "momentum")
        before = torch.zeros_like(grad) if before is None else before.to(grad)
        after = torch.lerp(before, grad, 1 - self.momentum) if bucket.finite else before
        self.stage(name, "momentum", after)
        return after

    def _unpacked(self, name: str, grad: Tensor, vote: Tensor, used: Tensor) -> Tensor:
        """What becomes of a gradient: its packed votes, where its rows are in use."""
        if self.ties == "previous":
            self.stage(name, "vote", vote.clone())
        result = unpack_signs(vote.to(grad.device), grad.numel(), grad.dtype).view(grad.shape)
        if not used.all():
            _by_rows(result)[~used.to(grad.device)] = 0
        return result

    def _in_parts(self, signs: int, world: int) -> bool:
        """Whether each process counts a part of the votes, of which there are so many bytes."""
        if self.route == "auto":
            return (world - 1) * (signs - 2 * signs / world) > _WORTH_A_ROUND
        return self.route == "sharded" and world > 1

    def _poll(self, bucket: Bucket, signs: Tensor, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """Everybody's packed votes and rows in use, from those of this process; None: this step is not to be taken."""
        in_parts = self._in_parts(len(signs), self.world)
        parts, part = (self.world, self.rank) if in_parts else (1, 0)
        ballot = torch.cat([_cut(signs, parts), _cut(rows, parts)], 1)
        width = -(-len(signs) // parts)  # bytes of a part that are votes; the others are rows

        ballots = self._told(bucket, ballot, bucket.finite)
        self._abstained = max(self._abstained, sum(each is None for each in ballots))
        count = self._count(ballots, width, None if self.ties == "plus" else _cut(self._decisions(bucket), parts)[part])
        counts = [count]
        if in_parts:
            counts = self._told(bucket, ballot[:1] if count is None else count.unsqueeze(0), count is not None)
        told = [each for each in counts if each is not None]
        if len(told) < len(counts):
            return None
        whole = torch.stack(told)
        votes, used = whole[:, :width].flatten()[: len(signs)], whole[:, width:].flatten()[: len(rows)]
        if bucket.finite:
            self._voted += bucket.numel
            self._outvoted += int.from_bytes((votes ^ signs).numpy().tobytes(), "little").bit_count()
        return votes, used

    def _told(self, bucket: Bucket, payloads: Tensor, finite: bool) -> list[Tensor | None]:
        """What every process has for this one: payloads [processes, bytes] have one for each, [1, bytes] one for all.
        None for those that are not finite."""
        flags = Flag.NONE if finite else Flag.NON_FINITE
        packets = torch.stack([seal(Kind.SIGNS, each, bucket.numel, bucket.tag, flags) for each in payloads])
        received = self.channel.all_to_all(packets) if len(packets) > 1 else self.channel.all_gather(packets[0])
        opened = [unseal(each, Kind.SIGNS, bucket.numel, bucket.tag) for each in received]
        for each in opened:
            if len(each.payload) != payloads.shape[1]:
                raise PacketError(f"a ballot has {len(each.payload)} bytes, and {payloads.shape[1]} are expected")
        return [None if each.flags & Flag.NON_FINITE else each.payload for each in opened]

    def _count(self, ballots: list[Tensor | None], width: int, ties: Tensor | None) -> Tensor | None:
        """Votes and used rows of a part; None where too few are there to vote.

        Most must be. GradScaler only finds a factor that suits all if no gradient that is not finite is passed over.
        """
        present = [each for each in ballots if each is not None]
        missing = len(ballots) - len(present)
        if 2 * len(present) <= len(ballots) or (missing and self._grad_scaler is not None):
            return None
        stack = torch.stack(present)
        used = stack[0, width:].clone()
        for each in stack[1:, width:]:
            used |= each
        return torch.cat([majority(stack[:, :width], ties), used])

    def _decisions(self, bucket: Bucket) -> Tensor:
        """Packed signs that decide ties."""
        if self.ties == "random":
            drawn = [
                _coins(self.steps, name, grad.numel()) for name, grad in zip(bucket.names, bucket.grads, strict=True)
            ]
            return torch.cat(drawn)
        before = [self.committed(name, "vote") for name in bucket.names]
        return torch.cat([
            torch.full((packed_bytes(grad.numel()),), 0xFF, dtype=torch.uint8) if vote is None else vote.cpu()
            for vote, grad in zip(before, bucket.grads, strict=True)
        ])  # fmt: skip


def _not_plain(optimizer: str) -> UsageError:
    return UsageError(
        f"exchange MajorityVote cannot be combined with optimizer {optimizer}: it gets +1 or -1 for every weight, "
        "momentum included; use torch.optim.SGD with momentum=0 (its weight_decay is decoupled then)"
    )


def _by_rows(tensor: Tensor) -> Tensor:
    """A view of what is left alone together: [rows, numbers] of a matrix, [elements, 1] of a vector."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)


def _used_rows(grad: Tensor) -> Tensor:
    """Whether there is anything but zeros in each row: bool [rows]."""
    return _by_rows(grad).abs().sum(1) != 0


def _cut(packed: Tensor, parts: int) -> Tensor:
    """[bytes] -> [parts, bytes / parts], filled up with zeros."""
    return pad(packed, (0, -len(packed) % parts)).view(parts, -1)


def _coins(step: int, name: str, numel: int) -> Tensor:
    """A random bit for each weight, packed: Philox's hash of (step, parameter, place), the same everywhere."""
    words = np.random.Philox(key=[step, zlib.crc32(name.encode())]).random_raw(-(-numel // 64))
    return torch.from_numpy(words.astype("<u8").view(np.uint8)[: packed_bytes(numel)])
