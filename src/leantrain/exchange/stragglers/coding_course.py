"""The course of a run under a coding scheme: who computes what in this round, given who was late in those before it.

A round has three moments: `tasks` says what everybody computes; `conforms` says whether it may end without some of
them; `close` ends it, says which answers now add up to (a piece of) a job's gradient, and begins the next round. One
that does not conform cannot be closed, so nothing is ever decoded from too little.

Source: Krishnan, Ebrahimi and Khisti 2023 (Sequential Gradient Coding for Straggler Mitigation, ICLR).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from leantrain.errors import UsageError
from leantrain.exchange.stragglers.coding_scheme import Scheme
from leantrain.exchange.stragglers.models import Pattern

if TYPE_CHECKING:
    from leantrain.exchange.stragglers.sequential_coding import GC, MSGC

Mask = NDArray[np.bool_]
"""[n]: which workers."""
Parts = NDArray[np.int64]
"""[n]: the part of a job that each worker computes, NONE for nothing."""
NONE = -1


class Task(NamedTuple):
    """One vector that a worker computes in a round: `part` of `job`, which `Scheme.encode` describes."""

    job: int
    part: int


@dataclass(frozen=True)
class Sum:
    """Answers that have arrived and add up to a piece of a job's gradient."""

    job: int
    workers: list[int]
    parts: list[int]
    code: GC | None
    """Whose rows were computed; None if all weights are 1. Large codes take long to make: only `weights` does."""
    complete: bool
    """Whether with this piece the job's gradient is whole."""

    def weights(self) -> dict[int, float]:
        """The weight of each part that counts."""
        if self.code is None:
            return dict.fromkeys(self.parts, 1.0)
        part_of = dict(zip(self.workers, self.parts, strict=True))
        found = self.code.decoder.weights(self.workers)
        assert found is not None, f"job {self.job} was taken to be decodable from workers {self.workers}"
        return {part_of[worker]: weight for worker, weight in found.items()}


class Course(ABC):
    """A run of `jobs` jobs, number 0 starting in round 0, up to the present round."""

    def __init__(self, scheme: Scheme, jobs: int) -> None:
        if jobs < 1:
            raise UsageError(f"a run needs at least 1 job, got jobs={jobs}")
        self.scheme, self.jobs = scheme, jobs
        self.round = 0
        self.late: Pattern = np.zeros((0, scheme.n), dtype=bool)
        """Who was late in the last rounds that still matter."""
        self._last_late = np.full(scheme.n, -1)
        self._has: dict[int, Mask] = {}
        """What has arrived of every job in flight."""
        self._now: dict[int, Parts] = {}
        """What everybody computes in this round, by job; nothing where all that is in flight waits for a later one."""

    @property
    def finished(self) -> bool:
        """Whether every job is decoded."""
        return self.round >= self.jobs and not self._has

    def tasks(self, worker: int) -> tuple[Task, ...]:
        """What a worker computes in this round, oldest job first."""
        return tuple(Task(job, int(parts[worker])) for job, parts in self._now.items() if parts[worker] != NONE)

    def loads(self) -> NDArray[np.float64]:
        """The share of a job that each worker computes in this round, [n]."""
        counts = np.zeros(self.scheme.n)
        for parts in self._now.values():
            counts += parts != NONE
        return counts * float(self.scheme.load / self.scheme.vectors)

    def conforms(self, late: Mask) -> bool:
        """Whether this round may end without the answers of these workers. Who has nothing to do is never late."""
        stretch = np.vstack([self.late, late & (self.loads() > 0)])
        return any(model.allows(stretch) for model in self.scheme.tolerates)

    def close(self, late: Mask) -> list[Sum]:
        """End the round without these workers' answers.

        Args:
            late: bool [n], who has not answered.

        Returns:
            What can be added up now, oldest job first. Answers that are in none of these sums may be in a later one of
            their job, until it is complete.

        Raises:
            UsageError: the round must be waited out for some of them; nothing has changed.
        """
        if not self.conforms(late):
            raise UsageError(
                f"round {self.round} of {self.scheme} cannot end without workers {np.flatnonzero(late).tolist()}: "
                "wait for more of them"
            )
        late = late & (self.loads() > 0)
        sums = [each for job, parts in self._now.items() for each in self._settle(job, parts, ~late & (parts != NONE))]
        self.late = np.vstack([self.late, late])[max(0, len(self.late) + 2 - self.scheme.memory) :]
        self._last_late[late] = self.round
        self.round += 1
        self._now = self._assign()
        return sums

    @abstractmethod
    def _assign(self) -> dict[int, Parts]:
        """What everybody computes in the round that begins, by job in rising order."""

    @abstractmethod
    def _settle(self, job: int, parts: Parts, answered: Mask) -> list[Sum]:
        """Take note of a job's answers of this round."""


