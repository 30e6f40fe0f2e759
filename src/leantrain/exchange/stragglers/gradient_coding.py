"""Steps that do not wait for late workers: every part of a batch is computed by s + 1 of them, and any n - s suffice.

    computed   c_i = sum_j B[i, j] / n  g_j        by worker i, for the s + 1 of n chunks where B[i, j] is not 0
    sent       c_i, to rank 0                      g_j: mean gradient of chunk j, all parameters in one vector
    decoded    g = sum_{i in I} a_i c_i            by rank 0 from the first answers I that suffice; g = mean_j g_j
    sent       g, to everybody                     late workers too: they take the same steps, later

Saves: the time for which a step waits, as long as at most s workers are late. Costs: s + 1 times the computing; rank 0
sends and receives the gradient of every other worker, where a ring would share that out; and memory of rank 0 for n + 1
gradients, and in a late worker for those that it has still to apply. The gradient is exact up to rounding.

It pays where s c < D (P[>= 1 late] - P[> s late]), for a step that computes c seconds and workers late by D seconds.

Source: Tandon, Lei, Dimakis and Karampatziakis 2017 (Gradient Coding, ICML).
"""

from __future__ import annotations

import atexit
import math
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from leantrain.errors import UsageError
from leantrain.exchange.dense import Dense
from leantrain.exchange.protocol import Share, Splittable
from leantrain.exchange.stragglers.coordinator import Coordinator
from leantrain.exchange.stragglers.gradient_codes import (
    Decoder,
    amplification,
    choose_code,
    circulant,
    fractional_repetition,
    random_cyclic,
)
from leantrain.exchange.stragglers.link import Link, connect_all
from leantrain.exchange.stragglers.messages import Message, Topic, message_bytes
from leantrain.processes import timeout_s as default_timeout_s
from leantrain.processes import world_size

Code = Literal["best", "repetition", "circulant", "random"]
CODES: dict[str, Callable[[int, int], Tensor]] = {
    "best": choose_code,
    "repetition": fractional_repetition,
    "circulant": circulant,
    "random": random_cyclic,
}
LARGEST_ERROR = 1e-4
"""Relative error of a decoded gradient, A eps, above which a code is refused."""
_CONTROL = 3
"""Numbers that come before who is gone: answers used, steps the last worker is behind, steps that waited for one."""


