"""One gradient entry in a thousand travels; what is withheld is kept, with its momentum, and travels later.

In each of W processes, for every tensor of two or more axes, of n entries (m: momentum, g: this process's gradient):

    g <- g min(1, clip W^-1/2 / |g|)        local clipping, before anything is added up
    u <- m u + g,  v <- v + u               momentum correction (Nesterov: u <- m (u + g),  v <- v + u + g)
    S  = the ceil(keep n) largest |v|
    send v[S] and S                         6 bytes an entry; or 4, with indices="gaps"
    v[S] <- v[S] - sent,  u[S] <- 0         momentum factor masking; what float16 rounded off stays in v
    d  = 1/W sum over processes of sent     the gradient that everybody's optimizer sees

The optimizer is SGD without momentum, which is in u already. Biases, norms and whatever `exempt` names travel whole,
and their momentum is that of the mean gradient.

Saves: at keep = 0.001 and two processes 667 times the traffic of these tensors, (W - 1) 6 keep n instead of
2 (W - 1) / W 4 n bytes: less with more processes, since lists are gathered and not added up on their way. Costs: u and
v, 8 bytes per weight, which are different in every process, as much again while a step is on its way; one search for
the largest entries; and gradients that arrive late.

Source: Lin, Han, Mao, Wang & Dally 2018 (Deep Gradient Compression, ICLR).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from leantrain.errors import UsageError
from leantrain.exchange.channel import ring_bytes
from leantrain.exchange.codecs.top_k import Form, Indices, Values, all_finite, check_share, kept, largest, unpack
from leantrain.exchange.hook import Bucket, GradientHook
from leantrain.exchange.packet import HEADER, Flag, Kind, Packet, seal, unseal

_ALL_REDUCE = 1600
"""Bytes per peer that gloo sends in an all-reduce of next to nothing: 1.5 KB of two processes, 5 KB of four."""
_LENGTH = 8
"""Bytes in which a packet's length is sent, where it is not known beforehand."""


