"""Processes that train by themselves and meet every H steps to average what they have learned (local SGD).

    between meetings        w_k is stepped by process k's own optimizer; nothing is sent
    at a meeting            d_k = w_k - r + e_k                  r: the weights that all agreed on last
                            q_k = decode(encode(d_k))            what the others get to know of it
                            e_k = d_k - q_k                      what they do not, kept for the next meeting
                            D   = mean of q_k, in rank order
                            v   = mu v + D;  r += lr (D + mu v)  the outer step: SGD with Nesterov momentum
                            w_k = r

With lr = 1 and mu = 0 the outer step is r += D, plain averaging. Saves: H - 1 of H exchanges, and what the codec saves
of the last. Costs: the agreed weights and the residual (and v, if mu > 0), 4 bytes a weight each; and processes that
drift apart between meetings.

Optimizer states stay with their processes; floating-point buffers are averaged whole. A checkpoint therefore holds
every process's weights and optimizers, beside the agreed weights, which are the model's file.

Sources: Stich 2019 (Local SGD, ICLR); Douillard et al. 2023 (DiLoCo) for the outer step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leantrain.errors import RunError, UsageError
from leantrain.exchange.channel import Channel, Collectives, Echo
from leantrain.exchange.codecs.codec import Codec, named
from leantrain.exchange.dense import Stations, highest
from leantrain.exchange.packet import Flag, Kind, PacketError, seal, split, unseal

_VECTOR_DEVIATION = 0.05
"""Stands for the initial standard deviation of vectors, which mostly begin as zeros or ones."""


class Averaging(Stations):
    """Average changes of the weights every `every` steps.

    Args:
        every: optimizer steps from one meeting to the next, >= 1.
        codec: "float32", "float16", "bfloat16", "one-bit", "top-k", "entropy", or any `Codec`.
        residual: whether what a codec loses is kept and sent with the next change.
        send: "changes" since the last meeting, or the "weights" themselves.
        outer_lr: what the mean change is multiplied with, above 0.
        outer_momentum: momentum of the outer step, in [0, 1).
        nesterov: whether it is Nesterov's.
        timeout_s: seconds that a peer may take, above 0; None: what LEANTRAIN_TIMEOUT_S says, else 600.

    Raises:
        UsageError: an argument is out of its range.
    """

    replicated = False

    def __init__(
        self,
        every: int = 8,
        codec: str | Codec = "float32",
        residual: bool = True,
        send: Literal["changes", "weights"] = "changes",
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        nesterov: bool = True,
        timeout_s: float | None = None,
    ) -> None:
        if every < 1:
            raise UsageError(f"every must be a number of steps from 1 up, got {every!r}")
        if not outer_lr > 0:
            raise UsageError(f"outer_lr must be above 0, got {outer_lr!r}")
        if not 0 <= outer_momentum < 1:
            raise UsageError(f"outer_momentum must be in [0, 1), got {outer_momentum!r}")
        if send not in ("changes", "weights"):
            raise UsageError(f"send must be 'changes' or 'weights', got {send!r}")
        self.every, self.codec, self.residual, self.send = every, named(codec), residual, send
        self.outer_lr, self.outer_momentum, self.nesterov = outer_lr, outer_momentum, nesterov
        self.timeout_s = timeout_s
        self.channel: Collectives = Echo(1)
        self.steps = 0
        self.agreed: dict[str, Tensor] = {}
        self.residuals: dict[str, Tensor] = {}
        self.momenta: dict[str, Tensor] = {}
        self.deviations: dict[str, float] = {}
        self._params: dict[str, Tensor] = {}
        self._buffers: list[Tensor] = []
        self._sent, self._bits = 0, 0.0

    def attach(self, model: nn.Module) -> nn.Module:
        """The bare model, with rank 0's weights in all processes.

        Args:
            model: plain or wrapped by DDP, whose wrapper is taken off: it would average at every step.
        """
        inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        if self._params:
            raise UsageError(f"exchange {type(self).__name__} is attached to a model already; make another one")
        if any(hasattr(param, "full_tensor") for param in inner.parameters()):
            raise UsageError(f"exchange {type(self).__name__} needs whole weights, and this model is sharded (FSDP2)")
        self.channel = channel = Channel(self.timeout_s)
        self._params = {name: param.detach() for name, param in inner.named_parameters() if param.requires_grad}
        self._buffers = [buffer for buffer in inner.buffers() if buffer.is_floating_point()]
        for tensor in inner.state_dict().values():
            tensor.copy_(channel.broadcast(tensor.cpu()))
        for name, param in self._params.items():
            self.agreed[name] = _wide(param).clone()
            self.deviations[name] = _deviation(param)
        return inner

    def gradient_sync(self, model: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """Gradients stay where they are in any case."""
        return nullcontext()

    def agree(self, values: Sequence[float], always: bool = False) -> list[float] | None:
        """Processes talk only in steps that end in a meeting."""
        return highest(values) if always or (self.steps + 1) % self.every == 0 else None

    @torch.no_grad()
    def after_step(self, last: bool = False) -> None:
        """Count a step, and meet if it is time or the last one."""
        self.steps += 1
        self._sent = 0
        if last or self.steps % self.every == 0:
            self.channel.reset()
            self._meet()
            self._sent = self.channel.sent

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """In the block the model has the weights of the last meeting."""
        with torch.no_grad():
            own = {name: param.clone() for name, param in self._params.items()}
            for name, param in self._params.items():
                param.copy_(self.agreed[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, param in self._params.items():
                    param.copy_(own[name])

    def encode_all(self, names: Sequence[str], tensors: Sequence[Tensor]) -> list[Tensor]:
        """One packet for each tensor."""
        return [self.codec.encode(tensor, self.deviations[name]) for name, tensor in zip(names, tensors, strict=True)]

    def bytes_sent_per_step(self, model: nn.Module, world: int, micro_batches: int = 1) -> int:
        """What the last step sent: nothing between meetings."""
        return self._sent

    def predicted_bytes(self, params: Sequence[Tensor], world: int) -> int:
        """From packets of Gaussian numbers, a part `1 / every` of a meeting; measured, where a codec's packets vary."""
        total = 0.0
        for param in params:
            sample = torch.randn(min(param.numel(), 1 << 16), generator=torch.Generator().manual_seed(0))
            total += self.codec.encode(sample).numel() * param.numel() / max(1, sample.numel())
        return round((world - 1) * total / self.every)

    def metrics(self) -> dict[str, float]:
        """`bits_per_weight`: what this process said of each weight at the last meeting."""
        return {"bits_per_weight": self._bits}

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps, "agreed": self.agreed, "residuals": self.residuals, "momenta": self.momenta,
            "deviations": self.deviations, "bits": self._bits,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave. Call it after `attach`.

        Raises:
            UsageError: it names parameters that are not there, or lacks some.
        """
        if different := sorted(set(state_dict["agreed"]) ^ set(self._params)):
            raise UsageError(
                f"the state of exchange {type(self).__name__} is of another model: {different[0]!r} differs"
            )
        self.steps = state_dict["steps"]
        for name in ("agreed", "residuals", "momenta"):
            devices = {key: self._params[key].device for key in state_dict[name]}
            setattr(self, name, {key: tensor.to(devices[key]) for key, tensor in state_dict[name].items()})
        self.deviations, self._bits = dict(state_dict["deviations"]), state_dict["bits"]

    def resized(self, states: Sequence[dict[str, Any]], rank: int, world: int) -> dict[str, Any]:
        """Everybody begins with the agreed weights and the mean residual. What the old processes had learned since
        their last meeting is lost."""
        merged = {
            name: torch.stack([each["residuals"][name] for each in states]).mean(0) for name in states[0]["residuals"]
        }
        return {**states[0], "residuals": merged}

    def _meet(self) -> None:
        names = list(self._params)
        changes = [self._change(name) for name in names]
        finite = all(bool(torch.isfinite(change).all()) for change in changes)
        packets = self.encode_all(names, changes) if finite else [_not_finite()]
        self._bits = 8 * sum(packet.numel() for packet in packets) / max(1, sum(each.numel() for each in changes))
        everyones = self._decoded(self.channel.all_gather_packets(torch.cat(packets)), changes)
        for name, change, decoded in zip(names, changes, everyones, strict=True):
            total = torch.zeros_like(self.agreed[name])
            for each in decoded:  # in rank order, so that all processes get the same bits
                total += each.to(total).view_as(total)
            if self.residual:
                self.residuals[name] = change - decoded[self.channel.rank].to(change).view_as(change)
            mean = total / len(decoded)
            self._outer_step(name, mean if self.send == "changes" else mean - self.agreed[name])
            self._params[name].copy_(self.agreed[name])
        for buffer in self._buffers:
            buffer.copy_(self.channel.all_reduce(buffer.cpu().clone()) / self.channel.size)

    def _change(self, name: str) -> Tensor:
        own = _wide(self._params[name])
        change = own - self.agreed[name] if self.send == "changes" else own.clone()
        return change + self.residuals[name] if name in self.residuals else change

    def _decoded(self, messages: list[Tensor], changes: list[Tensor]) -> list[list[Tensor]]:
        """For every tensor what each process said of it.

        Raises:
            RunError: some process's weights are not finite.
            PacketError: a message cannot be used; it names whose.
        """
        rows = []
        for rank, message in enumerate(messages):
            try:
                packets = split(message)
                if len(packets) == 1 and unseal(packets[0]).flags & Flag.NON_FINITE:
                    raise RunError(f"rank {rank}'s weights are not finite at step {self.steps}")
                row = [self.codec.decode(packet) for packet in packets]
                if [each.numel() for each in row] != [change.numel() for change in changes]:
                    raise PacketError(
                        f"{len(row)} tensors of {sum(each.numel() for each in row)} numbers arrived instead of "
                        f"{len(changes)} of {sum(change.numel() for change in changes)}"
                    )
            except PacketError as error:
                raise PacketError(f"rank {rank} sent what cannot be used at step {self.steps}: {error}") from error
            rows.append(row)
        return [list(column) for column in zip(*rows, strict=True)]

    def _outer_step(self, name: str, change: Tensor) -> None:
        if self.outer_momentum:
            momentum = self.momenta.setdefault(name, torch.zeros_like(change))
            momentum.mul_(self.outer_momentum).add_(change)
            change = change + self.outer_momentum * momentum if self.nesterov else momentum
        self.agreed[name].add_(change, alpha=self.outer_lr)


def _not_finite() -> Tensor:
    return seal(Kind.DENSE, torch.empty(0, dtype=torch.uint8), 0, flags=Flag.NON_FINITE)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _deviation(param: Tensor) -> float:
    found = float(param.float().std()) if param.dim() > 1 and param.numel() > 1 else 0.0
    return found if found > 0 and math.isfinite(found) else _VECTOR_DEVIATION
