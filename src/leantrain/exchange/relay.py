"""One process per block of layers: features go on to the next process as soon as they are there; nothing comes back.

    process k    h_{k-1} from process k - 1, or the batch's inputs for k = 0
                 h_k = f_k(h_{k-1}), sent to process k + 1 at once
                 L_k = loss(g_k(h_k), y); backward pass and step of block k alone, while process k + 1 computes

For learners whose blocks have losses of their own (`leantrain.learn.LocalUpdates`); the weights after every step are
those of one process that trains all blocks. With a_k, b_k, c_k the seconds of a block's forward pass, backward pass and
auxiliary head, a step takes max(a_k + b_k + c_k) instead of their sum, after K - 1 steps in which the row fills: there
is no bubble. Saves time, and in each process the gradients, optimizer state and activations of the other blocks. Costs
the heads and, per step and boundary, the bytes of the features and a header of 80 for every micro-batch, which is half
of what a pipeline sends. Every process has the weights of all blocks, but trains its own; the others' are as old as the
last `consensus`.

Gloo's messages only move while somebody waits for them, so two threads do: one takes what comes from the process before
and one sends to the one after, each on a process group of its own. They live from one meeting of all processes to the
next, and end with a message that says so.

Sources: Belilovsky, Eickenberg & Oyallon 2020 (ICML, arXiv 1901.08164); Laskin et al. 2020 (arXiv 2012.03837).
"""

from __future__ import annotations

import atexit
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from queue import Empty, Full, Queue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leantrain.errors import RunError, UsageError
from leantrain.exchange.channel import Channel
from leantrain.exchange.dense import Stations, highest
from leantrain.exchange.protocol import Share, Splittable
from leantrain.processes import timeout_s as default_timeout_s
from leantrain.roll_call import in_background

