"""Bytes that four processes send for their gradients, whole and projected, as the network interface counts them.

    python -m benchmarks.exchange.projected

Four processes of this machine train a small LLaMA together, joined by gloo over the loopback interface of a network
namespace of their own (`unshare --net`), so that the interface's counter holds nobody else's traffic. It counts what
the ring sends and the headers and acknowledgements of TCP. Every exchange trains the same steps; what a process should
send by the ring's formula stands beside what the interface saw. Also checks that the losses of the first 20 steps are
those of one process with the whole batch.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.result import write_result
from leantrain.exchange import Dense, Projected
from leantrain.nn import Llama
from leantrain.optim import GaLoreAdamW, parameter_groups

PROCESSES, STEPS, REFRESH = 4, 21, 20
WIDTH, MLP, LAYERS, VOCAB, BATCH, CONTEXT = 256, 688, 4, 256, 8, 32
FEW = 16
"""Directions that every gradient of the comparison of losses has."""
COUNTER = Path("/proc/net/dev")
COMMAND = [sys.executable, "-m", "benchmarks.exchange.projected", "inside"]


@dataclass(frozen=True)
class Case:
    """What is trained and how its gradients travel: whole, or projected to `rank` directions."""

    rank: int
    projected: bool
    hidden_only: bool = False
    """Freeze everything but the hidden matrices, so that nothing else travels."""


CASES = {
    "hidden matrices alone": [Case(64, False, True), Case(64, True, True), Case(32, True, True)],
    "whole model": [Case(64, False), Case(64, True), Case(32, True)],
}


def main() -> None:
    found = json.loads(measured())
    rows = []
    for trained, cases in CASES.items():
        whole = found[str(cases[0])]
        for case in cases:
            this = found[str(case)]
            fewer, average = whole["seen"] / this["seen"], whole["average"] / this["average"]
            rows.append([
                trained,
                f"Projected, rank {case.rank}" if case.projected else "Dense",
                f"{this['said'] / 1e6:.3f}",
                f"{this['seen'] / 1e6:.3f}",
                f"{fewer:.2f}",
                f"{WIDTH / case.rank:.0f}" if case.projected and case.hidden_only else "",
                f"{this['average'] / 1e6:.3f}",
                f"{average:.2f}",
            ])  # fmt: skip
    write_result(
        "exchange/projected",
        title=f"Gradient bytes of each of {PROCESSES} processes, Llama of {found['parameters'] / 1e6:.2f} M parameters",
        columns=["trained", "exchange", "MB per step, formula", "MB per step, interface", "x fewer", "S / R",
                 f"MB, mean of {REFRESH} steps with a refresh", "x fewer, mean"],
        rows=rows,
        notes=[
            f"S = {WIDTH}, the shorter side of every hidden matrix. Float32 gradients, {found['counted']}. "
            "MB per step: median over the steps between two refreshes, all sent by all processes, divided by "
            f"{PROCESSES}. A refresh every T steps makes the mean (S / R - 1) / T more than the steps between: 1.5 % "
            "at S / R = 4 and 3.5 % at 8 with the default T = 200.",
            f"Largest difference from the losses of one process with the whole batch over 20 steps, rank {FEW}, "
            f"refreshed every 6: {found['Projected']:.1e}; with Dense: {found['Dense']:.1e}. At rank 64, which is more "
            f"than the rank of gradients on so few different bytes, the last directions are rounding: "
            f"{found['Projected, rank 64']:.1e} and {found['Dense, rank 64']:.1e}.",
        ],
    )  # fmt: skip


def measured() -> str:
    """The measurements as JSON, by a process in a network namespace of its own where that is permitted."""
    alone = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
    try:
        subprocess.run([*alone, "ip", "link", "set", "lo", "up"], check=True)
        command = [*alone, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *COMMAND, "own"]
    except (OSError, subprocess.CalledProcessError):
        command = [*COMMAND, "shared"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def inside(namespace: str) -> None:
    """Measure, and print what was found."""
    found: dict[str, Any] = {str(case): in_processes(sent, case) for cases in CASES.values() for case in cases}
    found["counted"] = {
        "own": "counted on the loopback interface of a network namespace with nothing else in it",
        "shared": "counted on the machine's loopback interface, others' traffic included",
    }[namespace]
    for directions, name in ((FEW, ""), (64, ", rank 64")):
        one = losses(0, 1, Dense(), directions)
        for exchange in (Dense(), Projected()):
            four = in_processes(losses, PROCESSES, exchange, directions, mean=True)
            found[type(exchange).__name__ + name] = max(abs(a - b) for a, b in zip(one, four, strict=True))
    found["parameters"] = sum(param.numel() for param in llama().parameters())
    print(json.dumps(found))


def sent(rank: int, case: Case) -> dict[str, float]:
    """Bytes per process and step: by the formula, by the interface, and the latter's mean over a whole period."""
    exchange = Projected() if case.projected else Dense()
    model = llama()
    groups = parameter_groups(model, [{"params": "hidden", "rank": case.rank}])
    if case.hidden_only:
        for _, param in groups[1]["params"]:
            param.requires_grad_(False)
    attached = exchange.attach(model)
    optimizer = GaLoreAdamW(groups, lr=1e-3, refresh=REFRESH, basis="subspace", stagger=False)
    exchange.connect([optimizer])
    said, seen = [], []
    for step in range(STEPS):
        dist.barrier()
        before = interface_bytes()
        backward(attached, step, rank, PROCESSES)
        dist.barrier()
        seen.append((interface_bytes() - before) / PROCESSES)
        said.append(exchange.bytes_sent_per_step(attached, PROCESSES))
        optimizer.step()
        optimizer.zero_grad()
    # Step 0 computes the first bases, and step REFRESH the second: the period is from 1 to REFRESH.
    between = slice(2, REFRESH)  # not step 1, in which DDP arranges its buckets anew
    period = slice(1, REFRESH + 1)
    return {
        "said": statistics.median(said[between]),
        "seen": statistics.median(seen[between]),
        "average": statistics.mean(seen[period]),
    }


