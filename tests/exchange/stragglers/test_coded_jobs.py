"""Real workers that are late, killed or broken: the models become what plain training makes of them."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # which optimizers import when first made: here, not in each of the forked processes
import torch.distributed as dist
from torch import Tensor, nn

from leantrain.errors import UsageError
from leantrain.exchange.stragglers.coded_jobs import CodedJobs
from leantrain.exchange.stragglers.coded_master import Report
from leantrain.exchange.stragglers.coding_scheme import Scheme
from leantrain.exchange.stragglers.sequential_coding import GC, MSGC, SRSGC, Uncoded
from tests.gloo import in_processes

WORKERS, MODELS, JOBS, EXAMPLES, SLEEP = 4, 3, 12, 25, 3.0
SCHEMES: list[Scheme] = [
    Uncoded(WORKERS), GC(WORKERS, 1), GC(WORKERS, 2), SRSGC(WORKERS, 1, 2, 2), SRSGC(WORKERS, 2, 3, 1),
    MSGC(WORKERS, 1, 2, 1), MSGC(WORKERS, 1, 3, 2), MSGC(WORKERS, 1, 2, WORKERS),
]  # fmt: skip


def models() -> list[nn.Module]:
    """Of different sizes, one with a layer that is not trained."""
    torch.manual_seed(0)
    made = [nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)) for width in (5, 6, 7)]
    made[1][0].requires_grad_(False)
    return list(made)


def optimizers(of: list[nn.Module]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.2, momentum=0.9) for m in of]


def summed_loss(model: nn.Module, job: int, examples: slice) -> Tensor:
    generator = torch.Generator().manual_seed(job)
    inputs, targets = torch.randn(EXAMPLES, 4, generator=generator), torch.randint(3, (EXAMPLES,), generator=generator)
    return nn.functional.cross_entropy(model(inputs[examples]), targets[examples], reduction="sum")


def weights(of: list[nn.Module]) -> list[Tensor]:
    return [param.detach().clone() for model in of for param in model.parameters()]


@pytest.fixture(scope="module")
def plain() -> dict[str, list[Any]]:
    """The same jobs in one process, each with its whole batch."""
    trained, losses = models(), []
    steps = optimizers(trained)
    for job in range(JOBS):
        model, optimizer = trained[job % MODELS], steps[job % MODELS]
        optimizer.zero_grad()
        loss = summed_loss(model, job, slice(0, EXAMPLES)) / EXAMPLES
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "weights": weights(trained)}


def check(found: dict[str, Any], plain: dict[str, list[Any]]) -> None:
    assert found["losses"] == pytest.approx(plain["losses"], abs=1e-5)
    for ours, theirs in zip(found["weights"], plain["weights"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def trained_by(rank: int, scheme: Scheme, pause: Any, runs: list[range]) -> dict[str, Any]:
    """What the master ends with; {} for workers."""
    torch.manual_seed(rank)
    mine = models() if rank == 0 else [model.apply(_reset) for model in models()]  # workers start from other weights
    coded = CodedJobs(scheme, mine, optimizers(mine) if rank == 0 else [], summed_loss, EXAMPLES, pause=pause)
    reports = [coded.run(jobs) for jobs in runs]
    if rank:
        assert reports == [None] * len(runs)
        return {}
    said = [report for report in reports if isinstance(report, Report)]
    return {
        "losses": [loss for report in said for loss in report.losses],
        "weights": weights(mine),
        "total_s": said[0].total_s,
        "seconds": said[0].seconds,
        "late": sum(math.isnan(each) for times in said[0].times for each in times.tolist()),
        "bytes": [said[0].bytes_to_workers, said[0].bytes_from_workers],
        "lost": list(said[-1].lost),
        "reasons": list(said[-1].lost.values()),
        "stood_in": said[0].stood_in,
    }


def _reset(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.reset_parameters()


@pytest.fixture(scope="module")
def punctual() -> list[dict[str, Any]]:
    def work(rank: int) -> list[dict[str, Any]]:
        return [trained_by(rank, scheme, None, [range(JOBS // 2), range(JOBS // 2, JOBS)]) for scheme in SCHEMES]

    return in_processes(WORKERS + 1, work)[0]


@pytest.mark.parametrize("number", range(len(SCHEMES)), ids=[str(scheme) for scheme in SCHEMES])
def test_every_scheme_trains_what_plain_training_trains(punctual, plain, number: int) -> None:
    check(punctual[number], plain)
    assert punctual[number]["lost"] == []


def test_uncoded_workers_send_one_gradient_each(punctual) -> None:
    to, back = punctual[0]["bytes"]
    numbers = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models()]
    jobs = [numbers[job % MODELS] for job in range(JOBS // 2)]
    replies, talk = 8, 8 * (5 + 2 + 1 + 1)  # the header, one task, the job whose weights follow, and the verdict
    assert back == WORKERS * sum(4 * (each + 1) + replies for each in jobs)
    assert to == WORKERS * (sum(4 * each + talk for each in jobs) + 8 * 5)


@pytest.mark.parametrize("scheme", [GC(WORKERS, 1), SRSGC(WORKERS, 1, 2, 2)], ids=str)
def test_nobody_waits_for_a_worker_that_sleeps(plain, scheme: Scheme) -> None:
    def pause(number: int, worker: int) -> None:
        time.sleep(SLEEP if (number, worker) == (JOBS // 2, 3) else 0.1)

    def work(rank: int) -> dict[str, Any]:
        return trained_by(rank, scheme, pause, [range(JOBS)])

    found = in_processes(WORKERS + 1, work)[0]
    check(found, plain)
    assert sum(found["seconds"][JOBS // 2 :]) < SLEEP, "the run should be over before the sleeper wakes up"
    assert found["late"] >= JOBS // 2


def test_a_round_waits_for_a_sleeper_that_the_scheme_needs(plain) -> None:
    """M-SGC forgives worker 3 one round; the chunk that it did not deliver then is its own in the next one."""

    def pause(number: int, worker: int) -> None:
        time.sleep(1.0 if (number, worker) == (2, 3) else 0.02)

    def work(rank: int) -> dict[str, Any]:
        return trained_by(rank, MSGC(WORKERS, 1, 2, 1), pause, [range(JOBS)])

    found = in_processes(WORKERS + 1, work)[0]
    check(found, plain)
    assert found["total_s"] > 0.9


@pytest.mark.parametrize("end", ["kill", "raise"])
@pytest.mark.parametrize("scheme", [GC(WORKERS, 1), SRSGC(WORKERS, 1, 2, 2), MSGC(WORKERS, 1, 2, 1)], ids=str)
def test_training_goes_on_without_a_dead_worker(plain, tmp_path: Path, scheme: Scheme, end: str) -> None:
    def pause(number: int, worker: int) -> None:
        if number == 4 and worker == 2 and dist.get_rank() == 3:
            if end == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("broken")

    def process(rank: int) -> None:
        torch.set_num_threads(1)
        where = (tmp_path / "meeting").as_uri()
        wait = timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=WORKERS + 1, timeout=wait)
        try:
            found = trained_by(rank, scheme, pause, [range(8), range(8, JOBS)])
            if rank == 0:
                torch.save(found, tmp_path / "found.pt")
        finally:
            os._exit(0)

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=process, args=(rank,)) for rank in range(WORKERS + 1)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(90)
        each.kill()
        each.join()
    found = torch.load(tmp_path / "found.pt")
    check(found, plain)
    assert found["lost"] == [2] and found["reasons"] != [""]
    if isinstance(scheme, MSGC):  # the others may do without, or not, by what was late when it died
        assert found["stood_in"] > 0


def refused(scheme: Scheme, of: list[nn.Module], examples: int = EXAMPLES, mu: float | None = None) -> None:
    CodedJobs(scheme, of, [], summed_loss, examples, mu=mu)


def test_what_cannot_work_is_refused_with_the_reason() -> None:
    one, double = models()[:1], [models()[0], models()[1].double()]
    with pytest.raises(UsageError, match=r"at least T \+ 1 = 2 independent models in turn, got 1; one model alone can"):
        refused(SRSGC(4, 1, 2, 2), one)
    with pytest.raises(UsageError, match="= 3 independent models in turn, got 2; GC works with any number"):
        refused(MSGC(4, 1, 3, 2), models()[:2])
    with pytest.raises(UsageError, match="one floating-point type"):
        refused(GC(4, 1), double)
    with pytest.raises(UsageError, match="BatchNorm"):
        refused(GC(4, 1), [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))])
    with pytest.raises(UsageError, match="examples >= 1 and mu >= 0, got examples=0"):
        refused(GC(4, 1), one, examples=0)
    with pytest.raises(UsageError, match="mu=-1"):
        refused(GC(4, 1), one, mu=-1)
    with pytest.raises(UsageError, match=r"relative error of up to .* in torch.bfloat16"):
        refused(GC(4, 1), [models()[0].bfloat16()])
    with pytest.raises(UsageError, match=r"n \+ 1 = 5 processes, of which 0 is the master, got 1"):
        refused(GC(4, 1), one)
