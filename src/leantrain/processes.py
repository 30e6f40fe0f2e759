"""The processes that train together: how they start, what device each has, how they agree, and how they end.

Started by torchrun (or with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set), a process joins the others; started
by itself, it is the only one and torch.distributed is never touched.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from leantrain.errors import RunError, UsageError
from leantrain.lifeline import Lifeline, address_towards
from leantrain.meeting import meet
from leantrain.roll_call import RollCall

TIMEOUT_VARIABLE = "LEANTRAIN_TIMEOUT_S"
"""Environment variable: seconds after which a process that does not answer is given up."""
TIMEOUT_S = 600.0

_PATIENCE_S = 5.0
"""A process that is alive reports in milliseconds, on a loaded machine in a second."""
_TIME_IS_UP = ("timed out", "timeout")

_kept: list[Any] = []
"""Process groups and lifelines, kept to the end of the process. Taking a group down waits for gloo's threads, which may
wait for Python's lock. Python lets go of the lock before, but DDP's Reducer, if it is the last to hold the group, does
not, and everything stands still (seen in PyTorch 2.13). With a reference here it is never the last."""


@dataclass(frozen=True)
class World:
    """Which process this is: `rank` of `size`, training on `device`."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def highest(self, *values: float) -> list[float]:
        """Every value's maximum over the processes, the same list in all of them."""
        if self.size == 1:
            return list(values)
        highest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return highest.tolist()

    def total(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Every value's sum over the processes. All must pass the same keys in the same order."""
        if self.size == 1:
            return dict(sums)
        total = torch.tensor(list(sums.values()), dtype=torch.float64)
        dist.all_reduce(total)
        return dict(zip(sums, total.tolist(), strict=True))


def rank() -> int:
    """This process's number, 0 when it trains alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together, 1 when this one trains alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def succeeded_everywhere(succeeded: bool) -> bool:
    """Whether every process says so; a meeting point for all of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return succeeded
    failures = torch.tensor([0 if succeeded else 1])
    dist.all_reduce(failures)
    return not failures.item()


@contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """Join the other processes, if there are any, for the length of the block.

    Args:
        device: "cpu", "cuda" (one GPU per process of a machine, by LOCAL_RANK) or "auto".

    Raises:
        UsageError: a device that is not there, or environment variables that make no sense.
        RunError: the port is taken, the others cannot be reached, or one of them stops answering in the block.
    """
    chosen = choose_device(device)
    if dist.is_available() and dist.is_initialized():  # somebody else's group: use it and leave it
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
        return
    number, size = _whole_number("RANK", 0), _whole_number("WORLD_SIZE", 1)
    if size == 1:
        yield World(0, 1, chosen)
        return
    roll_call = _meet(number, size, chosen)
    world = World(number, size, chosen)
    _kept.append(dist.group.WORLD)
    try:
        yield world
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        late = any(word in str(error).lower() for word in _TIME_IS_UP)
        verdict = roll_call.verdict(timed_out=late, patience_s=min(_PATIENCE_S, timeout_s()))
        raise RunError(f"{verdict.sentence(number, size)}: {_first_line(error)}") from error
    finally:
        roll_call.close()
        dist.destroy_process_group()


def choose_device(device: str) -> torch.device:
    """The device of this process for "auto", "cpu" or "cuda"."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(f"device {device!r} is not there: torch {torch.__version__} sees no CUDA GPU (allowed: cpu)")
    index = _whole_number("LOCAL_RANK", 0)
    if index >= torch.cuda.device_count():
        raise UsageError(f"LOCAL_RANK={index} needs {index + 1} GPUs, this machine has {torch.cuda.device_count()}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


class StopRequest:
    """Whether somebody asked the run to end: SIGTERM or Ctrl-C."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._since = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # torchrun passes a terminal's Ctrl-C on to workers that have already had it, so a second one within a second
        # means nothing; a later one is a person who will not wait.
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._since > 1.0:
            raise KeyboardInterrupt


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """In the block SIGTERM and Ctrl-C only make a note; a second Ctrl-C stops at once. Main thread only."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # Python lets only that one have handlers
        yield request
        return
    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _meet(number: int, size: int, device: torch.device) -> RollCall:
    """Start the process group, with CPU tensors over gloo and CUDA tensors over NCCL."""
    wait = timedelta(seconds=timeout_s())
    address = f"{os.environ.get('MASTER_ADDR', '(MASTER_ADDR not set)')}:{os.environ.get('MASTER_PORT', '?')}"
    try:
        shared: Store = next(rendezvous("env://", number, size, timeout=wait))[0]
        shared.set_timeout(wait)
        lifeline = Lifeline(address_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        meeting = meet(shared, number, size, lifeline.address, wait.total_seconds())
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", meeting.store), rank=number, world_size=size, timeout=wait,
        )  # fmt: skip
    except (RuntimeError, ValueError, OSError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            problem = f"port {address} is already taken; choose another, as torchrun --master-port=29501"
        else:
            problem = f"process {number} of {size} cannot meet the others at {address}: {_first_line(error)}"
        raise RunError(problem) from error
    _kept.append(lifeline)
    return RollCall(PrefixStore("alive", meeting.store), number, meeting.notes)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because of a peer. gloo has no exception type of its own, only words."""
    if isinstance(error, dist.DistError):
        return True
    words = (
        "connection closed by peer", "connection reset", "timed out waiting", "broken pipe", "connectfullmesh",
        "application timeout",
    )  # fmt: skip
    return not isinstance(error, (RunError, UsageError)) and any(word in str(error).lower() for word in words)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _whole_number(variable: str, default: int) -> int:
    text: Any = os.environ.get(variable, default)
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{variable} must be a whole number, got {text!r}") from None


def timeout_s() -> float:
    """Seconds after which a process that does not answer is given up, from TIMEOUT_VARIABLE or the default."""
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UsageError(f"{TIMEOUT_VARIABLE} must be a number of seconds above 0, got {text!r}")
    return seconds
