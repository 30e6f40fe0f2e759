"""Which coding scheme would have been fastest: recorded delays of workers, replayed for every scheme and parameter.

    time of worker i in round r  =  recorded[r, i] + (load - recorded load) * slope + (vectors - 1) * seconds per vector
    end of round r               =  max of those in time, or (1 + mu) * fastest, or later if the scheme has to wait

Record with `Uncoded`, whose rounds wait for everybody, at several loads (`copies`); the slope of the straight line
through the mean times is what a larger load costs. A plan is as good as its record: delays that come back as they were.

Source: Krishnan, Ebrahimi and Khisti 2023 (Sequential Gradient Coding for Straggler Mitigation, ICLR), section on
selecting parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from leantrain.errors import UsageError
from leantrain.exchange.stragglers.coding_course import Course
from leantrain.exchange.stragglers.coding_scheme import Scheme
from leantrain.exchange.stragglers.sequential_coding import GC, MSGC, SRSGC, Uncoded

Kind = Literal["Uncoded", "GC", "SRSGC", "MSGC"]
KINDS: tuple[Kind, ...] = ("Uncoded", "GC", "SRSGC", "MSGC")
Times = NDArray[np.float64]
"""[rounds, workers], seconds."""


@dataclass(frozen=True)
class DelayProfile:
    """What workers took, and what they would take for more or less.

    Args:
        times: [rounds, workers], seconds from a round's start to a worker's answer. Longer runs start it over again.
        load: the share of a job that each worker computed then.
        slope: seconds per unit of load.
        seconds_per_vector: what each vector after the first of a round takes to send.

    Raises:
        UsageError: times that are not a matrix of finite numbers of at least 0, or a slope below 0.
    """

    times: Times
    load: float
    slope: float
    seconds_per_vector: float = 0.0

    def __post_init__(self) -> None:
        times = self.times
        if times.ndim != 2 or not times.size or not np.isfinite(times).all() or times.min() < 0:
            raise UsageError(
                f"times must be [rounds, workers], finite and at least 0, got shape {times.shape}; "
                "record with Uncoded, which waits for everybody"
            )
        if not self.slope >= 0:
            raise UsageError(f"slope must be at least 0 seconds per unit of load, got {self.slope}")

    @classmethod
    def fitted(cls, probes: Mapping[float, Times], seconds_per_vector: float = 0.0) -> DelayProfile:
        """From records at two or more loads: the times at the smallest, and the slope through all means.

        Args:
            probes: by load, [rounds, workers] seconds.
            seconds_per_vector: as above.

        Raises:
            UsageError: fewer than two loads.
        """
        if len(probes) < 2:
            raise UsageError(f"a slope needs records at two loads or more, got {len(probes)}")
        loads = sorted(probes)
        slope = float(np.polyfit(loads, [probes[load].mean() for load in loads], 1)[0])
        return cls(probes[loads[0]], loads[0], max(0.0, slope), seconds_per_vector)

    @property
    def workers(self) -> int:
        """How many there are."""
        return self.times.shape[1]

    def seconds(self, number: int, loads: Times, vectors: int) -> Times:
        """What each worker takes in a round in which it computes `loads`, [workers], in so many vectors."""
        extra = (loads - self.load) * self.slope + max(0, vectors - 1) * self.seconds_per_vector
        return np.maximum(self.times[number % len(self.times)] + extra, 1e-9)


@dataclass(frozen=True)
class Forecast:
    """A run that was only calculated."""

    scheme: Scheme
    seconds: float
    """Of all rounds; infinite if it was given up."""
    rounds: tuple[float, ...]
    """Of each."""
    waited: int
    """Rounds that lasted longer than (1 + mu) times the fastest answer because the scheme needed more."""
    late: int
    """Answers that were not waited for."""


def simulate(
    profile: DelayProfile, scheme: Scheme, jobs: int, mu: float | None = None, *,
    restart: bool = False, give_up_s: float = math.inf,
) -> Forecast:  # fmt: skip
    """The master's rounds over recorded delays.

    Args:
        profile: of as many workers as the scheme has.
        scheme: what to run.
        jobs: how many.
        mu: grace for the late ones, in times of the fastest answer. By default 1 where T > 0, else 0, as in CodedJobs.
        restart: whether a late worker drops what it does when a round ends, as a function in a cloud does. Otherwise it
            finishes first, as the processes of `CodedJobs` do, and begins later with the round that is then open.
        give_up_s: stop when the run has taken longer.

    Raises:
        UsageError: the profile has another number of workers.
    """
    if profile.workers != scheme.n:
        raise UsageError(f"{scheme} cannot be simulated on a profile of {profile.workers} workers")
    mu = (1.0 if scheme.delay else 0.0) if mu is None else mu
    course, rounds, waited, absent = scheme.begin(jobs), list[float](), 0, 0
    free_at = np.zeros(scheme.n)  # seconds after the start of the round
    while not course.finished and sum(rounds) <= give_up_s:
        loads = course.loads()
        busy = np.flatnonzero(loads > 0)
        vectors = round(loads.max() / float(scheme.load) * scheme.vectors)
        finish = np.where(loads > 0, free_at + profile.seconds(course.round, loads, vectors), 0.0)
        deadline = (1 + mu) * finish[busy].min(initial=math.inf)
        end = min(deadline, finish.max())
        if not course.conforms(finish > end):
            end, waited = _first_enough(course, finish), waited + 1
        late = finish > end
        free_at = np.where(late & (free_at < end), finish - end, np.maximum(free_at - end, 0.0)) * (not restart)
        absent += int(late.sum())
        rounds.append(float(end))
        course.close(late)
    seconds = sum(rounds) if course.finished else math.inf
    return Forecast(scheme, seconds, tuple(rounds), waited, absent)


def plan_scheme(
    profile: DelayProfile, models: int, jobs: int = 80, mu: float | None = None, *,
    kinds: Sequence[Kind] = KINDS, longest_window: int = 10, restart: bool = False,
) -> list[Forecast]:  # fmt: skip
    """Simulate every scheme and every parameter, and order them from the fastest.

    Args:
        profile: recorded delays.
        models: independent models in flight; schemes with T >= models cannot be used and are not tried.
        jobs, mu, restart: as for `simulate`.
        kinds: which schemes.
        longest_window: largest W of SRSGC.

    Returns:
        The fastest of each kind that can be used at all, fastest first.

    Raises:
        UsageError: no kind is left: SRSGC and MSGC were asked for with a single model, for which T must be 0.
    """
    best: dict[str, Forecast] = {}
    for scheme in candidates(profile.workers, models - 1, longest_window):
        kind = type(scheme).__name__
        if kind in kinds:
            beaten = best[kind].seconds if kind in best else math.inf
            found = simulate(profile, scheme, jobs, mu, restart=restart, give_up_s=beaten)
            if found.seconds < beaten:
                best[kind] = found
    if not best:
        raise UsageError(
            f"none of {', '.join(kinds)} fits {models} model{'s' if models > 1 else ''}: a scheme with delay T needs "
            "T + 1 independent models, because one model's next step waits for its last gradient; use GC"
        )
    return sorted(best.values(), key=lambda each: each.seconds)


def candidates(n: int, longest_delay: int, longest_window: int) -> Iterator[Scheme]:
    """Every scheme with T <= longest_delay. Of SRSGC only the largest lam of each s: smaller ones cost as much."""
    yield Uncoded(n)
    for s in range(1, n):
        yield GC(n, s)
    for B in range(1, longest_delay + 1):
        for times in range(2, (longest_window - 1) // B + 2):
            for s in range(1, -(-n // times) + 1):
                yield SRSGC(n, B, (times - 1) * B + 1, min(n, s * times))
        for W in range(B + 1, longest_delay - B + 3):
            for lam in range(1, n + 1):
                yield MSGC(n, B, W, lam)


def synthetic_times(
    rounds: int, workers: int, seed: int = 0, *,
    base_s: float = 1.0, jitter: float = 0.08, slow: float = 4.0, begins: float = 0.03, ends: float = 0.7,
) -> Times:  # fmt: skip
    """Made-up delays: a worker is slow or not, by a chain of two states of its own (Gilbert 1960, Elliott 1963).

    Args:
        rounds, workers: shape of what is returned, in seconds.
        seed: of the chance.
        base_s: what a worker takes that is not slow, on average.
        jitter: standard deviation of the logarithm of every time.
        slow: how many times as long a slow worker takes.
        begins, ends: chances, in a round, of becoming slow and of ceasing to be.
    """
    rng = np.random.default_rng(seed)
    state = rng.random(workers) < begins / (begins + ends)
    times = np.empty((rounds, workers))
    for number in range(rounds):
        times[number] = base_s * np.where(state, slow, 1.0) * rng.lognormal(0.0, jitter, workers)
        state = np.where(state, rng.random(workers) >= ends, rng.random(workers) < begins)
    return times


def _first_enough(course: Course, finish: Times) -> float:
    """The first moment at which the round may end; every answer more keeps it allowed, so it is found by halving."""
    moments = np.sort(finish)
    low, high = 0, len(moments) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if course.conforms(finish > moments[middle]) else (middle + 1, high)
    return float(moments[low])
