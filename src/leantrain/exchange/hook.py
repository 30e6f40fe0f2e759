"""The part that all exchanges of gradients share: a communication hook of DDP with its traps handled once.

    backward ──► bucket is full ──► one worker thread: reduce(bucket) ──► DDP puts the result into .grad
                                    (in bucket order, on a channel of its own; may block)

What a subclass writes is `reduce`: plain, blocking code from this process's gradients to everybody's. Around it:

- State belongs to parameters by name. DDP arranges its buckets anew after the first step, so an index means nothing.
- New state is staged, and committed at the end of a backward pass in which everything arrived and was finite. A step
  that GradScaler skips or that failed leaves no trace.
- Collectives run in one thread, in bucket order, on a group of their own. Hooks that start a second collective from
  the first one's callback stand still as soon as two buckets are on their way (PyTorch 2.13, gloo).
- Errors come out of `backward()` as they are.

Source: Li et al. 2020 (PyTorch Distributed, VLDB) for buckets and hooks.
"""

from __future__ import annotations

import queue
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leantrain.errors import UsageError
from leantrain.exchange.channel import Channel, Collectives, Echo
from leantrain.exchange.dense import Dense
from leantrain.exchange.survivors import Survivors

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

OnLost = Literal["raise", "continue"]
State = dict[str, dict[str, Tensor]]
"""{parameter's name: {key: tensor}}"""


@dataclass
class Bucket:
    """Some parameters and this process's own gradients of them: not divided by the number of processes, and without
    GradScaler's factor. Read them; results are returned, not written here."""

    names: list[str]
    params: list[Tensor]
    grads: list[Tensor]
    """In their parameters' shapes, float32 or float64."""
    tag: int
    """A number that is the same in all processes for these parameters in this order, and hardly for any others."""
    finite: bool
    """Whether this process's gradients are."""
    _views: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def numel(self) -> int:
        return sum(grad.numel() for grad in self.grads)

    def nan(self) -> list[Tensor]:
        """The result where somebody's gradients are not finite: this step is not to be taken."""
        return [torch.full_like(grad, torch.nan) for grad in self.grads]


