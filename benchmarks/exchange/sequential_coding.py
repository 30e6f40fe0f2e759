"""Run times of coding schemes with late workers: real processes beside the simulator that plans them.

    python -m benchmarks.exchange.sequential_coding

1. Eight worker processes and a master record what workers take at two loads, waiting for everybody. Their computing is
   sleep: a made-up time for each worker and round, and so much more for each example.
2. The planner tries every scheme and parameter on that record and names the fastest of each kind.
3. These are run by real processes that sleep what the record says, and stand beside what the simulator said.
4. The planner alone, on a synthetic profile of 256 workers.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.result import write_result
from leantrain.exchange.stragglers.coded_jobs import CodedJobs
from leantrain.exchange.stragglers.coding_scheme import Scheme
from leantrain.exchange.stragglers.planner import DelayProfile, Forecast, Times, plan_scheme, simulate, synthetic_times
from leantrain.exchange.stragglers.sequential_coding import GC, Uncoded

WORKERS, MODELS, JOBS, PROBED = 8, 4, 40, 20
EXAMPLES = 10_000
BASE_S, SLOPE_S = 0.2, 0.64
"""A punctual worker's round at load 1/8, of which 0.08 s is computing: seconds per unit of load."""
DELAYS = {"base_s": BASE_S, "slow": 3.0, "begins": 0.06, "ends": 0.9}
MANY = 256
COLUMNS = ["workers", "scheme", "mu", "T", "load", "s, real", "s, simulated", "simulated / real",
           "waited out, real", "waited out, simulated", "time against uncoded"]  # fmt: skip


@dataclass(frozen=True)
class Sleeps:
    """What a worker does instead of computing: `times` at load 1/WORKERS, and SLOPE_S for each unit beyond it."""

    times: Times
    slope: float

    def pause(self, number: int, worker: int) -> None:
        """The part that does not depend on the load."""
        time.sleep(max(0.0, self.times[number % len(self.times), worker] - self.slope / WORKERS))

    def loss(self, model: nn.Module, job: int, examples: slice) -> Tensor:
        """The part that does."""
        time.sleep(self.slope * (examples.stop - examples.start) / EXAMPLES)
        return model(torch.ones(1, 4)).sum() * (examples.stop - examples.start)


def main() -> None:
    made_up = Sleeps(synthetic_times(PROBED, WORKERS, seed=1, **DELAYS), SLOPE_S)
    probes = {}
    for copies in (1, 4):
        found = in_processes(train, Uncoded(WORKERS, copies), 1.0, made_up, PROBED)
        probes[copies / WORKERS] = np.array(found["times"])
    profile = DelayProfile.fitted(probes)

    rows = []
    uncoded = 0.0
    for scheme, mu in compared(plan_scheme(profile, MODELS, JOBS)):
        said = simulate(profile, scheme, JOBS, mu)
        real = in_processes(train, scheme, mu, Sleeps(profile.times, profile.slope), JOBS)
        uncoded = uncoded or real["seconds"]
        rows.append([
            WORKERS, str(scheme), f"{mu:g}", scheme.delay, f"{float(scheme.load):.4f}", f"{real['seconds']:.2f}",
            f"{said.seconds:.2f}", f"{said.seconds / real['seconds']:.3f}", real["waited"], said.waited,
            f"{real['seconds'] / uncoded:.3f}",
        ])  # fmt: skip

    many = DelayProfile(synthetic_times(80, MANY, seed=2), load=1 / MANY, slope=2.2)
    uncoded = 0.0
    for scheme, mu in compared(plan_scheme(many, MODELS, 80, restart=True)):
        said = simulate(many, scheme, 80, mu, restart=True)
        uncoded = uncoded or said.seconds
        rows.append([
            f"{MANY}, synthetic", str(scheme), f"{mu:g}", scheme.delay, f"{float(scheme.load):.4f}", "",
            f"{said.seconds:.1f}", "", "", said.waited, f"{said.seconds / uncoded:.3f}",
        ])  # fmt: skip

    write_result(
        "exchange/sequential_coding",
        title=f"Coded jobs with late workers: {JOBS} jobs of {MODELS} models, and 80 on a synthetic profile",
        columns=COLUMNS,
        rows=rows,
        notes=[
            f"Real: {WORKERS} worker processes and a master over gloo, whose computing is sleep: what uncoded rounds "
            f"took when they were recorded ({PROBED} rounds), and {profile.slope:.2f} s more per unit of load, the "
            "slope fitted to records at loads 1/8 and 4/8. Each scheme has the parameters that the planner found "
            "fastest on the record. A round ends (1 + mu) times as long after its start as the fastest answer took, or "
            "later where the scheme needs more answers, which is what waited out counts; with mu = 0 it ends with the "
            f"first answers that suffice. {MANY} workers: simulated only, on made-up delays with 2.2 s per unit of "
            "load, where a late worker drops its task when the round ends; in real processes it finishes first.",
        ],
    )  # fmt: skip


def compared(plans: list[Forecast]) -> list[tuple[Scheme, float]]:
    """Uncoded first, gradient coding with both rules, then what codes across rounds."""
    by_delay = sorted((plan.scheme for plan in plans), key=lambda scheme: (scheme.delay, scheme.load))
    pairs: list[tuple[Scheme, float]] = []
    for scheme in by_delay:
        eager = isinstance(scheme, GC) and not isinstance(scheme, Uncoded)
        pairs += [(scheme, mu) for mu in ((0.0, 1.0) if eager else (1.0,))]
    return pairs


def train(rank: int, scheme: Scheme, mu: float, sleeps: Sleeps, jobs: int) -> dict[str, Any]:
    """The master's account of a run."""
    models = [nn.Linear(4, 1, bias=False) for _ in range(MODELS)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-6) for model in models]
    coded = CodedJobs(scheme, models, optimizers, sleeps.loss, EXAMPLES, mu=mu, pause=sleeps.pause)
    report = coded.run(range(jobs))
    if report is None:
        return {}
    times = [each.tolist() for each in report.times]
    return {"seconds": sum(report.seconds), "waited": len(report.waited), "times": times}


def in_processes(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What `work(rank, *args)` returns in the master, with WORKERS more processes beside it."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        processes = [fork.Process(target=_process, args=(Path(name), rank, work, args)) for rank in range(WORKERS + 1)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit("a process failed: nothing is recorded")
        return json.loads((Path(name) / "master.json").read_text())


def _process(folder: Path, rank: int, work: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = (folder / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORKERS + 1)
    found = work(rank, *args)
    if rank == 0:
        (folder / "master.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    import torch._dynamo  # what optimizers import when first made: here, not in each of the processes

    main()