_DIMENSIONS = 8
_HEADER = 2 + _DIMENSIONS
"""int64 numbers before a message's bytes: its type's place in _DTYPES, or _END; how many dimensions; and these."""
HEADER_BYTES = 8 * _HEADER
_END = -1
_LEAVING_S = 2.0
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Relay(Stations):
    """Process k trains block k of a learner that can `join`, on the whole batch. One process alone trains all blocks.

    Args:
        queue: micro-batches of features that may wait on either side of a boundary, >= 1: how far a process may be
            ahead of the next one.
        meet_every: steps after which all processes meet to agree on time and on stopping, >= 1. A meeting costs the
            time in which the row empties and fills again.
        timeout_s: seconds that a peer may take, above 0; None: what LEANTRAIN_TIMEOUT_S says, else 600.

    Raises:
        UsageError: an argument is out of its range.

    Examples:
        learner = LocalUpdates(model, "classification", blocks=2, sample=images[:2])
        relay = Relay()
        learner.attach(relay.attach(learner.module))
        relay.join(learner)  # in two processes
        optimizer = torch.optim.AdamW(learner.module.parameters())
        for batch in batches:  # the same in all processes
            learner.step(batch)
            optimizer.step()
            optimizer.zero_grad()
            relay.after_step()
        with relay.consensus():
            torch.save(model.state_dict(), "model.pt")
    """

    replicated = False

    def __init__(self, queue: int = 4, meet_every: int = 16, timeout_s: float | None = None) -> None:
        for name, value in (("queue", queue), ("meet_every", meet_every)):
            if value < 1:
                raise UsageError(f"{name} must be a whole number from 1, got {value!r}")
        if timeout_s is not None and not timeout_s > 0:
            raise UsageError(f"timeout_s must be a number of seconds above 0, got {timeout_s!r}")
        self.queue, self.meet_every, self.timeout_s = queue, meet_every, timeout_s
        self.steps = 0
        self.link: Link | None = None
        self._channel: Channel | None = None
        self._tensors: Sequence[Sequence[Tensor]] = ()
        self._current_at = -1
        """The step after which all processes have had all blocks' weights."""
        self._before = self._sent = 0

    def attach(self, model: nn.Module) -> nn.Module:
        """The model itself, with rank 0's weights in all processes.

        Raises:
            UsageError: it is wrapped by DDP or sharded by FSDP2, or this exchange is attached to one already.
        """
        if self._channel is not None:
            raise UsageError("exchange Relay is attached to a model already; make another one")
        sharded = any(hasattr(param, "full_tensor") for param in model.parameters())
        if isinstance(model, DistributedDataParallel) or sharded:
            raise UsageError(
                "exchange Relay needs a plain model: wrapped (DDP) or sharded (FSDP2) it trains as a whole"
            )
        self._channel = Channel(self.timeout_s)
        if self._channel.size > 1:
            with torch.no_grad():
                for tensor in model.state_dict().values():
                    tensor.copy_(self._channel.broadcast(tensor.cpu()))
            seconds = default_timeout_s() if self.timeout_s is None else self.timeout_s
            self.link = Link(self._channel.rank, self._channel.size, self.queue, seconds)
        return model

    def join(self, learner: Any) -> None:
        """Give every process its block of `learner`. Call it after `attach`, in all processes.

        Args:
            learner: its `join(link)` makes it train only block `link.block`, and returns the tensors of every block
                that training changes: [link.blocks] lists.

        Raises:
            UsageError: it has no blocks that could be trained apart, or not as many as there are processes.
        """
        if self.link is None:
            return
        if not hasattr(learner, "join"):
            raise UsageError(
                f"exchange Relay trains one block in every process, which learn={type(learner).__name__} cannot; "
                "LocalUpdates can"
            )
        self._tensors = learner.join(self.link)

    def shares(self, batch: Splittable, rank: int, world: int, accumulate: int) -> list[Share]:
        """The whole batch: every process does its part of the model for all of it."""
        parts = batch.split(accumulate)
        return [Share(part, 1 / len(parts), place=rank) for part in parts]

    def gradient_sync(self, model: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """Gradients stay where they are in any case."""
        return nullcontext()

    def known_loss(self) -> Tensor:
        """The last block's, which is the model's. The loop logs the mean over processes, so it counts there as often
        as there are processes, and the others' only if they are not finite."""
        if self.link is None:
            return self._loss
        return self._loss * (self.link.blocks if self.link.block == self.link.blocks - 1 else 0)

    def agree(self, values: Sequence[float], always: bool = False) -> list[float] | None:
        """Processes meet every `meet_every` steps."""
        if self.link is not None and not always and (self.steps + 1) % self.meet_every:
            return None
        self.pause()
        return highest(values)

    def after_step(self, last: bool = False) -> None:
        """Count a step."""
        self.steps += 1
        if self.link is not None:
            self._before, self._sent = self.link.sent, self.link.sent - self._before

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """In the block, and after it until the next step, all processes have the weights of all blocks."""
        self.pause()
        if self.link is not None and self._current_at != self.steps:
            self._spread()
            self._current_at = self.steps
        yield

    def pause(self) -> None:
        """Wait until everything sent has arrived, and end the threads; the next step starts them anew.

        Raises:
            torch.distributed.DistNetworkError: a neighbour is gone.
        """
        if self.link is not None:
            self.link.pause()

    def bytes_sent_per_step(self, model: nn.Module, world: int, micro_batches: int = 1) -> int:
        """What this process sent in the last step: none in the last process. What `consensus` sends is not in it."""
        return self._sent

    def predicted_bytes(self, params: Sequence[Tensor], world: int) -> int:
        """Not to be had from parameters.

        Raises:
            UsageError: always.
        """
        raise UsageError("what exchange Relay sends depends on the batch and on where the model is cut, not on weights")

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]

    def resized(self, states: Sequence[dict[str, Any]], rank: int, world: int) -> dict[str, Any]:
        """Not to be had: each process has the optimizer of its block alone.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"exchange Relay has one process per block: {len(states)} of them cannot go on as {world}")

    @torch.no_grad()
    def _spread(self) -> None:
        """Every block's tensors from the process that trains it to all others."""
        assert self._channel is not None
        for block, tensors in enumerate(self._tensors):
            for tensor in tensors:
                copy = tensor.detach().cpu().contiguous()
                dist.broadcast(copy, group=self._channel.group, group_src=block)
                tensor.copy_(copy)


class Link:
    """One process's place in the row: from whom features come, and to whom they go. All processes must make theirs.

    Args:
        rank, size: which process this is, and of how many.
        room: micro-batches that may wait at each of its ends.
        timeout_s: seconds that a neighbour may take.
    """

    def __init__(self, rank: int, size: int, room: int, timeout_s: float) -> None:
        wait = timedelta(seconds=timeout_s)
        pairs = [dist.new_group([each, each + 1], backend="gloo", timeout=wait) for each in range(size - 1)]
        self.block, self.blocks = rank, size
        self.sent = 0
        """Bytes so far, headers included."""
        self._above = _Receiver(pairs[rank - 1], rank - 1, room) if rank else None
        self._below = _Sender(pairs[rank], rank + 1, room) if rank < size - 1 else None
        for neighbour in (self._above, self._below):  # the last one leaves first
            if neighbour is not None:
                atexit.register(neighbour.leave)

    def receive(self) -> Tensor:
        """The block's next input, on the CPU. Not for the first block.

        Raises:
            torch.distributed.DistNetworkError: the process before is gone or silent.
        """
        assert self._above is not None
        return self._above.take()

    def send(self, features: Tensor) -> None:
        """Pass a block's output on; it may be changed afterwards. Waits while `room` of them are waiting. Not for the
        last block.

        Raises:
            torch.distributed.DistNetworkError: the process after is gone or silent.
        """
        assert self._below is not None
        copy = features.detach().to("cpu", copy=True).contiguous()
        self._below.give(copy)
        self.sent += HEADER_BYTES + copy.numel() * copy.element_size()

    def pause(self) -> None:
        """End both threads, after everything sent has arrived."""
        if self._below is not None and self._below.working:
            self._below.end()
            self.sent += HEADER_BYTES
        if self._above is not None and self._above.working:
            self._above.end()