def losses(rank: int, world: int, exchange: Dense, directions: int) -> list[float]:
    """The loss of this process's share, over 20 steps."""
    model = llama()
    attached = exchange.attach(model)
    groups = parameter_groups(model, [{"params": "hidden", "rank": directions}])
    optimizer = GaLoreAdamW(groups, lr=1e-3, refresh=6, basis="subspace")
    exchange.connect([optimizer])
    found = []
    for step in range(20):
        found.append(backward(attached, step, rank, world))
        optimizer.step()
        optimizer.zero_grad()
    return found


def llama() -> Llama:
    torch.manual_seed(0)
    return Llama(VOCAB, hidden=WIDTH, mlp_hidden=MLP, layers=LAYERS, heads=4)


def backward(model: nn.Module, step: int, rank: int, world: int) -> float:
    batch = text(step).chunk(world)[rank]
    loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    return loss.item()


def text(step: int) -> Tensor:
    """Bytes of a module of Python's standard library, other ones in every step."""
    source = torch.tensor(list(Path(multiprocessing.__file__).with_name("pool.py").read_bytes()))
    place = torch.randint(len(source) - CONTEXT, (BATCH, 1), generator=torch.Generator().manual_seed(step))
    return source[place + torch.arange(CONTEXT + 1)]


def interface_bytes() -> int:
    """Bytes that the loopback interface has sent so far."""
    line = next(line for line in COUNTER.read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[8])


def in_processes(work: Any, *args: Any, mean: bool = False) -> Any:
    """What `work(rank, *args)` returns in the first of PROCESSES processes, or its mean over them, number by number."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        workers = [fork.Process(target=_worker, args=(Path(name), rank, work, args)) for rank in range(PROCESSES)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise SystemExit("a process failed: nothing is recorded")
        found = [json.loads((Path(name) / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    return [statistics.mean(each) for each in zip(*found, strict=True)] if mean else found[0]


def _worker(folder: Path, rank: int, work: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=PROCESSES)
    (folder / f"{rank}.json").write_text(json.dumps(work(rank, *args)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    inside(sys.argv[2]) if sys.argv[1:2] == ["inside"] else main()
