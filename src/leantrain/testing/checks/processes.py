"""Does it work with two processes: DistributedDataParallel over gloo, on this machine.

The processes are forked, which takes a fraction of a second where starting Python and PyTorch anew takes several, and
lets a case hold functions of any kind. Each uses one thread: a child must not wait for threads it has not inherited.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from leantrain.testing.case import NotApplicable, OptimizerCase
from leantrain.testing.problem import SmallTask, assert_near, assert_same, copies

PROCESSES = 2
STEPS, STOP = 8, 3
TIMEOUT_S = 60.0

Outcome = dict[str, list[Tensor]]


def two_processes_equal_one_with_both_batches(case: OptimizerCase) -> None:
    """Under DDP both processes hold the same bits, and take the way of one process with the whole batch (float64)."""
    first, second = in_processes(_train_with_ddp, case)
    assert_same(second["weights"], first["weights"], "process 1 against process 0")
    task = SmallTask(case, torch.float64)
    model = task.model()
    start = copies(model.parameters())
    optimizer = case.build(model.parameters())
    for step in range(STEPS):
        _step(task, model, optimizer, task.batch(step))
    assert_near(first["weights"], copies(model.parameters()), start, 1e-6, "two processes against one")


def resume_is_bit_exact_in_two_processes(case: OptimizerCase) -> None:
    """What process 0 saved under DDP is loaded by both into new objects, and the run goes on bit for bit."""
    for rank, outcome in enumerate(in_processes(_train_with_ddp, case)):
        assert_same(outcome["resumed"], outcome["weights"], f"process {rank} resumed after step {STOP} of {STEPS}")


def _train_with_ddp(case: OptimizerCase, rank: int) -> Outcome:
    task = SmallTask(case, torch.float64)
    model = DistributedDataParallel(task.model(), gradient_as_bucket_view=True)
    optimizer = case.build(model.parameters())
    saved: list[Any] = [None]
    for step in range(STEPS):
        if step == STOP:
            file = io.BytesIO()
            torch.save({"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}, file)
            saved = [file.getvalue()]
        _step(task, model, optimizer, _share(task, step, rank))

    dist.broadcast_object_list(saved, src=0)
    checkpoint = torch.load(io.BytesIO(saved[0]), weights_only=False)  # our own bytes, from the process beside us
    new_model = DistributedDataParallel(task.model(), gradient_as_bucket_view=True)
    new_model.module.load_state_dict(checkpoint["model"])
    resumed = case.build(new_model.parameters())
    resumed.load_state_dict(checkpoint["optimizer"])
    for step in range(STOP, STEPS):
        _step(task, new_model, resumed, _share(task, step, rank))
    return {"weights": copies(model.parameters()), "resumed": copies(new_model.parameters())}


def _share(task: SmallTask, step: int, rank: int) -> tuple[Tensor, Tensor]:
    inputs, targets = task.batch(step)
    return inputs.chunk(PROCESSES)[rank], targets.chunk(PROCESSES)[rank]


def _step(task: SmallTask, model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    task.loss(model, batch).backward()
    optimizer.step()


def in_processes(work: Callable[[OptimizerCase, int], Outcome], case: OptimizerCase) -> list[Outcome]:
    """What `work(case, rank)` returns in each of two processes that are joined by gloo.

    Raises:
        AssertionError: a process raised (its traceback is the message) or did not finish in TIMEOUT_S.
        NotApplicable: this system cannot fork, or this PyTorch was built without gloo.
    """
    if "fork" not in multiprocessing.get_all_start_methods() or not dist.is_gloo_available():
        raise NotApplicable("needs a system that can fork, and gloo")
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process that has threads; see above
        folder = Path(name)
        workers = [fork.Process(target=_worker, args=(work, case, rank, folder)) for rank in range(PROCESSES)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(TIMEOUT_S)
        hanging = [worker for worker in workers if worker.is_alive()]
        for worker in hanging:
            worker.kill()
            worker.join()
        errors = [path.read_text() for path in sorted(folder.glob("error-*"))]
        assert not errors, errors[0]
        assert not hanging, f"{len(hanging)} of {PROCESSES} processes did not finish in {TIMEOUT_S:g} s"
        return [torch.load(folder / f"outcome-{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def _worker(work: Callable[[OptimizerCase, int], Outcome], case: OptimizerCase, rank: int, folder: Path) -> None:
    status = 1
    try:
        torch.set_num_threads(1)
        timeout = timedelta(seconds=TIMEOUT_S / 2)
        meeting = (folder / "meeting").as_uri()
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES, timeout=timeout)
        outcome = work(case, rank)
        torch.save(outcome, folder / f"outcome-{rank}.pt")
        dist.barrier()
        status = 0
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
    finally:
        # Not sys.exit: what the parent registered to run at its exit (pytest, coverage) is not ours to run.
        os._exit(status)


CHECKS = (two_processes_equal_one_with_both_batches, resume_is_bit_exact_in_two_processes)
