"""MoNNA: workers without a server that train on although up to f of n send whatever they like.

    m_i <- beta m_i + (1 - beta) g_i          momentum of worker i's own gradient g_i, at its own weights w_i
    x_i  = w_i - lr m_i                       the optimizer's step: SGD without a momentum of its own
    w_i <- mean of the n - f vectors x_j that are nearest to x_i, itself included

The momentum is what makes it work: it shrinks the differences between honest workers, so that a lie has to be small
not to be noticed. A worker believes nobody but itself; honest models stay close to each other, not equal.

Saves: the run, when a worker is broken, poisoned or hostile. Costs: every vector of P numbers goes to everybody,
(n - 1) 4P bytes sent by each worker in each step; one vector of momenta; n P numbers for what arrives, which is kept so
that it need not be sent a second time once distances are known; 2 n P operations.

All of a vector is compared at once, never one bucket of it: a lie could hide in one. Buffers of floating point, such as
the running statistics of BatchNorm, are part of the vector. A packet that is damaged or not finite is a lie among f.

Not prevented: that a liar tells different peers different things, or stops a collective, which then ends in a timeout;
that it asks all to stop; that rank 0, whose weights all start from, lies at the start. A slow worker counts among f.

Source: Farhadkhani, Guerraoui, Gupta, Hoang, Pinot and Stephan 2022 (Robust Collaborative Learning with Linear Gradient
Overhead, ICML 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from leantrain.errors import RunError, UsageError, nearest
from leantrain.exchange.channel import Channel, Collectives, Echo
from leantrain.exchange.dense import Dense
from leantrain.exchange.robust.aggregators import (
    AGGREGATORS,
    check_workers,
    nearest_neighbor_average,
    nearest_neighbor_mixing,
)
from leantrain.exchange.robust.distances import central_row, mean_of_rows, nearest_rows, squared_distances
from leantrain.exchange.robust.momenta import Momenta
from leantrain.exchange.robust.vectors import flat, gather, gathered_bytes, write

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

_NEAREST = "nearest_neighbor_average"


class MoNNA(Dense):
    """Momentum on every worker, and a robust rule instead of the average.

    Args:
        byzantine: f, how many of the n workers may lie, break or lag. More cost accuracy when all are honest; fewer
            than there are is unsafe. n > 2f, and what the rule needs beyond that.
        momentum: beta in [0, 1). Near 1 is what the defence rests on; the first 1 / (1 - beta) steps are short ones.
        rule: a name of `leantrain.exchange.robust.aggregators.AGGREGATORS`.
        mix: "models", the paper's: every worker has its own weights, and they are mixed after each step. "momenta":
            all have the same weights, and step along the aggregate of everybody's momenta; nobody's neighbourhood is
            then its own, and the nearest are those of the vector in the middle (`central_row`).
        premix: replace every vector by the mean of its n - f nearest before the rule (nearest-neighbour mixing).
        timeout_s: seconds that a peer may take; None: what LEANTRAIN_TIMEOUT_S says, else 600.

    In a loop of your own, with a plain or a DDP model:

        model = exchange.attach(model)        # the module itself for "models", a DDP model for "momenta"
        loss.backward()
        exchange.finish_gradients()           # .grad becomes the momentum
        optimizer.step()                      # torch.optim.SGD with momentum=0
        exchange.after_step()                 # models are mixed

    For "momenta", `attach` puts a communication hook on the DDP model, and backward alone does it all.

    Raises:
        UsageError: an argument is not allowed; when attached, too few workers for f and the rule.
    """

    def __init__(
        self,
        byzantine: int,
        momentum: float = 0.99,
        rule: str = _NEAREST,
        mix: Literal["models", "momenta"] = "models",
        premix: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        if not isinstance(byzantine, int) or byzantine < 0:
            raise UsageError(f"byzantine must be an integer >= 0, got {byzantine!r}")
        if not 0 <= momentum < 1:
            raise UsageError(f"momentum must be in [0, 1), got {momentum!r}")
        if rule not in AGGREGATORS:
            raise UsageError(f"rule {rule!r} is unknown{nearest(rule, AGGREGATORS)}")
        if mix not in ("models", "momenta"):
            raise UsageError(f"mix must be 'models' or 'momenta', got {mix!r}")
        if timeout_s is not None and not timeout_s > 0:
            raise UsageError(f"timeout_s must be a number of seconds above 0, got {timeout_s!r}")
        self.byzantine, self.momentum, self.rule, self.mix = byzantine, momentum, rule, mix
        self.premix, self.timeout_s = premix, timeout_s
        self.replicated = mix == "momenta"
        self.channel: Collectives = Echo(1)
        self.outgoing: Callable[[Tensor], Tensor] = _as_it_is
        """What is sent instead of this worker's vector: itself, unless a test makes the worker lie."""
        self.left_out: list[int] = []
        """How often this worker has left out each rank's vector, by rank; counted for nearest neighbours."""
        self._params: dict[str, nn.Parameter] = {}
        self._buffers: list[Tensor] = []
        self._momenta = Momenta({}, momentum)
        self._grad_scaler: Any = None
        self._hooked = False
        self._held: list[tuple[torch.futures.Future[Tensor], Tensor]] = []
        self._gradient: dict[int, Tensor] = {}
        self._sent, self._steps, self._spread, self._finished = 0, 0, 0.0, False

    # The stations of a step.

    def check_optimizer(self, optimizer: type[Optimizer]) -> None:
        """Refuse optimizers other than torch.optim.SGD, where momentum is kept or weights are mixed here.

        Raises:
            UsageError: it is another one.
        """
        if (self.mix == "models" or self.momentum > 0) and not issubclass(optimizer, SGD):
            raise UsageError(
                f"exchange MoNNA cannot be combined with optimizer {optimizer.__name__}: momentum is the exchange's, "
                "and what an optimizer remembers is not mixed; use torch.optim.SGD with momentum=0, or "
                "mix='momenta' with momentum=0, which robustly averages gradients for any optimizer"
            )

    def connect(self, optimizers: Sequence[Optimizer]) -> None:
        """Refuse a second momentum.

        Raises:
            UsageError: an optimizer is not plain SGD.
        """
        for optimizer in optimizers:
            self.check_optimizer(type(optimizer))
            for group in optimizer.param_groups:
                if self.momentum > 0 and group.get("momentum"):
                    raise UsageError(
                        f"exchange MoNNA has a momentum of its own, {self.momentum}: the optimizer's must be 0, got "
                        f"momentum={group['momentum']}"
                    )

    def attach(self, model: nn.Module, grad_scaler: torch.amp.GradScaler | None = None) -> nn.Module:
        """Start all workers from the weights of rank 0.

        Args:
            model: a plain module, or a DDP model that nobody has put a hook on.
            grad_scaler: the one whose factor the loss is multiplied with, if there is one.

        Returns:
            What to run: for "models" the module itself, unwrapped, for "momenta" a DDP model (with one process, the
            module).

        Raises:
            UsageError: the model is sharded (FSDP2), this exchange is in use, or there are too few workers.
        """
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        if self._params:
            raise UsageError("exchange MoNNA is attached to a model already; make another one for another model")
        if any(hasattr(param, "full_tensor") for param in inner.parameters()):
            raise UsageError("exchange MoNNA compares whole models, and this one is sharded; use FullyShard alone")
        self.channel, self._grad_scaler = Channel(self.timeout_s), grad_scaler
        world = self.channel.size
        if world > 1:
            check_workers(self.rule, world, self.byzantine)
        self.left_out = [0] * world
        self._params = {name: param for name, param in inner.named_parameters() if param.requires_grad}
        self._buffers = [buffer for buffer in inner.buffers() if self.mix == "models" and buffer.is_floating_point()]
        self._momenta = Momenta(self._params, self.momentum)
        if self.mix == "momenta":
            model = super().attach(model)
        if isinstance(model, DistributedDataParallel):
            self._hooked = self.mix == "momenta"
            hook = self._collect if self._hooked else _stay
            # DDP compares annotations with types and would not take the functions', which are text.
            model.register_comm_hook(None, lambda state, bucket: hook(bucket))
        elif world > 1:
            for tensor in (*inner.parameters(), *inner.buffers()):
                dist.broadcast(tensor.detach(), 0)
        return model if self._hooked else inner

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """Make `.grad` the momentum. One that is not finite stays as it is, for the caller to see, and leaves no trace.
        For "momenta", the backward pass of the DDP model has done it."""
        self._finished = True
        if self._hooked or self.momentum == 0:
            return
        params, scale = self._params.values(), self._scale()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        for param, momentum in zip(params, self._momenta.step(grads, scale), strict=True):
            param.grad = (momentum * scale).to(param.dtype)  # a copy: it may be clipped

    @torch.no_grad()
    def after_step(self, last: bool = False) -> None:
        """Mix the models.

        Raises:
            UsageError: `finish_gradients` was not called, so what was stepped was no momentum.
        """
        if self.mix == "momenta":
            return
        if not self._finished:
            raise UsageError("exchange MoNNA needs finish_gradients() between backward() and the optimizer's step")
        self._finished = False
        if self.channel.size > 1:
            self.channel.reset()
            own = flat(self._tensors())
            write(self._mixed(own, self._gather(own)), self._tensors())
            self._sent = self.channel.sent

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """In the block all workers have the aggregate of all models: by the rule, with the neighbourhood of the vector
        in the middle. Every worker must enter it.

        Raises:
            RunError: more than f models are not finite.
        """
        if self.replicated or self.channel.size == 1:
            yield
            return
        with torch.no_grad():
            before = [tensor.clone() for tensor in self._tensors()]
            agreed = self._agreed(self._gather(flat(before)))
            if not agreed.isfinite().all():
                raise RunError(f"more than byzantine={self.byzantine} of {self.channel.size} models are not finite")
            write(agreed, self._tensors())
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(self._tensors(), before, strict=True):
                    tensor.copy_(value)

    def bytes_sent_per_step(self, model: nn.Module, world: int, micro_batches: int = 1) -> int:
        """What this worker sent to mix the last step, packets' headers included; evaluations are not."""
        return self._sent

    def predicted_bytes(self, params: Sequence[Tensor], world: int) -> int:
        """Everybody's vector to everybody: (n - 1) (4P + headers). Buffers are not counted."""
        return gathered_bytes(params, world)

    def metrics(self) -> dict[str, float]:
        """`spread`: how far the farthest of the n - f nearest vectors is, relative to the own one's norm; and
        `left_out_RANK`: in what part of the steps so far this worker did without that rank's."""
        if self._steps == 0:
            return {}
        shares = {f"left_out_{rank}": count / self._steps for rank, count in enumerate(self.left_out) if count}
        return {"spread": self._spread, **shares}

    def state_dict(self) -> dict[str, Any]:
        """This worker's momenta, by parameter."""
        return self._momenta.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave in the process of the same rank. Call it after `attach`.

        Raises:
            UsageError: it was saved with another momentum, or for another model.
        """
        self._momenta.load_state_dict(state_dict)

    def resized(self, states: Sequence[dict[str, Any]], rank: int, world: int) -> dict[str, Any]:
        """Workers go on with their own momenta; a new one begins with those of an old one."""
        return states[rank % len(states)]

    # From gradients to momenta.

    def _scale(self) -> float:
        return 1.0 if self._grad_scaler is None else float(self._grad_scaler.get_scale())

    def _collect(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's hook for "momenta": hold every bucket until the last, then aggregate the whole vector."""
        if bucket.index() == 0:  # DDP reduces its buckets in their order
            self._held, self._gradient = [], {}
        buffer = bucket.buffer()
        future: torch.futures.Future[Tensor]
        future = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        self._held.append((future, buffer))
        self._gradient.update((id(p), grad) for p, grad in zip(bucket.parameters(), bucket.gradients(), strict=True))
        if bucket.is_last():
            with torch.no_grad():
                self._aggregate_gradients([self._gradient[id(param)] for param in self._params.values()])
            for each, filled in self._held:
                each.set_result(filled)
            self._held, self._gradient = [], {}
        return future

    def _aggregate_gradients(self, grads: list[Tensor]) -> None:
        """Overwrite this worker's gradients with the aggregate of everybody's momenta."""
        self.channel.reset()
        stack = self._gather(flat(self._momenta.step(grads, self._scale())))
        aggregate = self._agreed(stack)
        self._note(squared_distances(stack, aggregate), aggregate)
        write(aggregate * self._scale(), grads)
        self._sent = self.channel.sent

    # From vectors to one.

    def _gather(self, own: Tensor) -> Tensor:
        return gather(own, self.channel, self.outgoing)

    def _mixed(self, own: Tensor, stack: Tensor) -> Tensor:
        """This worker's next vector; its own where there is nothing better."""
        rank, f = self.channel.rank, self.byzantine
        stack[rank] = own
        if self.premix:
            stack = nearest_neighbor_mixing(stack, f)
        own = stack[rank]
        distances = squared_distances(stack, own)
        self._note(distances, own)
        if self.rule != _NEAREST:
            result = AGGREGATORS[self.rule](stack, f)
            return result if bool(result.isfinite().all()) else own
        nearest = nearest_rows(distances, len(stack) - f, rank)
        for other in set(range(len(stack))) - set(nearest or [rank]):
            self.left_out[other] += 1
        return own if nearest is None else mean_of_rows(stack, nearest)

    def _agreed(self, stack: Tensor) -> Tensor:
        """The same aggregate for all: no worker's own neighbourhood, but that of the vector in the middle."""
        if self.premix:
            stack = nearest_neighbor_mixing(stack, self.byzantine)
        if self.rule == _NEAREST:
            return nearest_neighbor_average(stack, self.byzantine, own=central_row(stack, self.byzantine))
        return AGGREGATORS[self.rule](stack, self.byzantine)

    def _note(self, distances: Tensor, centre: Tensor) -> None:
        self._steps += 1
        farthest = distances.sort().values[len(distances) - self.byzantine - 1]
        self._spread = float(farthest.sqrt() / centre.norm().clamp_min(1e-30))

    def _tensors(self) -> list[Tensor]:
        """What the vector is made of."""
        return [*(param.detach() for param in self._params.values()), *self._buffers]


def _as_it_is(vector: Tensor) -> Tensor:
    return vector


def _stay(bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's hook for "models", should somebody run the DDP model after all: gradients stay where they are."""
    buffer = bucket.buffer()
    future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
    future.set_result(buffer)
    return future