class GradientCoding(Dense):
    """Gradients from the first n - s of n workers, exactly; a late worker catches up, a dead one is done without.

    There is no DDP: `shares` says what a worker computes, and `finish_gradients` puts the mean gradient of the whole
    batch into `.grad`, the same bits in every process. A worker that finds a step decided before it has begun computes
    nothing for it: `shares` is then empty.

    Args:
        stragglers: s, how many workers a step can do without, at least 0 and below the number of processes.
        code: "repetition" (s + 1 must divide n), "circulant" (n + s odd), "random", or "best": the first that there is.
        max_behind: steps that a late worker may be behind before the others wait for it. It keeps as many gradients.
        timeout_s: seconds that others wait for a worker before it is given up, above 0; None: LEANTRAIN_TIMEOUT_S.

    Raises:
        UsageError: a setting out of range.

    Examples:
        >>> from leantrain.data import Batch
        >>> exchange = GradientCoding(stragglers=1)
        >>> model = exchange.attach(nn.Linear(4, 1))
        >>> batch = Batch(torch.randn(8, 4), torch.randn(8, 1), torch.arange(8))
        >>> for share in exchange.shares(batch, rank=0, world=1):
        ...     loss = nn.functional.mse_loss(model(share.batch.inputs), share.batch.targets)
        ...     (share.weight * loss).backward()
        >>> exchange.finish_gradients()
    """

    knows_loss: ClassVar[bool] = True

    def __init__(
        self, stragglers: int = 1, code: Code = "best", max_behind: int = 16, timeout_s: float | None = None
    ) -> None:
        if stragglers < 0:
            raise UsageError(f"stragglers must be a whole number from 0, got {stragglers!r}")
        if code not in CODES:
            raise UsageError(f"code must be one of {', '.join(CODES)}, got {code!r}")
        if max_behind < 1:
            raise UsageError(f"max_behind must be a whole number of steps from 1, got {max_behind!r}")
        if timeout_s is not None and not timeout_s > 0:
            raise UsageError(f"timeout_s must be a number of seconds above 0, got {timeout_s!r}")
        self.stragglers, self.code, self.max_behind, self.timeout_s = stragglers, code, max_behind, timeout_s
        self.matrix = torch.ones(1, 1, dtype=torch.float64)
        self.gone: set[int] = set()
        """Ranks of workers that were given up."""
        self.skipped = 0
        """Steps for which this worker computed nothing, because they were decided without it."""
        self._link: Link | None = None
        self._coordinator: Coordinator | None = None
        self._params: list[nn.Parameter] = []
        self._dtype = torch.float32
        self._step, self._rank, self._sent = 0, 0, 0
        self._skips, self._finite = False, True
        self._told: Tensor | float = 0.0
        self._values: tuple[float, ...] = ()
        self._highest: tuple[float, ...] = ()
        self._metrics: dict[str, float] = {}

    def attach(self, model: nn.Module) -> nn.Module:
        """Give all processes rank 0's weights and connect them. All must call it; unchanged in a single process.

        Args:
            model: a plain one. Of a DDP model the module inside is returned, and must be the one to run: DDP itself
                would wait for everybody.

        Raises:
            UsageError: `stragglers` is not below the number of processes, the code would make rounding errors larger
                than 1e-4 of the gradient, or the model has layers whose replicas would part ways (BatchNorm).
        """
        world = world_size()
        if world == 1:
            return model
        if self._link is not None:
            raise UsageError("exchange GradientCoding is attached to a model already; make another one for another")
        inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self._params = [param for param in inner.parameters() if param.requires_grad]
        self._check(inner, world)
        self.matrix = CODES[self.code](world, self.stragglers)
        self._dtype = torch.float64 if any(p.dtype == torch.float64 for p in self._params) else torch.float32
        self._check_error(world)

        timeout = default_timeout_s() if self.timeout_s is None else self.timeout_s
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        assert isinstance(group, dist.ProcessGroup)
        _broadcast(inner, group)
        mine, everybodys = connect_all(group, timeout)
        shape = self._numbers(self._params), len(self._params)
        largest = 2 * message_bytes(world + 1000, shape[0], self._dtype.itemsize, shape[1])
        self._rank, self._link = group.rank(), Link(mine, largest, timeout)
        if everybodys:
            self._coordinator = Coordinator(Decoder(self.matrix), everybodys, largest, shape, self.max_behind, timeout)
            self._coordinator.start()
        atexit.register(self.close)
        return inner

    def shares(self, batch: Splittable, rank: int, world: int, accumulate: int = 1) -> list[Share]:
        """The chunks of this worker, each in `accumulate` micro-batches; none if the step is decided already.

        Share.place is the chunk's number. Whoever computes a chunk must draw the same random numbers for it: seed them
        by step and place where there is dropout.

        Raises:
            UsageError: the batch cannot be cut into as many chunks as there are processes, of equal size.
        """
        if self._link is None:
            return super().shares(batch, rank, world, accumulate)
        self._skips = self.decided()
        self.skipped += self._skips
        if self._skips:
            return []
        row = self.matrix[rank] / (world * accumulate)
        chunks = row.nonzero().flatten().tolist()
        return [
            Share(part, float(row[chunk]), place=chunk)
            for chunk in chunks
            for part in batch.shard(chunk, world).split(accumulate)
        ]

    def decided(self) -> bool:
        """Whether this step was decided without this worker, which may then leave out what it has not computed yet."""
        return self._link is not None and self._link.is_decided(self._step)

    def tell_loss(self, loss: Tensor | float) -> None:
        """Before `finish_gradients`: this worker's sum of weight times loss over its shares. It is coded as gradients
        are, and travels with them."""
        self._told = loss

    def known_loss(self) -> Tensor:
        """After `finish_gradients`: the mean loss of the whole batch, the same number in every process."""
        return torch.as_tensor(self._told)

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """Answer for this step, and put the decoded gradient of the whole batch into `.grad`.

        Raises:
            RunError: more workers are gone than the code can do without, this one was given up, or rank 0 is gone.
        """
        if self._link is None:
            return
        if self._skips or self.decided():
            message = Message(Topic.PASS, self._step, self._values)
        else:
            message = Message(Topic.ANSWER, self._step, self._values, self._flat(), self._used())
        self._sent = self._link.send(message)
        self._take(self._link.take(self._step))
        self._step, self._skips, self._values = self._step + 1, False, ()

    def agree(self, values: Sequence[float], always: bool = False) -> list[float] | None:
        """What workers say here travels with their next gradient; the maxima that came with the last one come back.

        Only with `always`, and after a gradient that is not finite, which all see in the same step, do all wait for
        all, the late ones too.
        """
        if self._link is None:
            return list(values)
        self._values = tuple(values)
        if always or not self._finite:
            return list(self._link.meet(self._step, self._values))
        return list(self._highest) or None

    def bytes_sent_per_step(self, model: nn.Module, world: int, micro_batches: int = 1) -> int:
        """What this process sent in the last step. Rank 0 sends the decoded gradient to every other worker."""
        return self._sent

    def predicted_bytes(self, params: Sequence[Tensor], world: int) -> int:
        """Those of rank 0, which sends most: the decoded gradient to each of the others. They send it one each."""
        size = max((param.element_size() for param in params), default=4)
        numbers = self._numbers(params)
        return (world - 1) * message_bytes(_CONTROL + world, numbers, 8 if size == 8 else 4, len(params))

    def metrics(self) -> dict[str, float]:
        """Of the last step: answers that were there when it was decided, steps that the last worker was behind, and
        workers that are gone; and how many steps so far had to wait for one that was too far behind."""
        return self._metrics

    def close(self) -> None:
        """End the connections, once everybody has been sent what was decided. Happens by itself as a process ends."""
        if self._link is None:
            return
        self._link.close()
        if self._coordinator is not None:
            self._coordinator.join(self._coordinator.timeout_s)
        self._link = self._coordinator = None
        atexit.unregister(self.close)

    def _take(self, decided: Message) -> None:
        """Make what was decided this process's gradient and control numbers."""
        vector, used, world = decided.numbers, decided.rest, len(self.matrix)
        assert vector is not None
        gone = {rank for rank, is_gone in enumerate(decided.values[_CONTROL : _CONTROL + world]) if is_gone}
        self._highest = decided.values[_CONTROL + world :]
        answers, behind, waited = decided.values[:_CONTROL]
        self._metrics = {"answers": answers, "behind": behind, "waited": waited, "gone": len(gone)}
        if self._rank == 0:
            size = message_bytes(len(decided.values), vector.numel(), vector.element_size(), used.numel())
            self._sent = (world - 1 - len(gone)) * size
        if new := sorted(gone - self.gone):
            names = ", ".join(f"rank {rank}" for rank in new)
            warnings.warn(f"gradient coding goes on without {names} of {world}", RuntimeWarning, stacklevel=3)
        self.gone = gone
        *pieces, loss = vector.split([*(param.numel() for param in self._params), 1])
        self._told, self._finite = loss[0].clone(), bool(vector.isfinite().all())
        for param, piece, is_used in zip(self._params, pieces, used.tolist(), strict=True):
            if not is_used:
                param.grad = None
            elif param.grad is None:
                param.grad = piece.view(param.shape).to(param.device, param.dtype, copy=True)
            else:
                param.grad.copy_(piece.view(param.shape))

    def _flat(self) -> Tensor:
        """This worker's gradient of everything, and its loss behind it."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]
        pieces = [grad.detach().reshape(-1).to("cpu", self._dtype) for grad in grads]
        return torch.cat([*pieces, torch.as_tensor(self._told).detach().reshape(1).to("cpu", self._dtype)])

    def _used(self) -> Tensor:
        return torch.tensor([param.grad is not None for param in self._params], dtype=torch.uint8)

    @staticmethod
    def _numbers(params: Sequence[Tensor]) -> int:
        return sum(param.numel() for param in params) + 1  # the loss

    def _check(self, model: nn.Module, world: int) -> None:
        if self.stragglers >= world:
            raise UsageError(
                f"stragglers={self.stragglers} must be below the number of processes, which is {world}: at least one "
                "has to answer"
            )
        if any(hasattr(param, "full_tensor") for param in model.parameters()):
            raise UsageError("exchange GradientCoding works on whole gradients, and this model is sharded")
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats and module.training:
                raise UsageError(
                    f"exchange GradientCoding cannot train {type(module).__name__} {name!r}: workers compute different "
                    "chunks, so its running statistics would differ; use GroupNorm or LayerNorm, or freeze it by eval()"
                )

    def _check_error(self, world: int) -> None:
        """Refuse a code that rounding spoils. In repetition gradients are only added, as they are without a code."""
        worst = amplification(self.matrix, self.stragglers)
        adds = bool((self.matrix == self.matrix.round()).all())
        eps = max(torch.finfo(dtype).eps for dtype in ({self._dtype} if adds else {p.dtype for p in self._params}))
        if worst * eps > LARGEST_ERROR:
            repetition = [s for s in range(1, world) if world % (s + 1) == 0]
            raise UsageError(
                f"gradient coding with stragglers={self.stragglers} of {world} processes would be wrong by up to "
                f"{worst * eps:.0e} of the gradient (amplification {worst:.0f}, rounding {eps:.0e}); with stragglers="
                f"{' or '.join(map(str, repetition))} the code is repetition, which amplifies nothing"
            )


def mean_step_seconds(n: int, s: int, probability: float, compute_s: float, delay_s: float) -> float:
    """Expected time of a step of n workers that can do without s, each late with `probability`, independently.

    (s + 1) c + D P[more than s of n are late]; s = 0 is a step that waits for all. Sending is not counted.

    Args:
        compute_s: c, seconds to compute one n-th of the batch.
        delay_s: D, by how many seconds a late worker is late.
    """
    in_time = sum(math.comb(n, k) * probability**k * (1 - probability) ** (n - k) for k in range(s + 1))
    return (s + 1) * compute_s + delay_s * (1 - in_time)


def _broadcast(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Give all processes rank 0's weights and buffers."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            value = tensor.detach().cpu().contiguous()
            dist.broadcast(value, group=group, group_src=0)
            tensor.copy_(value)