class DeepGradientCompression(GradientHook):
    """DDP that exchanges the largest entries of what has added up, instead of whole gradients.

    Args:
        keep: share of the entries of a tensor that a step sends, above 0; at 1 everything is sent, nothing is masked,
            and training is that of SGD with momentum.
        momentum: m, at least 0 and below 1. The optimizer must have none.
        nesterov: Nesterov's form of momentum, as in `torch.optim.SGD`.
        weight_decay: adds weight_decay * w to every parameter's gradient, with the same momentum, as SGD's does. It is
            not sent, but has a buffer of its own (4 bytes per weight), the same in every process, as in the authors'
            optimizer. SGD's own weight_decay would act without momentum, 1 - m times as strong.
        clip: each tensor's local gradient is scaled down to a norm of at most clip / sqrt(W); None: never. The norm of
            a whole local gradient is known only after the last bucket, when the first ones have been sent.
        masking: stop the momentum of entries that are sent.
        warmup_steps: steps of warm-up, in which more is kept; 0: none.
        warmup: shares kept in the stages of the warm-up, which are equally long; the paper's are
            [0.25, 0.0625, 0.015625, 0.004]. A number E makes E stages of keep^(1/(E+1)), keep^(2/(E+1)), ...
        exempt: tensors whose name has a match of this regular expression travel whole, like those of one axis.
        values, indices: how an entry is written, "float16" or "float32", "int32" or "gaps": see `TopK`.
        on_resize: what becomes of u and v when a run goes on with another number of processes. "mean": every process
            gets the mean of all, which keeps what the mean gradient is still owed; "drop": they begin at zero.
        timeout_s: seconds that a peer may take, above 0; None: what LEANTRAIN_TIMEOUT_S says, else 600.

    A tensor travels whole in a step in which the lists would have more bytes than it has: in warm-up, or where
    keep is above 4 / (3 W). A tensor whose local gradient is all zero, such as one that this process did not use,
    sends nothing and keeps its u and v.

    Raises:
        UsageError: an argument is not allowed.

    Examples:
        >>> from torch import nn
        >>> exchange = DeepGradientCompression(keep=0.001, momentum=0.9)
        >>> model = exchange.attach(nn.Linear(64, 32))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> exchange.connect([optimizer])
    """

    clips: ClassVar[bool] = False

    def __init__(
        self,
        keep: float = 0.001,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        clip: float | None = None,
        masking: bool = True,
        warmup_steps: int = 0,
        warmup: int | Sequence[float] = 5,
        exempt: str | None = None,
        values: Values = "float16",
        indices: Indices = "int32",
        on_resize: Literal["mean", "drop"] = "mean",
        timeout_s: float | None = None,
    ) -> None:
        super().__init__(timeout_s)
        check_share("keep", keep)
        for name, value, allowed, fine in (
            ("momentum", momentum, "at least 0 and below 1", 0 <= momentum < 1),
            ("weight_decay", weight_decay, "at least 0", 0 <= weight_decay < math.inf),
            ("clip", clip, "None or a norm above 0", clip is None or 0 < clip < math.inf),
            ("warmup_steps", warmup_steps, "at least 0", warmup_steps >= 0),
            ("on_resize", on_resize, '"mean" or "drop"', on_resize in ("mean", "drop")),
        ):
            if not fine:
                raise UsageError(f"{name} must be {allowed}, got {value!r}")
        try:
            self._exempt = None if exempt is None else re.compile(exempt)
        except re.error as error:
            raise UsageError(f"exempt must be a regular expression, got {exempt!r}: {error}") from None
        self.keep, self.momentum, self.nesterov, self.weight_decay = keep, momentum, nesterov, weight_decay
        self.clip, self.masking, self.on_resize = clip, masking, on_resize
        self.form = Form(values, indices)
        self.warmup_steps = warmup_steps
        self._stages = _stages(keep, warmup)
        self._share = keep  # kept in the last step

    # What it is told, and what it tells.

    def check_optimizer(self, optimizer: type[Optimizer]) -> None:
        """Warn of optimizers other than SGD: they see one entry in a thousand, and that one large."""
        if not issubclass(optimizer, SGD):
            warnings.warn(
                f"DeepGradientCompression is derived for torch.optim.SGD without momentum; {optimizer.__name__} will "
                "estimate its statistics from gradients that are mostly zero",
                stacklevel=2,
            )

    def connect(self, optimizers: Sequence[Optimizer]) -> None:
        """Refuse optimizers that would apply momentum, or weight decay, a second time.

        Raises:
            UsageError: one of them has momentum; or it has weight decay, and so has this exchange.
        """
        for optimizer in optimizers:
            self.check_optimizer(type(optimizer))
            for key, ours in (("momentum", True), ("weight_decay", self.weight_decay > 0)):
                if ours and any(group.get(key, 0) for group in optimizer.param_groups):
                    value = max(group.get(key, 0) for group in optimizer.param_groups)
                    raise UsageError(
                        f"exchange DeepGradientCompression applies {key} itself, and {type(optimizer).__name__} would "
                        f"do it again: set {key}=0 there, and {key}={value:g} here"
                    )

    def settings(self) -> dict[str, Any]:
        """u is another quantity in Nesterov's form, and exempt tensors have no v."""
        return {"nesterov": self.nesterov, "exempt": self._exempt and self._exempt.pattern}

    def resized(self, states: Sequence[dict[str, Any]], rank: int, world: int) -> dict[str, Any]:
        """The state that every process begins with: see `on_resize`."""
        merged = super().resized(states, rank, world)
        if self.on_resize == "drop":
            for entry in merged["state"].values():
                if entry.pop("v", None) is not None:
                    del entry["u"]
        return merged

    def metrics(self) -> dict[str, float]:
        """Of tensors not exempt: the share of entries sent in the last step, and the norm of what is withheld."""
        withheld = [entry["v"] for entry in self.state.values() if "v" in entry]
        total = sum(v.numel() for v in withheld)
        return {
            "kept": sum(self._entries(v.numel(), self._share, self.world) for v in withheld) / max(1, total),
            "residual_norm": math.hypot(*(float(v.norm()) for v in withheld)),
        }

    def keep_at(self, step: int) -> float:
        """The share kept in step `step`, counted from 0."""
        if step >= self.warmup_steps:
            return self.keep
        return self._stages[step * len(self._stages) // self.warmup_steps]

    def predicted_bytes(self, params: Sequence[Tensor], world: int) -> int:
        """After warm-up, in the buckets that DDP makes of these parameters; `exempt` has no names to look at.

        With gaps, 65,535 entries left out in a row cost 2 bytes more than is counted here.
        """
        return sum(self._bucket_bytes(bucket, world) for bucket in _buckets(params))

    def message_bytes(self, params: Sequence[Tensor]) -> int:
        """What a process has to say in a step, headers apart: its entries, and all numbers of what travels whole."""
        return sum(kept(p.numel(), self.keep) * self.form.entry_bytes if p.dim() > 1 else p.numel() * 4 for p in params)

    # A step.

    def reduce(self, bucket: Bucket) -> list[Tensor]:
        """The gradients that SGD without momentum is to see."""
        self._share = self.keep_at(self.steps)
        triples = zip(bucket.names, bucket.params, bucket.grads, strict=True)
        local = [self._local(*each, finite=bucket.finite) for each in triples]
        listed = [part for part in local if isinstance(part, _Listed)]
        whole = [part for part in local if isinstance(part, Tensor)]
        sums = self._sums(bucket, listed, torch.cat([torch.empty(0), *(part.cpu() for part in whole)]))
        if sums is None:
            return bucket.nan()
        of_listed = iter(sums[0].split([part.v.numel() for part in listed]))
        of_whole = iter(sums[1].split([part.numel() for part in whole]))
        results = []
        for name, weight, part in zip(bucket.names, bucket.params, local, strict=True):
            mean = next(of_listed if isinstance(part, _Listed) else of_whole).to(weight.device) / self.world
            results.append(self._with_momentum(name, weight, mean).view(weight.shape))
        return results

    def _local(self, name: str, weight: Tensor, grad: Tensor, finite: bool) -> Tensor | _Listed:
        """What this process says of a parameter, flat: numbers to be averaged, or a list of some of them."""
        grad = grad.flatten().float()
        if self.clip is not None:
            grad = grad * min(1.0, self.clip / math.sqrt(self.world) / max(float(grad.norm()), 1e-30))
        if not self._covers(name, weight):
            return grad
        entries = self._entries(grad.numel(), self._share, self.world)
        v = self._buffer(name, "v", grad)
        if entries == grad.numel():
            u, step = self._pushed(name, "u", grad)
            self.stage(name, "u", u)
            self.stage(name, "v", torch.zeros_like(v))
            return v + step
        if not finite or not grad.any():
            first = torch.arange(entries, device=grad.device)
            return _Listed(name, self._buffer(name, "u", grad), v.clone(), first, grad.new_zeros(entries))
        u, step = self._pushed(name, "u", grad)
        v = v + step
        chosen = largest(v, entries)
        return _Listed(name, u, v, chosen, v[chosen])

    def _sums(self, bucket: Bucket, listed: list[_Listed], whole: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of what all processes list and of what they send whole, flat; None if something is not finite."""
        total = torch.zeros(sum(part.v.numel() for part in listed), device=bucket.grads[0].device)
        inline = _inline(whole.numel(), self.world)
        added = torch.zeros_like(whole)
        packets = self._gathered(bucket, listed, whole if inline else whole[:0]) if listed or inline else []
        if any(packet.flags & Flag.NON_FINITE for packet in packets):
            return None
        for rank, packet in enumerate(packets):  # in the same order everywhere: sums agree to the last bit
            end = packet.payload.numel() - (4 * whole.numel() if inline else 0)
            if inline:
                added += packet.numbers(torch.float32, end)
            values, positions = unpack(packet.payload[:end], total.numel())
            values = values.to(total.device)
            total.index_add_(0, positions.to(total.device), values)
            if rank == self.rank:
                self._keep_the_rest(listed, values)
        if not inline:
            added = self.channel.all_reduce(whole)
        return (total, added) if all_finite(total) and all_finite(added) else None

    def _gathered(self, bucket: Bucket, listed: list[_Listed], inline: Tensor) -> list[Packet]:
        """Everybody's lists of this bucket in rank order, each with `inline` behind it."""
        values, positions, numel = [torch.empty(0)], [torch.empty(0, dtype=torch.int64)], 0
        for part in listed:
            values.append(part.values.cpu())
            positions.append(part.chosen.cpu() + numel)
            numel += part.v.numel()
        listing = torch.cat(values)
        finite = bucket.finite and all_finite(listing)
        entries = self.form.pack(listing if finite else torch.zeros_like(listing), torch.cat(positions), numel)
        payload, numel = torch.cat([entries, inline.view(torch.uint8)]), numel + inline.numel()
        packet = seal(Kind.TOP_K, payload, numel, bucket.tag, Flag.NONE if finite else Flag.NON_FINITE)
        same_length = self.form.indices == "int32"
        gathered = self.channel.all_gather(packet) if same_length else self.channel.all_gather_packets(packet)
        return [unseal(each, Kind.TOP_K, numel, bucket.tag) for each in gathered]

    def _keep_the_rest(self, listed: list[_Listed], sent: Tensor) -> None:
        """Take from v what was sent, as the receivers read it, and stop the momentum of these entries."""
        for part, values in zip(listed, sent.split([part.chosen.numel() for part in listed]), strict=True):
            part.v[part.chosen] -= values
            if self.masking:
                part.u[part.chosen[values != 0]] = 0  # what float16 made zero was not sent
            self.stage(part.name, "u", part.u)
            self.stage(part.name, "v", part.v)

    def _with_momentum(self, name: str, weight: Tensor, mean: Tensor) -> Tensor:
        """The result for a parameter, flat: a mean of u's has its momentum, weight decay and plain gradients get it."""
        covered = self._covers(name, weight)
        if covered and not self.weight_decay:
            return mean
        decay = self.weight_decay * weight.flatten().float()
        key = "decay" if covered else "u"
        buffer, step = self._pushed(name, key, decay if covered else mean + decay)
        self.stage(name, key, buffer)
        return mean + step if covered else step

    def _pushed(self, name: str, key: str, grad: Tensor) -> tuple[Tensor, Tensor]:
        """A momentum buffer after another gradient, and the step that it proposes."""
        old = self._buffer(name, key, grad)
        if self.nesterov:
            new = self.momentum * (old + grad)
            return new, new + grad
        new = self.momentum * old + grad
        return new, new

    def _buffer(self, name: str, key: str, like: Tensor) -> Tensor:
        found = self.committed(name, key)
        return torch.zeros_like(like) if found is None else found.to(like.device)

    def _covers(self, name: str, weight: Tensor) -> bool:
        return weight.dim() > 1 and not (self._exempt and self._exempt.search(name))

    def _entries(self, numel: int, keep: float, world: int) -> int:
        """Entries that are sent of a tensor; all of them where lists would have more bytes than the tensor."""
        entries = kept(numel, keep)
        return numel if (world - 1) * entries * self.form.entry_bytes > ring_bytes(numel, 4, world) else entries

    def _bucket_bytes(self, params: Sequence[Tensor], world: int) -> int:
        entries = [self._entries(p.numel(), self.keep, world) if p.dim() > 1 else p.numel() for p in params]
        whole = sum(p.numel() for p, sent in zip(params, entries, strict=True) if sent == p.numel())
        listed, inline = sum(entries) - whole, _inline(whole, world)
        if not listed and not inline:
            return ring_bytes(whole, 4, world)
        message = HEADER + self.form.payload_bytes(listed) + (0 if self.form.indices == "int32" else _LENGTH)
        return (world - 1) * (message + 4 * whole) if inline else (world - 1) * message + ring_bytes(whole, 4, world)


@dataclass
class _Listed:
    """Some entries of a parameter, and the state from which they are taken; all flat."""

    name: str
    u: Tensor
    v: Tensor
    chosen: Tensor
    """int64 [k], ascending."""
    values: Tensor
    """v[chosen]; zeros where there is nothing to say."""


def _inline(numel: int, world: int) -> bool:
    """Whether so many plain numbers travel behind the entries, and not by an all-reduce: where that is fewer bytes."""
    return numel > 0 and (world - 1) * 4 * numel <= ring_bytes(numel, 4, world) + (world - 1) * _ALL_REDUCE


def _stages(keep: float, warmup: int | Sequence[float]) -> list[float]:
    """The shares kept in the stages of a warm-up."""
    if isinstance(warmup, int):
        if warmup < 1:
            raise UsageError(f"warmup must be a number of stages above 0 or a list of shares, got {warmup!r}")
        return [keep ** ((stage + 1) / (warmup + 1)) for stage in range(warmup)]
    if not warmup:
        raise UsageError("warmup must name at least one share; warmup_steps=0 is no warm-up")
    for share in warmup:
        check_share("a stage of warmup", share)
    return list(warmup)


def _buckets(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """As DDP fills them after its first step: from the last parameter on, until 1 MiB and then 25 MiB are reached."""
    bucket: list[Tensor] = []
    limit = 1 << 20
    for param in reversed(params):
        bucket.append(param)
        if sum(p.numel() * p.element_size() for p in bucket) >= limit:
            yield bucket
            bucket, limit = [], 25 << 20
    if bucket:
        yield bucket