class _Neighbour(ABC):
    """What a thread does for one neighbour, with a queue between it and the main thread."""

    features: str
    """What features do."""

    def __init__(self, group: Any, peer: int, room: int) -> None:
        self.group, self.peer = group, peer
        self.waiting: Queue[Tensor | None] = Queue(room)
        """What is to be sent or has arrived; None is the end."""
        self.thread: threading.Thread | None = None
        self.problem: str | None = None
        """What went wrong in the thread. Not the exception, whose frames would hold a handle of gloo's to the end."""
        self.leaving = False

    @property
    def working(self) -> bool:
        return self.thread is not None

    def start(self) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self.serve, daemon=True, name=f"{type(self).__name__} {self.peer}")
            self.thread.start()

    def join(self) -> None:
        assert self.thread is not None
        self.thread.join()
        self.thread = None
        self.check()

    def check(self) -> None:
        """Raise in the main thread what went wrong in the other one."""
        if self.problem is not None:  # of this type, so that those who started the processes find out whose fault it is
            raise dist.DistNetworkError(f"no features {self.features} rank {self.peer}: {self.problem}")

    def leave(self) -> None:
        """Give the thread time to end, after a failure. Python aborts if it comes back from gloo while Python ends, and
        it comes back when the neighbour, who leaves as well, is gone."""
        self.leaving, deadline = True, time.monotonic() + _LEAVING_S
        while self.thread is not None and self.thread.is_alive() and time.monotonic() < deadline:
            self.make_way()
            self.thread.join(0.01)

    @abstractmethod
    def make_way(self) -> None:
        """Let a thread that waits at the queue go on."""

    def serve(self) -> None:
        """The thread's."""
        with in_background():
            self.work()

    @abstractmethod
    def work(self) -> None:
        """Pass on what there is, until the end."""


class _Receiver(_Neighbour):
    features = "come from"

    def take(self) -> Tensor:
        self.start()
        features = self.waiting.get()
        if features is None:
            self.waiting.put(None)  # whoever asks again is told again
            self.check()
            raise RunError(f"rank {self.peer} has taken fewer steps than the process after it")
        return features

    def end(self) -> None:
        if self.waiting.get() is not None:
            raise RunError(f"rank {self.peer} has taken more steps than the process after it")
        self.join()

    def make_way(self) -> None:
        with suppress(Empty):
            self.waiting.get_nowait()

    def work(self) -> None:
        try:
            while (features := self.receive()) is not None:
                self.waiting.put(features)
        except Exception as error:
            self.problem = _first_line(error)
        if not self.leaving:
            self.waiting.put(None)

    def receive(self) -> Tensor | None:
        header = torch.empty(_HEADER, dtype=torch.int64)
        dist.recv(header, group=self.group, group_src=0)
        kind, dimensions, *shape = header.tolist()
        if kind == _END:
            return None
        features = torch.empty(shape[:dimensions], dtype=_DTYPES[kind])
        dist.recv(_bytes(features), group=self.group, group_src=0)
        return features


class _Sender(_Neighbour):
    features = "go to"

    def give(self, features: Tensor) -> None:
        if features.dim() > _DIMENSIONS or features.dtype not in _DTYPES:
            raise UsageError(
                f"exchange Relay sends floating-point features of at most {_DIMENSIONS} dimensions, got "
                f"{str(features.dtype).removeprefix('torch.')}{list(features.shape)}"
            )
        self.start()
        self.check()
        self.waiting.put(features)

    def end(self) -> None:
        self.waiting.put(None)
        self.join()

    def make_way(self) -> None:
        with suppress(Full):
            self.waiting.put_nowait(None)

    def work(self) -> None:
        while (features := self.waiting.get()) is not None:
            if self.problem is None and not self.leaving:  # else it is only taken away, so that nobody waits for room
                padding = [0] * (_DIMENSIONS - features.dim())
                header = [_DTYPES.index(features.dtype), features.dim(), *features.shape, *padding]
                self.send(torch.tensor(header), _bytes(features))
        if not self.leaving:
            self.send(torch.tensor([_END] + [0] * (_HEADER - 1)))

    def send(self, *tensors: Tensor) -> None:
        try:
            for tensor in tensors:
                dist.send(tensor, group=self.group, group_dst=1)
        except Exception as error:
            self.problem = self.problem or _first_line(error)


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as numbers that gloo can send whatever they stand for."""
    return tensor.view(-1).view(torch.uint8)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