class Repeating(Course):
    """Every job is one code over all workers; `gap` rounds later some of those who were late do their part again.

    Of a job in flight it remembers whose part has arrived, [n].

    Args:
        scheme, jobs: as for every course.
        code: the code of a job.
        gap: B of SR-SGC, or 0 if nothing is repeated.
    """

    def __init__(self, scheme: Scheme, jobs: int, code: GC, gap: int = 0) -> None:
        super().__init__(scheme, jobs)
        self.code, self.gap = code, gap
        self._now = self._assign()

    def _assign(self) -> dict[int, Parts]:
        everyone = np.arange(self.scheme.n)
        again = np.zeros(self.scheme.n, dtype=bool)
        if self.gap and self.round - self.gap in self._has:
            missing = np.flatnonzero(~self._has[self.round - self.gap])
            # The paper lets any v - s of them repeat. Who has been in time the longest will be again, most likely.
            missing = missing[np.argsort(self._last_late[missing], kind="stable")]
            again[missing[: len(missing) - self.code.s]] = True
        now = {self.round - self.gap: np.where(again, everyone, NONE)} if again.any() else {}
        if self.round < self.jobs:
            self._has[self.round] = np.zeros(self.scheme.n, dtype=bool)
            now[self.round] = np.where(again, NONE, everyone)
        return now

    def _settle(self, job: int, parts: Parts, answered: Mask) -> list[Sum]:
        has = self._has[job]
        has |= answered
        if not any(model.allows(~has[None]) for model in self.code.tolerates):
            return []
        del self._has[job]
        workers = np.flatnonzero(has).tolist()
        return [Sum(job, workers, workers, self.code, complete=True)]


class Multiplexed(Course):
    """M-SGC: of every job in flight each worker computes one vector per round.

    Of a job in flight it remembers which large chunks have arrived, [n, W-1].
    """

    def __init__(self, scheme: MSGC, jobs: int) -> None:
        super().__init__(scheme, jobs)
        self._msgc = scheme
        self._now = self._assign()

    def _assign(self) -> dict[int, Parts]:
        if self.round < self.jobs:
            self._has[self.round] = np.zeros((self._msgc.n, self._msgc.W - 1), dtype=bool)
        return {job: self._parts(job) for job in self._has}

    def _parts(self, job: int) -> Parts:
        everyone, own = np.arange(self._msgc.n), self._msgc.W - 1
        slot, has = self.round - job, self._has[job]
        if slot < own:
            return everyone * own + slot
        group = self._msgc.large_chunks + (slot - own) * self._msgc.n
        coded = group + everyone if self._msgc.inner else np.full_like(everyone, NONE)
        return np.where(has.all(1), coded, everyone * own + has.argmin(1))

    def _settle(self, job: int, parts: Parts, answered: Mask) -> list[Sum]:
        has = self._has[job]
        large = np.flatnonzero(answered & (parts < self._msgc.large_chunks))
        has.reshape(-1)[parts[large]] = True
        inner, slot = self._msgc.inner, self.round - job
        complete = bool(has.all()) and (inner is None or slot == self._msgc.delay)
        if complete:
            del self._has[job]
        sums = [Sum(job, large.tolist(), parts[large].tolist(), None, complete)]
        if inner and slot >= self._msgc.W - 1:
            coded = np.flatnonzero(answered & (parts >= self._msgc.large_chunks))
            sums.insert(0, Sum(job, coded.tolist(), parts[coded].tolist(), inner, False))
        return sums
