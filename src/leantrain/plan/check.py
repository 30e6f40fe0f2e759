"""Two real steps, measured: what a plan is held to."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from leantrain.data import Batch
from leantrain.learn.activation_checkpointing import checkpointed
from leantrain.learn.protocol import Learner
from leantrain.ledger.ledger import Ledger
from leantrain.ledger.storages import storage_bytes
from leantrain.optim.in_backward import step_in_backward
from leantrain.plan.live import forget_tables
from leantrain.plan.subject import Subject

STEPS = 2


@dataclass(frozen=True)
class Measured:
    """What two steps held at most, in bytes."""

    by_kind: dict[str, int | None]
    """Each kind's own peak, as the ledger measures it."""
    peak: int
    """Of PyTorch's allocator: everything that tensors and kernels asked it for."""
    process: int | None
    """Growth of the whole process, its libraries and Python objects included; None on a GPU."""


def measure(
    subject: Subject,
    make: Callable[[nn.Module], Sequence[Optimizer]],
    *,
    dtype: torch.dtype | None = None,
    checkpoint: bool = False,
    in_backward: bool = False,
    device: str = "cpu",
) -> Measured:
    """Train two steps as the arguments say, and measure.

    Args:
        subject: what is trained, on one micro-batch over and over.
        make: builds the optimizers for the model.
        dtype: format of the weights; None leaves it to the model.
        checkpoint: whether repeated blocks keep only their inputs.
        in_backward: whether each parameter is stepped as soon as its gradient is complete.
        device: "cpu" or "cuda".
    """
    forget_tables()  # so that they are made, and counted, here
    with torch.device(device):
        model = subject.build_model()
    model = model.to(device) if dtype is None else model.to(device, dtype)
    batch = subject.batch().to(device)
    optimizers = list(make(model))
    if in_backward:
        (optimizer,) = optimizers
        optimizers = [step_in_backward(model, optimizer, max_norm=subject.clip)]
    learner = subject.build_learner(model, batch.inputs)
    held = storage_bytes([*model.parameters(), *model.buffers(), batch.inputs, batch.targets, batch.ids])
    ledger = Ledger(model, optimizers, memory_every=1)
    with checkpointed(model) if checkpoint else nullcontext():
        peak = _allocated(lambda: _train(subject, model, learner, optimizers, batch, ledger), held, device)
    found = ledger.summary()["peak_bytes"]
    kinds = {kind: found[kind] for kind in ("parameters", "gradients", "optimizer_state", "activations")}
    return Measured(kinds, peak, None if device == "cuda" else found["total"])


def _train(
    subject: Subject, model: nn.Module, learner: Learner, optimizers: list[Optimizer], batch: Batch, ledger: Ledger
) -> None:
    params = [param for param in model.parameters() if param.requires_grad]
    with ledger:
        for _ in range(STEPS):
            for _ in range(subject.accumulate):
                learner.step(batch, weight=1 / subject.accumulate)
            with ledger.phase("update"):
                grads = [param.grad for param in params if param.grad is not None]
                if subject.clip is not None and grads:
                    clip_grads_with_norm_(params, subject.clip, get_total_norm(grads))
                del grads
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            ledger.step_done(examples=len(batch))


def _allocated(work: Callable[[], None], held: int, device: str) -> int:
    """The most that was allocated during `work`, `held` bytes of which were there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    gc.collect()  # what earlier work left lying about would be released in between
    # PyTorch's allocator on CPUs keeps no peak; its profiler is told of every allocation and release.
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _silent():
        profiler.start()
    try:
        work()
    finally:
        with _silent():
            profiler.stop()
    now = most = held
    recorded: Any = profiler.profiler
    for event in recorded.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@contextmanager
def _silent() -> Iterator[None]:
    """The profiler's library announces itself on the process's standard error (PyTorch 2.13)."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
