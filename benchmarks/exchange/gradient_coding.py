"""Steps with late workers: gradient coding and DDP, in real processes that are really late.

    python -m benchmarks.exchange.gradient_coding

Processes of this machine train a small network together, joined by real sockets. Computing is simulated: before the
forward pass of each chunk a process sleeps, so that two cores can stand for six machines; a late worker sleeps longer.
What is measured is therefore the waiting, and what sending and decoding add to it. Three tables:

    gradient_coding          the same s workers late by a factor of 10 in every step
    gradient_coding_random   every worker late with probability p in every step, against the closed form
    gradient_codes           how much each code enlarges rounding errors, and the errors themselves
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.result import write_result
from leantrain.data import Batch
from leantrain.exchange import Dense
from leantrain.exchange.stragglers.gradient_codes import (
    Decoder,
    amplification,
    circulant,
    decoding_weights,
    fractional_repetition,
    random_cyclic,
)
from leantrain.exchange.stragglers.gradient_coding import CODES, Code, GradientCoding, mean_step_seconds

COMPUTE_S, FACTOR, STEPS, WARM_UP = 0.05, 10, 25, 3
SETUPS = [(4, 1), (6, 2)]
PROBABILITY, DELAY_S, RANDOM = 0.1, 0.45, [(0.05, 160), (0.2, 60)]
FEATURES, HIDDEN, CLASSES, EXAMPLES = 64, 256, 10, 48

Lateness = Callable[[int, int], float]
"""By how many seconds the worker of this rank is late in this step."""


@dataclass(frozen=True)
class Run:
    """What is trained by how many processes, and how late they are."""

    processes: int
    stragglers: int | None
    """None: DDP, which waits for everybody."""
    compute_s: float
    steps: int
    lateness: Lateness
    code: Code = "best"
    gives_up: bool = False
    """Whether a late worker stops as soon as the step is decided without it. Otherwise it is late to the end."""


def main() -> None:
    torch.set_num_threads(1)
    the_same_late()
    late_at_random()
    rounding()


def the_same_late() -> None:
    rows = []
    for n, s in SETUPS:
        late = set(range(n - s, n))
        in_time = [rank for rank in range(n) if rank not in late]

        def nobody(step: int, rank: int) -> float:
            return 0.0

        found = {}
        for stragglers in (None, s):
            whole_step = COMPUTE_S * (1 if stragglers is None else s + 1)

            def those(step: int, rank: int, late: set[int] = late, whole_step: float = whole_step) -> float:
                return (FACTOR - 1) * whole_step if rank in late else 0.0

            for name, lateness in (("nobody", nobody), (f"{s} by {FACTOR} x", those)):
                found[stragglers, name] = in_processes(Run(n, stragglers, COMPUTE_S, STEPS, lateness))
        seconds = {
            key: statistics.mean(statistics.mean(each["seconds"][WARM_UP:]) for each in (every[r] for r in in_time))
            for key, every in found.items()
        }
        whole = trained_by_one(STEPS)
        for (stragglers, name), every in found.items():
            mine = seconds[stragglers, name]
            off = max(
                float((a - b).norm() / b.norm()) for each in every for a, b in zip(each["grads"], whole, strict=True)
            )
            rows.append([
                n,
                "DDP" if stragglers is None else f"gradient coding, s = {s}",
                name,
                f"{1000 * mine:.0f}",
                f"{mine / seconds[stragglers, 'nobody']:.2f}",
                f"{mine / seconds[None, name]:.2f}",
                f"{off:.1e}",
                max(each["skipped"] for each in every),
            ])  # fmt: skip
    write_result(
        "exchange/gradient_coding",
        title=f"Step time with late workers, {1000 * COMPUTE_S:.0f} ms of computing per n-th of the batch",
        columns=["workers", "exchange", "late", "ms per step", "x the same with nobody late", "x DDP",
                 "gradient off by", "steps skipped by the latest"],
        rows=rows,
        notes=[
            "ms per step: mean over the workers that are not late and all steps but the first "
            f"{WARM_UP} of {STEPS}. Computing is a sleep of {1000 * COMPUTE_S:.0f} ms per chunk: with coding a worker "
            "computes s + 1 of them. Late workers sleep longer, in every step that they compute. Gradient off by: "
            "largest relative difference, norm by norm over all steps and processes, from the gradient of the whole "
            "batch in one process and float32, at the weights that this process has from its own training.",
        ],
    )  # fmt: skip


def late_at_random() -> None:
    rows = []
    for compute_s, steps in RANDOM:
        draws = random.Random(0)
        drawn = [[draws.random() < PROBABILITY for _ in range(4)] for _ in range(steps)]

        def lateness(step: int, rank: int, drawn: list[list[bool]] = drawn) -> float:
            return DELAY_S if drawn[step][rank] else 0.0

        coded: list[tuple[str, int | None, Code]] = [
            ("DDP", None, "best"), ("random code, s = 1", 1, "random"), ("repetition, s = 1", 1, "repetition"),
        ]  # fmt: skip
        for name, stragglers, code in coded:
            every = in_processes(Run(4, stragglers, compute_s, steps, lateness, code, gives_up=True))
            measured = statistics.mean(every[0]["seconds"])
            load = 0 if stragglers is None else stragglers
            expected = (load + 1) * compute_s + DELAY_S * waits(code, load)
            same_draws = (load + 1) * compute_s + DELAY_S * statistics.mean(
                waits_here(code, load, missing) for missing in drawn
            )
            plain = mean_step_seconds(4, load, PROBABILITY, compute_s, DELAY_S)
            rows.append([
                f"{1000 * compute_s:.0f}", name, f"{1000 * plain:.0f}", f"{1000 * expected:.0f}",
                f"{1000 * same_draws:.0f}", f"{1000 * measured:.0f}", f"{measured / expected:.2f}",
                "" if stragglers is None else "yes" if plain < mean_step_seconds(4, 0, PROBABILITY, compute_s, DELAY_S)
                else "no",
            ])  # fmt: skip
    write_result(
        "exchange/gradient_coding_random",
        title=f"Four workers, each late by {1000 * DELAY_S:.0f} ms with probability {PROBABILITY} in every step",
        columns=["ms of computing, c", "exchange", "ms, any s late", "ms, this code", "ms, these draws", "ms measured",
                 "measured / this code", "pays"],
        rows=rows,
        notes=[
            f"Mean of all steps, {' and '.join(str(steps) for _, steps in RANDOM)} of them. Any s late: "
            "(s + 1) c + D P[more than s are late]. This code: repetition also does without some sets of more than s. "
            "These draws: with the workers that were late in this run instead of the probability. A late worker gives "
            "up its work as soon as the step is decided without it, so that it is late or not in each step anew.",
        ],
    )  # fmt: skip


def rounding() -> None:
    rows = []
    for n, s in [(4, 1), (4, 2), (5, 2), (6, 2), (8, 2), (8, 3), (12, 3), (16, 4), (16, 5)]:
        cells: list[str] = []
        for make in (fractional_repetition, circulant, random_cyclic):
            exists = (make is random_cyclic) or (n % (s + 1) == 0 if make is fractional_repetition else (n + s) % 2)
            code = make(n, s) if exists else None
            cells += ["", ""] if code is None else [f"{amplification(code, s):.3g}", f"{float32_error(code, s):.0e}"]
        rows.append([f"{n}, {s}", *cells])
    write_result(
        "exchange/gradient_codes",
        title="Amplification of rounding errors by codes, and the error of float32 gradients",
        columns=["n, s", "repetition: A", "error", "circulant: A", "error", "random: A", "error"],
        rows=rows,
        notes=[
            "A: worst over all sets of s missing workers, or 5000 of them. Error: largest difference from the sum in "
            "float64, relative to its largest number, over 50 of these sets; 1000 normally distributed numbers per "
            "chunk. Random: the best of 30 draws. GradientCoding refuses codes with A eps > 1e-4.",
        ],
    )  # fmt: skip


def float32_error(code: Tensor, s: int) -> float:
    n = len(code)
    chunks = torch.randn(n, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, sent = chunks.sum(0), (code @ chunks).float()
    sets = random.Random(0).sample(list(itertools.combinations(range(n), s)), min(50, math.comb(n, s)))
    worst = 0.0
    for missing in sets:
        present = [worker for worker in range(n) if worker not in missing]
        decoded = torch.zeros(1000)
        for worker, weight in zip(present, decoding_weights(code, present).tolist(), strict=True):
            decoded.add_(sent[worker], alpha=weight)
        worst = max(worst, float((decoded - whole).abs().max() / whole.abs().max()))
    return worst


def waits(code: Code, s: int) -> float:
    """The probability that a step has to wait for a late worker, over all sets of late ones."""
    total = 0.0
    for late in itertools.product([False, True], repeat=4):
        probability = math.prod(PROBABILITY if each else 1 - PROBABILITY for each in late)
        total += probability * waits_here(code, s, list(late))
    return total


def waits_here(code: Code, s: int, late: list[bool]) -> bool:
    return Decoder(CODES[code](4, s)).weights(rank for rank in range(4) if not late[rank]) is None


def train(rank: int, run: Run) -> dict[str, Any]:
    """The gradients of every step, how long it took, and how many this worker computed nothing for."""
    exchange = Dense() if run.stragglers is None else GradientCoding(run.stragglers, run.code)
    model = exchange.attach(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seconds, grads = [], []
    dist.barrier()
    for step in range(run.steps):
        started = time.perf_counter()
        shares = exchange.shares(batch_of(step), rank, run.processes, 1)
        wait(exchange, run.lateness(step, rank) if shares else 0.0, run.gives_up)
        for share in shares:
            wait(exchange, run.compute_s, run.gives_up)
            backward(model, share.batch, share.weight)
        exchange.finish_gradients()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    skipped = exchange.skipped if isinstance(exchange, GradientCoding) else 0
    exchange.agree([0.0], always=True)
    return {"seconds": seconds, "grads": grads, "skipped": skipped}


def wait(exchange: Dense, seconds: float, gives_up: bool) -> None:
    """Sleep; with `gives_up` no longer than until the step is decided."""
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0:
        if gives_up and isinstance(exchange, GradientCoding) and exchange.decided():
            return
        time.sleep(min(left, 0.01) if gives_up else left)


def trained_by_one(steps: int) -> list[Tensor]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    grads = []
    for step in range(steps):
        backward(model, batch_of(step), 1.0)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        optimizer.step()
        optimizer.zero_grad()
    return grads


def backward(model: nn.Module, batch: Batch, weight: float) -> None:
    (weight * nn.functional.cross_entropy(model(batch.inputs), batch.targets)).backward()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, CLASSES))


def batch_of(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(EXAMPLES, FEATURES, generator=generator)
    return Batch(inputs, torch.randint(CLASSES, (EXAMPLES,), generator=generator), torch.arange(EXAMPLES))


def in_processes(run: Run) -> list[dict[str, Any]]:
    """What `train` returns in each of the processes."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        workers = [fork.Process(target=_worker, args=(Path(name), rank, run)) for rank in range(run.processes)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise SystemExit("a process failed: nothing is recorded")
        return list(_results(Path(name), run.processes))


def _results(folder: Path, processes: int) -> Iterator[dict[str, Any]]:
    for rank in range(processes):
        yield torch.load(folder / f"{rank}.pt", weights_only=True)


def _worker(folder: Path, rank: int, run: Run) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=run.processes)
    torch.save(train(rank, run), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
