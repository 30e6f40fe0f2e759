"""One Python process per host, forked from this one: no interpreter to start and no torch to import, N times.

A fork copies one thread. Fork before this process has computed anything with torch, or has threads of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks.netlab import namespaces

GRACE_S = 10.0
"""After a worker failed, the others have this long to say what they saw."""


class WorkerError(RuntimeError):
    """A worker raised, died or did not finish in time. The message has every traceback there is."""


def in_workers(
    hosts: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    work: Callable[..., Any],
    args: Sequence[Any],
    *,
    group: bool,
    timeout_s: float,
) -> list[Any]:
    """What `work(rank, *args)` returns, as JSON has it, in one process per host.

    Raises:
        WorkerError: one of them failed; none is left running.
    """
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="netlab-") as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process that has threads: ours wait for none
        folder = Path(name)
        workers: list[BaseProcess] = [
            fork.Process(
                target=_work, args=(folder, rank, host, environment, group, timeout_s, work, args), daemon=True
            )
            for rank, (host, environment) in enumerate(zip(hosts, environments, strict=True))
        ]
        try:
            for worker in workers:
                worker.start()
            _join(workers, monotonic() + timeout_s)
        finally:
            for worker in workers:
                if worker.pid is not None:
                    worker.kill()
                    worker.join()
        problems = [
            f"rank {rank}: {_problem(folder, rank, worker)}" for rank, worker in enumerate(workers) if worker.exitcode
        ]
        if problems:
            raise WorkerError("\n".join(problems))
        return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(len(hosts))]


def _join(workers: Sequence[BaseProcess], deadline: float) -> None:
    left = list(workers)
    while left and monotonic() < deadline:
        wait([worker.sentinel for worker in left], timeout=deadline - monotonic())
        if any(worker.exitcode for worker in left):
            deadline = min(deadline, monotonic() + GRACE_S)
        left = [worker for worker in left if worker.exitcode is None]


def _problem(folder: Path, rank: int, worker: BaseProcess) -> str:
    error = folder / f"{rank}.error"
    if error.exists():
        return error.read_text(encoding="utf-8")
    code = worker.exitcode or 0
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _work(
    folder: Path,
    rank: int,
    host: str,
    environment: Mapping[str, str],
    group: bool,
    timeout_s: float,
    work: Callable[..., Any],
    args: Sequence[Any],
) -> None:
    status = 1
    try:
        namespaces.enter(host)  # before there is a second thread, which would stay where it is
        os.environ.update(environment)
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        if group:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
        found = work(rank, *args)
        (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
        if group:
            dist.barrier()
        status = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        os._exit(status)  # not sys.exit: what the parent registered to run at its exit is not ours to run
