"""The master of coded jobs: the clock of the rounds, a thread for each worker, and the sums.

Threads only talk: each hands its worker what there is to do, and takes what comes back while the round is open. The
main thread decides when a round ends, and adds up and steps the optimizers while none is open.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from leantrain.errors import RunError
from leantrain.exchange.stragglers.coding_course import Course, Mask, Sum, Task
from leantrain.exchange.stragglers.coding_scheme import Scheme

STOP, WORK = 0, 1
"""First number of the master's message to a worker: [what, round, worker, tasks, jobs whose weights follow]."""
DONE, FAILED = 0, 1
"""A worker's reply, one number."""


@dataclass
class Report:
    """What happened in a run. Jobs and rounds count from the run's first, workers from 0."""

    losses: list[float]
    """Mean loss of each job, before its step."""
    seconds: list[float] = field(default_factory=list)
    """How long each round took, from handing out its tasks to its end."""
    times: list[NDArray[np.float64]] = field(default_factory=list)
    """Per round, seconds from its start to each worker's answer, [n]; NaN for who was late or had nothing to do."""
    waited: list[int] = field(default_factory=list)
    """Rounds that went on beyond the grace because the scheme needed more answers."""
    lost: dict[int, str] = field(default_factory=dict)
    """Workers that died or fell silent, and how that was noticed."""
    stood_in: int = 0
    """How often a worker was asked to compute what another should have."""
    bytes_to_workers: int = 0
    bytes_from_workers: int = 0
    total_s: float = 0.0
    """From the start of the first round to the last optimizer step."""


