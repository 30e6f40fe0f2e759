"""Two processes that each train half a network: by losses of their own, as a pipeline, and on half the batch each.

    python -m benchmarks.learn.local_parallel                  ten minutes on two idle cores
    python -m benchmarks.learn.local_parallel --only relay pipeline --processes 4

A balanced perceptron (8 layers of 1536, plain SGD, 256 examples a step), one thread per process. Every way runs in
processes of its own, and the ways take turns. A step's time is that between two barriers around many steps, divided by
their number, so that filling and emptying a row of processes is in it. Bytes are those that the kernel says all
processes have sent over their TCP connections between these barriers; beside them is what the way must send.

Pipelines are PyTorch's (`torch.distributed.pipelining`). Their gradients are those of backpropagation; local losses'
are not: what that costs in accuracy is measured by `benchmarks.learn.local_learning`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks.result import write_result
from leantrain.data import Batch
from leantrain.exchange import Dense
from leantrain.exchange.channel import ring_bytes
from leantrain.exchange.relay import HEADER_BYTES, Relay
from leantrain.learn import Backprop, LocalUpdates

CLASSES, WARM_UP, RATE = 10, 4, 0.01
TARGET = 0.75
"""Of the time of one process: what half the work each should take, messages, the head and the filling included."""


@dataclass(frozen=True)
class Size:
    """What is trained."""

    width: int
    layers: int
    batch: int
    steps: int
    processes: int

    def model(self) -> nn.Sequential:
        torch.manual_seed(0)
        hidden = [layer for _ in range(self.layers) for layer in (nn.Linear(self.width, self.width), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(self.width, CLASSES))

    def cut(self) -> list[str]:
        """The layers before which to cut: as many in every block."""
        each = 2 * self.layers // self.processes
        return [str(each * block) for block in range(1, self.processes)]

    def examples(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(self.batch, self.width, generator=generator)
        return Batch(inputs, torch.randint(CLASSES, (self.batch,), generator=generator), torch.arange(self.batch))


class Step:
    """A step with plain SGD after it; `end` waits for what is still on its way."""

    def __init__(
        self, gradients: Callable[[Batch], object], model: nn.Module, end: Callable[[], None] = lambda: None
    ) -> None:
        self.gradients, self.end = gradients, end
        self.optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def __call__(self, batch: Batch) -> None:
        self.gradients(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()


def backprop(size: Size) -> Step:
    learner = Backprop(size.model(), "classification")
    return Step(learner.step, learner.model)


def local(size: Size) -> Step:
    learner = _local(size)
    return Step(learner.step, learner.module)


def relay(size: Size) -> Step:
    learner, exchange = _local(size), Relay()
    learner.attach(exchange.attach(learner.module))
    exchange.join(learner)
    return Step(learner.step, learner.module, exchange.pause)


def data_parallel(size: Size) -> Step:
    learner = Backprop(Dense().attach(size.model()), "classification")
    rank = dist.get_rank()
    return Step(lambda batch: learner.step(batch.shard(rank, size.processes)), learner.model)


def pipeline(size: Size, schedule: str, micro_batches: int) -> Step:
    """One stage of the same network, with PyTorch's schedule."""
    from torch.distributed import pipelining

    rank, last = dist.get_rank(), size.processes - 1
    model, ends = size.model(), [0, *map(int, size.cut()), None]
    part = model[ends[rank] : ends[rank + 1]]
    stage = pipelining.PipelineStage(part, rank, size.processes, torch.device("cpu"))
    run = getattr(pipelining, schedule)(stage, n_microbatches=micro_batches, loss_fn=F.cross_entropy)

    def step(batch: Batch) -> None:
        inputs = (batch.inputs,) if rank == 0 else ()
        run.step(*inputs, **({"target": batch.targets, "losses": []} if rank == last else {}))

    return Step(step, part)


WAYS: dict[str, tuple[str, Callable[[Size], Step], bool]] = {
    "backprop": ("backpropagation", backprop, False),
    "local": ("local losses", local, False),
    "relay": ("local losses, Relay", relay, True),
    "pipeline-gpipe-4": ("GPipe, 4 micro-batches", partial(pipeline, schedule="ScheduleGPipe", micro_batches=4), True),
    "pipeline-1f1b-4": ("1F1B, 4 micro-batches", partial(pipeline, schedule="Schedule1F1B", micro_batches=4), True),
    "pipeline-1f1b-8": ("1F1B, 8 micro-batches", partial(pipeline, schedule="Schedule1F1B", micro_batches=8), True),
    "data": ("data parallel (DDP)", data_parallel, True),
}  # fmt: skip


