"""Functions run in several processes at once, which are joined by gloo on this machine."""

from __future__ import annotations

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

SECONDS = 100.0


def in_processes(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(rank, *args)` returns in each of `size` processes: tensors and plain collections of them.

    Processes are forked, so `work` and `args` may be anything.

    Raises:
        AssertionError: a process raised (its traceback is the message) or did not finish.
    """
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process that has threads: ours wait for none
        folder = Path(name)
        workers = [fork.Process(target=_work, args=(folder, rank, size, work, args)) for rank in range(size)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(SECONDS)
            worker.kill()
            worker.join()
        errors = [file.read_text() for file in sorted(folder.glob("error-*"))]
        assert not errors, "\n".join(errors)
        assert all(worker.exitcode == 0 for worker in workers), [worker.exitcode for worker in workers]
        return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(size)]


def _work(folder: Path, rank: int, size: int, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    status = 1
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=size,
            timeout=timedelta(seconds=SECONDS / 2),
        )  # fmt: skip
        torch.save(work(rank, *args), folder / f"result-{rank}.pt")
        dist.barrier()
        status = 0
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(status)  # not sys.exit: what the parent registered to run at its exit is not ours to run