class Link:
    """Messages to one other process, over a group that has nobody else."""

    def __init__(self, group: dist.ProcessGroup, other: int) -> None:
        self.group, self.other, self.sent, self.received = group, other, 0, 0

    def send(self, tensor: Tensor) -> None:
        """Hand a tensor over."""
        dist.send(tensor, self.other, group=self.group)
        self.sent += tensor.nbytes

    def receive(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """The tensor that the other process sends, of a shape and type that both know."""
        tensor = torch.empty(shape, dtype=dtype)
        dist.recv(tensor, self.other, group=self.group)
        self.received += tensor.nbytes
        return tensor


@dataclass
class _Round:
    """What is known of the round that is open."""

    number: int
    tasks: dict[int, tuple[Task, ...]]
    """By worker; who has none is not asked."""
    started: float
    taken: dict[int, int] = field(default_factory=dict)
    """Who is computing each worker's tasks: as a rule the worker itself."""
    wanted: list[int] = field(default_factory=list)
    """Workers whose tasks somebody else should compute."""
    answers: dict[int, Tensor] = field(default_factory=dict)
    times: dict[int, float] = field(default_factory=dict)


class Master:
    """Runs jobs: see `leantrain.exchange.stragglers.coded_jobs.CodedJobs`, which checks and documents the arguments."""

    def __init__(
        self,
        scheme: Scheme,
        models: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        links: Mapping[int, Link],
        examples: int,
        mu: float,
        patience_s: float,
    ) -> None:
        self.scheme, self.models, self.optimizers, self.links = scheme, models, optimizers, links
        self.examples, self.mu, self.patience_s = examples, mu, patience_s
        self.lost: dict[int, str] = {}
        self._dtype = next(models[0].parameters()).dtype
        self._changed = threading.Condition()
        """Guards everything that threads and the main thread share, and wakes both."""
        self._open: _Round | None = None

    def run(self, jobs: range) -> Report:
        """Train `jobs` and wait until every worker that lives has been told that this is all."""
        self._first, self._course = jobs.start, self.scheme.begin(len(jobs))
        self._report = Report([math.nan] * len(jobs), lost=self.lost)
        self._weights: dict[int, Tensor] = {}
        self._vectors: dict[tuple[int, int], Tensor] = {}
        self._totals: dict[int, Tensor] = {}
        self._stopped = False
        began, bytes_before = time.perf_counter(), self._bytes()
        living = [worker for worker in self.links if worker not in self.lost]
        threads = [threading.Thread(target=self._serve, args=[worker], daemon=True) for worker in living]
        for thread in threads:
            thread.start()
        try:
            while not self._course.finished:
                self._do_round(self._course)
            self._report.total_s = time.perf_counter() - began
        finally:
            with self._changed:
                self._stopped, self._open = True, None
                self._changed.notify_all()
            for worker, thread in zip(living, threads, strict=True):
                thread.join(self.patience_s)
                if thread.is_alive():
                    self._lose(worker, f"silent for {self.patience_s:g} s at the end of a run")
        sent, received = self._bytes()
        self._report.bytes_to_workers, self._report.bytes_from_workers = (
            sent - bytes_before[0],
            received - bytes_before[1],
        )
        return self._report

    def _do_round(self, course: Course) -> None:
        if course.round < course.jobs:
            self._weights[course.round] = flat(trained(self._model(course.round)))
        tasks = {worker: course.tasks(worker) for worker in self.links if course.tasks(worker)}
        current = _Round(course.round, tasks, time.perf_counter())
        with self._changed:
            self._open = current
            self._changed.notify_all()
            late = self._until_it_may_end(course, current)
            self._open = None
        self._report.seconds.append(time.perf_counter() - current.started)
        self._report.times.append(np.array([current.times.get(worker, math.nan) for worker in self.links]))
        for worker, answer in current.answers.items():
            pieces = answer.split([self._numel(task.job) + 1 for task in tasks[worker]])
            self._vectors.update(zip(tasks[worker], pieces, strict=True))
        for each in course.close(late):
            self._add(each)

    def _until_it_may_end(self, course: Course, current: _Round) -> Mask:
        """Wait, and say who is late. The caller holds the lock."""
        waited = False
        while True:
            missing = [worker for worker in current.tasks if worker not in current.answers]
            late = np.isin(np.arange(self.scheme.n), missing)
            elapsed = time.perf_counter() - current.started
            deadline = (1 + self.mu) * min(current.times.values(), default=math.inf)
            if not missing or (
                (elapsed >= deadline or all(worker in self.lost for worker in missing)) and course.conforms(late)
            ):
                if waited:
                    self._report.waited.append(current.number)
                return late
            waited = elapsed >= deadline
            self._ask_others(course, current, missing, elapsed)
            ahead = [moment - elapsed for moment in (deadline, self.patience_s) if elapsed < moment < math.inf]
            self._changed.wait(min(ahead, default=None))

    def _ask_others(self, course: Course, current: _Round, missing: list[int], elapsed: float) -> None:
        """Where only workers that are dead or silent are left, others do what the scheme needs of theirs."""
        if len(self.lost) == len(self.links):
            reasons = "; ".join(f"{worker}: {reason}" for worker, reason in self.lost.items())
            raise RunError(f"no worker is left in round {current.number}: {reasons}")
        if elapsed < self.patience_s and not all(worker in self.lost for worker in missing):
            return
        needed: list[int] = []
        while not course.conforms(np.isin(np.arange(self.scheme.n), missing[len(needed) :])):
            needed.append(missing[len(needed)])
        for worker in needed:
            by = current.taken.get(worker, worker)
            if worker not in current.wanted and (by == worker or by in self.lost):
                current.wanted.append(worker)
                self._report.stood_in += 1
                self._changed.notify_all()

    def _serve(self, worker: int) -> None:
        """One worker's thread: everything that is said between it and the master."""
        link, known = self.links[worker], set[int]()
        try:
            while order := self._next(worker):
                current, whose, weights = order
                tasks, news = current.tasks[whose], sorted(weights.keys() - known)
                link.send(torch.tensor([WORK, current.number, whose, len(tasks), len(news)]))
                link.send(torch.tensor([(self._first + job, part) for job, part in tasks]))
                if news:
                    link.send(torch.tensor([self._first + job for job in news]))
                for job in news:
                    link.send(weights[job])
                known.update(news)
                if link.receive(1).item() == FAILED:
                    self._lose(worker, "failed: its own message says why")
                    return
                wanted = self._open is current and whose not in current.answers
                link.send(torch.tensor([int(wanted)]))
                if wanted:
                    numel = sum(self._numel(task.job) + 1 for task in tasks)
                    self._take(current, whose, link.receive(numel, dtype=self._dtype))
            link.send(torch.tensor([STOP, 0, 0, 0, 0]))
        except RuntimeError as error:
            self._lose(worker, str(error).strip().partition("\n")[0])

    def _next(self, worker: int) -> tuple[_Round, int, dict[int, Tensor]] | None:
        """The open round, whose tasks of it this worker should compute, and their jobs' weights; None at the end."""
        with self._changed:
            while not self._stopped:
                whose = self._unclaimed(worker, self._open) if self._open else None
                if self._open and whose is not None:
                    self._open.taken[whose] = worker
                    return self._open, whose, {job: self._weights[job] for job, _ in self._open.tasks[whose]}
                self._changed.wait()
        return None

    def _unclaimed(self, worker: int, current: _Round) -> int | None:
        if worker in current.tasks and worker not in current.taken:
            return worker
        return current.wanted.pop(0) if current.wanted else None

    def _take(self, current: _Round, worker: int, answer: Tensor) -> None:
        with self._changed:
            if self._open is current and worker not in current.answers:
                current.answers[worker] = answer
                current.times[worker] = time.perf_counter() - current.started
                self._changed.notify_all()

    def _lose(self, worker: int, reason: str) -> None:
        with self._changed:
            self.lost[worker] = reason
            self._changed.notify_all()

    def _add(self, piece: Sum) -> None:
        """Add a piece to its job's gradient, always in the same order; with the last one, step."""
        for part, weight in piece.weights().items():
            vector = self._vectors[piece.job, part]
            if piece.job in self._totals:
                self._totals[piece.job].add_(vector, alpha=weight)
            else:
                self._totals[piece.job] = vector * weight
        if piece.complete:
            self._step(piece.job, self._totals.pop(piece.job).div_(self.examples))
            del self._weights[piece.job]
        done = [key for key in self._vectors if key[0] == piece.job and (piece.complete or key[1] in piece.parts)]
        for key in done:
            del self._vectors[key]

    def _step(self, job: int, mean: Tensor) -> None:
        if not mean.isfinite().all():
            raise RunError(f"the gradient of job {self._first + job} is not finite")
        model, optimizer = self._model(job), self.optimizers[(self._first + job) % len(self.models)]
        params = trained(model)
        for param, grad in zip(params, mean[:-1].split([param.numel() for param in params]), strict=True):
            param.grad = grad.view_as(param)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._report.losses[job] = mean[-1].item()

    def _numel(self, job: int) -> int:
        return sum(param.numel() for param in trained(self._model(job)))

    def _model(self, job: int) -> nn.Module:
        return self.models[(self._first + job) % len(self.models)]

    def _bytes(self) -> tuple[int, int]:
        return sum(link.sent for link in self.links.values()), sum(link.received for link in self.links.values())


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that get gradients, in order."""
    return [param for param in model.parameters() if param.requires_grad]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """A copy of all their numbers in one vector, without a graph."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