def bytes_needed(way: str, size: Size) -> int | None:
    """What all processes together must send in a step, by formula; None where there is only one."""
    boundary = size.batch * size.width * 4 * (size.processes - 1)
    if way == "relay":
        return boundary + HEADER_BYTES * (size.processes - 1)
    if way == "data":
        numbers = sum(param.numel() for param in size.model().parameters())
        return size.processes * ring_bytes(numbers, 4, size.processes)
    return 2 * boundary if way.startswith("pipeline") else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(WAYS), help=f"ways, by how they begin: {', '.join(WAYS)}")
    parser.add_argument("--anyway", action="store_true", help="measure on a busy machine, and write nothing down")
    asked = parser.parse_args()
    size = Size(asked.width, asked.layers, asked.batch, asked.steps, asked.processes)
    if size.processes < 2 or size.layers % size.processes or size.batch % (8 * size.processes):
        parser.error("processes, at least 2, must divide layers, and 8 x processes the batch")
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if not asked.anyway and (load > 1 or cores < size.processes):
        sys.exit(f"skipped: needs {size.processes} idle cores; this machine has {cores} and a load of {load:.1f}")
    ways = [way for way in WAYS if way.startswith(tuple({"backprop", *asked.only}))]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    sent: dict[str, float] = {}
    for _ in range(asked.repeats):
        for way in ways:
            took, sent[way] = measure(way, size)
            seconds[way].append(took)
            print(f"{way}: {took * 1e3:.0f} ms, {sent[way] / 1e6:.3f} MB", file=sys.stderr, flush=True)
    one = statistics.median(seconds["backprop"])
    rows = [_row(way, size, seconds[way], sent[way], one) for way in ways]
    if asked.anyway:
        print(*rows, sep="\n")
        return
    write_result(
        "learn/local_parallel",
        title=f"{size.layers} layers of {size.width}, {size.batch} examples a step, one thread per process",
        columns=["way", "processes", "ms per step", "examples/s", "time / one process", "MB per step, kernel", "must"],
        rows=rows,
        notes=[
            f"Medians of {asked.repeats} runs of {size.steps} steps that took turns, spread in brackets; filling and "
            "emptying the row of processes is in the time. MB: all processes together.",
            *_verdict(seconds, one),
        ],
    )


def measure(way: str, size: Size) -> tuple[float, float]:
    """Seconds per step, and bytes per step that all processes sent."""
    together = size.processes if WAYS[way][2] else 1
    fork = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ends = [fork.Pipe(duplex=False) for _ in range(together)]
    common = {"WORLD_SIZE": str(together), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [
        fork.Process(target=_work, args=(way, size, {**common, "RANK": str(rank)}, ends[rank][1]))
        for rank in range(together)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit(f"{way}: a process failed, nothing is recorded")
    found = [end.recv() for end, _ in ends]
    return max(took for took, _ in found) / size.steps, sum(sent for _, sent in found) / size.steps


def _work(way: str, size: Size, variables: dict[str, str], answer: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(variables)
    dist.init_process_group("gloo")
    step = WAYS[way][1](size)
    batches = [size.examples(number) for number in range(4)]
    for number in range(WARM_UP):
        step(batches[number % 4])
    step.end()
    dist.barrier()
    before, started = sent_by_the_kernel(), time.perf_counter()
    for number in range(size.steps):
        step(batches[number % 4])
    step.end()
    sent = sent_by_the_kernel() - before
    dist.barrier()
    answer.send((time.perf_counter() - started, sent))


def sent_by_the_kernel() -> int:
    """Bytes that the other ends of this process's TCP connections have acknowledged so far."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as connection:
                information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED + 8)
        except OSError:  # not a socket, or not of TCP
            continue
        if len(information) == _ACKED + 8:
            total += struct.unpack_from("Q", information, _ACKED)[0]
    return total


_ACKED = 120
"""Where `tcpi_bytes_acked` is in the kernel's struct tcp_info."""


def _local(size: Size) -> LocalUpdates:
    model = size.model()
    return LocalUpdates(model, "classification", cut=size.cut(), sample=torch.zeros(2, size.width))


def _row(way: str, size: Size, seconds: list[float], sent: float, one: float) -> list[Any]:
    took, needed = statistics.median(seconds), bytes_needed(way, size)
    return [
        WAYS[way][0],
        size.processes if WAYS[way][2] else 1,
        f"{took * 1e3:.0f} ({min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f})",
        f"{size.batch / took:.0f}",
        f"{took / one:.2f}",
        "" if needed is None else f"{sent / 1e6:.3f}",
        "" if needed is None else f"{needed / 1e6:.3f}",
    ]


def _verdict(seconds: dict[str, list[float]], one: float) -> list[str]:
    if "relay" not in seconds:
        return []
    part = statistics.median(seconds["relay"]) / one
    return [
        f"Target: a step with Relay takes at most {TARGET} of one process's: {'met' if part <= TARGET else 'missed'}."
    ]


if __name__ == "__main__":
    main()