class GradientHook(Dense):
    """Base of exchanges that turn every process's gradients into one, bucket by bucket, behind the backward pass.

    Args:
        timeout_s: seconds that a peer may take, above 0; None: what LEANTRAIN_TIMEOUT_S says, else 600.
        on_lost: "raise" when a process is lost, or "continue" with those that are left. The latter is for your own
            loop, with nothing else that needs all processes, and a store that outlives them; see `survivors`.

    Without a second process there is no DDP: `finish_gradients`, called after the backward pass, does to `.grad` what
    the hook would have done.
    """

    def __init__(self, timeout_s: float | None = None, on_lost: OnLost = "raise") -> None:
        if timeout_s is not None and not timeout_s > 0:
            raise UsageError(f"timeout_s must be a number of seconds above 0, got {timeout_s!r}")
        if on_lost not in ("raise", "continue"):
            raise UsageError(f"on_lost must be raise or continue, got {on_lost!r}")
        self.timeout_s, self.on_lost = timeout_s, on_lost
        self.survivors: Survivors | None = None
        self._unsettled: list[tuple[Bucket, Callable[[], None]]] = []
        self.channel: Collectives = Echo(1)
        self.state: State = {}
        self.steps = 0
        """Backward passes whose results were committed."""
        self._staged: State = {}
        self._names: dict[int, str] = {}
        self._alone: nn.Module | None = None
        self._attached = self._poisoned = False
        self._failure: BaseException | None = None
        self._seen: set[int] = set()
        self._sent = 0
        self._grad_scaler: Any = None

    # What a subclass writes.

    def reduce(self, bucket: Bucket) -> list[Tensor]:
        """The gradients that everybody's optimizers are to see, in the shapes of `bucket.grads`.

        Runs in one thread, in the same order in all processes, without autograd. Raise what must be raised.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Settings under which the state makes sense; state saved under others is refused."""
        return {}

    # What it may use.

    @property
    def rank(self) -> int:
        return self.channel.rank

    @property
    def world(self) -> int:
        return self.channel.size

    def committed(self, name: str, key: str) -> Tensor | None:
        """State of the parameter `name`, None before it has any."""
        return self.state.get(name, {}).get(key)

    def stage(self, name: str, key: str, tensor: Tensor) -> None:
        """The state that the parameter will have if this step is taken. `tensor` is kept, not copied."""
        self._staged.setdefault(name, {})[key] = tensor

    # What callers use.

    def attach(self, model: nn.Module, grad_scaler: torch.amp.GradScaler | None = None) -> nn.Module:
        """Put the hook on a DDP model, or make one of a plain model where there are several processes.

        Args:
            model: a DDP model that nobody has put a hook on and that has not run backward, or a plain one.
            grad_scaler: the one whose factor the loss is multiplied with, if there is one.

        Raises:
            UsageError: the model is sharded (FSDP2), has gradients already, or this exchange is in use.
        """
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        self._check_attachable(inner)
        self._attached, self._grad_scaler = True, grad_scaler
        self._names = {id(param): name for name, param in inner.named_parameters()}
        channel = Channel(self.timeout_s)
        self.channel = channel
        attached = model if isinstance(model, DistributedDataParallel) else super().attach(model)
        if not isinstance(attached, DistributedDataParallel):
            self._alone = attached
            return attached
        if self.on_lost == "continue":
            if attached.find_unused_parameters or attached.will_sync_module_buffers():
                raise UsageError(
                    'on_lost="continue" needs a DDP model that sends nothing itself: make it with '
                    "broadcast_buffers=False and without find_unused_parameters"
                )
            self.survivors = Survivors(channel)
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name=type(self).__name__).start()
        # DDP compares annotations with types and would not take the method's, which are text.
        attached.register_comm_hook(None, lambda state, bucket: self._hook(bucket))
        return attached

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """In a single process: do to `.grad` what the hook does where there are several."""
        if self._alone is None:
            return
        params = [(name, param) for name, param in self._alone.named_parameters() if param.grad is not None]
        if not params:
            return
        self._begin()
        bucket = self._bucket([name for name, _ in params], [p for _, p in params], [_grad(p) for _, p in params])
        self._write(bucket, self.reduce(bucket))
        self._end()

    def bytes_sent_per_step(self, model: nn.Module, world: int, micro_batches: int = 1) -> int:
        """What the last step's backward pass sent, our packets' headers included, DDP's buffers not."""
        return self._sent

    def state_dict(self) -> dict[str, Any]:
        """This process's state: every process has its own."""
        return {"settings": self.settings(), "steps": self.steps, "state": self.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave in the process of the same rank. Call it after `attach`.

        Raises:
            UsageError: it was saved under other settings, or names parameters that are not there.
        """
        if state_dict["settings"] != self.settings():
            raise UsageError(
                f"the state of exchange {type(self).__name__} was saved with {state_dict['settings']}, "
                f"and this one has {self.settings()}"
            )
        if unknown := sorted(set(state_dict["state"]) - set(self._names.values())):
            raise UsageError(f"the state of exchange {type(self).__name__} is of another model: it has {unknown[0]!r}")
        self.state = {name: dict(entry) for name, entry in state_dict["state"].items()}
        self.steps = state_dict["steps"]

    def resized(self, states: Sequence[dict[str, Any]], rank: int, world: int) -> dict[str, Any]:
        """Every new process gets the mean of the old ones' states: so the sum of what was held back stays the same
        part of the mean gradient."""
        merged: State = {}
        for name, entry in states[0]["state"].items():
            merged[name] = {
                key: torch.stack([each["state"][name][key] for each in states]).mean(0)
                if tensor.is_floating_point()
                else tensor
                for key, tensor in entry.items()
            }
        return {**states[0], "state": merged}

    # How it works.

    def _check_attachable(self, model: nn.Module) -> None:
        name = type(self).__name__
        if self._attached:
            raise UsageError(f"exchange {name} is attached to a model already; make another one for another model")
        if any(hasattr(param, "full_tensor") for param in model.parameters()):
            raise UsageError(
                f"exchange {name} works on whole gradients, and this model is sharded; use FullyShard alone"
            )
        if any(param.grad is not None for param in model.parameters()):
            raise UsageError(f"exchange {name} must be attached before the first backward pass")

    def _hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's hook: hand the bucket to the worker thread."""
        buffer = bucket.buffer()
        future: torch.futures.Future[Tensor]
        future = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        ready = torch.cuda.current_stream(buffer.device).record_event() if buffer.is_cuda else None
        params, views = bucket.parameters(), bucket.gradients()
        # Not by the bucket's index: with static_graph all of the first step's are number 0. A parameter seen before
        # means that the pass before was left by an exception.
        if not self._seen or id(params[0]) in self._seen:
            self._begin()
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        self._seen.update(id(param) for param in params)

        def job() -> None:
            if ready is not None:
                torch.cuda.current_stream(buffer.device).wait_event(ready)
            if self._failure is None:
                try:
                    names = [self._names[id(param)] for param in params]
                    full = self._bucket(names, list(params), list(views))
                    if self.survivors is not None:  # the buffer holds this process's gradients until all have all
                        self._unsettled.append((full, lambda: future.set_result(buffer)))
                        self.survivors.attempt(lambda: self.reduce(full))
                        return
                    self._write(full, self.reduce(full))
                except BaseException as error:  # raised again at the end of the backward pass, in its thread
                    self._failure = error
            future.set_result(buffer)

        self._jobs.put(job)
        return future

    def _work(self) -> None:
        with torch.no_grad():
            while True:
                self._jobs.get()()

    def _begin(self) -> None:
        self._staged, self._poisoned, self._failure, self._seen = {}, False, None, set()
        self.channel.reset()

    def _end(self) -> None:
        """Once all buckets are through: raise what went wrong, or make the new state the state."""
        if self._alone is None:
            all_done = threading.Event()
            self._jobs.put(self._settle)
            self._jobs.put(all_done.set)
            all_done.wait()
        self._seen = set()
        if self._failure is not None:
            raise self._failure
        self._sent = self.channel.sent
        if not self._poisoned:
            for name, entry in self._staged.items():
                self.state.setdefault(name, {}).update(entry)
            self.steps += 1
        self._staged = {}

    def _settle(self) -> None:
        """Have the buckets' results in all processes that are left, and only then use them."""
        if self.survivors is None:
            return
        unsettled, self._unsettled = self._unsettled, []
        try:
            if self._failure is None:
                results = self.survivors.settle(undo=self._staged.clear)
                for (bucket, _), each in zip(unsettled, results, strict=True):
                    self._write(bucket, each)
        except BaseException as error:
            self._failure = error
        for _, resolve in unsettled:
            resolve()

    def _bucket(self, names: list[str], params: list[Tensor], views: list[Tensor]) -> Bucket:
        wide = [view if view.dtype == torch.float64 else view.float() for view in views]
        if self._grad_scaler is not None:  # state in true units: the factor changes between steps
            inverse = 1.0 / self._grad_scaler.get_scale()
            wide = [grad * inverse for grad in wide]
        tag = zlib.crc32("/".join(names).encode())
        return Bucket(names, params, wide, tag, all(_is_finite(grad) for grad in wide), views)

    def _write(self, bucket: Bucket, results: list[Tensor]) -> None:
        scale = 1.0 if self._grad_scaler is None else self._grad_scaler.get_scale()
        for view, result in zip(bucket._views, results, strict=True):
            view.copy_(result if scale == 1.0 else result * scale)
            if result.numel() and result.flatten()[0].isnan():
                self._poisoned = True


def _grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    least, most = torch.aminmax(tensor)  # either is NaN if any number is
    return bool(least.isfinite() & most.isfinite())
