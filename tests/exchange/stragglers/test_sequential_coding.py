"""No pattern that a scheme is made for leaves a job undecoded in time, and no other one ever decodes wrongly."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leantrain.errors import UsageError
from leantrain.exchange.stragglers.coding_course import Course
from leantrain.exchange.stragglers.coding_scheme import Scheme
from leantrain.exchange.stragglers.models import Bursty, PerRound, random_pattern
from leantrain.exchange.stragglers.sequential_coding import GC, MSGC, SRSGC, Uncoded
from tests.exchange.stragglers.test_models import allowed_by_definition

SR = [SRSGC(n, B, x * B + 1, lam) for n in range(3, 7) for B in (1, 2, 3) for x in (1, 2, 3) for lam in range(1, n + 1)]
M = [MSGC(n, B, W, lam) for n in range(3, 7) for B in (1, 2, 3) for W in range(B + 1, B + 4) for lam in range(1, n + 1)]
SEQUENTIAL: list[Scheme] = [*SR, *M]
EVERY: list[Scheme] = [
    *SEQUENTIAL,
    *(GC(n, s) for n in range(3, 7) for s in range(n)),
    Uncoded(5),
    Uncoded(5, copies=2),
]


class Decoding:
    """A master that knows random gradients of all chunks, and adds up what a course tells it to."""

    def __init__(self, scheme: Scheme, jobs: int, rng: np.random.Generator) -> None:
        self.scheme, self.course = scheme, scheme.begin(jobs)
        self.chunks = rng.standard_normal((jobs, len(scheme.sizes), 3))
        self.found, self.done = np.zeros((jobs, 3)), dict[int, int]()
        self.answered: dict[tuple[int, int], np.ndarray] = {}

    def close(self, late: np.ndarray) -> None:
        number = self.course.round
        for worker in np.flatnonzero(~late):
            for job, part in self.course.tasks(worker):
                self.answered[job, part] = sum(v * self.chunks[job, chunk] for chunk, v in self.scheme.encode(part))
        for each in self.course.close(late):
            for part, weight in each.weights().items():
                self.found[each.job] += weight * self.answered[each.job, part]  # a KeyError: it was never answered
            if each.complete:
                assert each.job not in self.done
                self.done[each.job] = number

    def check(self) -> None:
        jobs = len(self.chunks)
        assert self.done.keys() == set(range(jobs))
        assert all(number <= job + self.scheme.delay for job, number in self.done.items())
        assert np.abs(self.found - self.chunks.sum(1)).max() < 1e-9


class PerStretch:
    """Patterns that the scheme says it lives with, whichever of its models allows each stretch."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def allows(self, late: np.ndarray) -> bool:
        return self.scheme.conforms(late)


@settings(deadline=None, max_examples=1000)
@given(st.sampled_from(EVERY), st.integers(0, 2**32 - 1), st.sampled_from([0.1, 0.4, 0.8, 1.0]), st.booleans())
def test_conforming_patterns_leave_no_job_undecoded(scheme: Scheme, seed: int, chance: float, mixed: bool) -> None:
    rng = np.random.default_rng(seed)
    model = PerStretch(scheme) if mixed else scheme.tolerates[seed % len(scheme.tolerates)]
    late = random_pattern(model, 9 + scheme.delay, scheme.n, rng, chance)
    if not mixed:
        assert allowed_by_definition(model, late.tolist())
    run = Decoding(scheme, 9, rng)
    while not run.course.finished:
        assert run.course.conforms(late[run.course.round]), "the scheme must not wait for what it is made for"
        run.close(late[run.course.round])
    run.check()


@settings(deadline=None, max_examples=500)
@given(st.sampled_from(EVERY), st.integers(0, 2**32 - 1), st.floats(0.2, 0.95))
def test_any_other_pattern_is_waited_out_and_decodes_exactly(scheme: Scheme, seed: int, chance: float) -> None:
    rng = np.random.default_rng(seed)
    run = Decoding(scheme, 8, rng)
    while not run.course.finished:
        late = rng.random(scheme.n) < chance
        before, missing = run.course.round, list(rng.permutation(np.flatnonzero(late)))
        while not run.course.conforms(late):
            with pytest.raises(UsageError, match=f"round {before} of .* cannot end without workers"):
                run.course.close(late)
            late[missing.pop()] = False
        assert run.course.round == before
        run.close(late)
    run.check()


def test_every_conforming_pattern_of_three_workers_decodes() -> None:
    """All of them, not some: three workers and as many rounds as two jobs take."""
    count = 0
    for scheme in (SRSGC(3, 1, 2, 2), SRSGC(3, 1, 2, 3), MSGC(3, 1, 2, 1), MSGC(3, 1, 2, 2), MSGC(3, 1, 2, 3)):
        rounds = 3 + scheme.delay
        for bits in product([False, True], repeat=3 * rounds):
            late = np.array(bits).reshape(rounds, 3)
            if any(allowed_by_definition(model, late.tolist()) for model in scheme.tolerates):
                run, count = Decoding(scheme, 3, np.random.default_rng(0)), count + 1
                while not run.course.finished:
                    run.close(late[run.course.round])
                run.check()
    assert count > 1000


def test_more_stragglers_than_a_scheme_lives_with_are_too_many() -> None:
    """What lies just outside of the tolerated patterns: one worker or one round more."""
    sr, m = SRSGC(6, 1, 2, 4), MSGC(6, 1, 2, 3)
    three, other_three = np.arange(6) < 3, np.arange(6) >= 3
    for scheme, allowed, refused in ((sr, three, other_three), (m, three, three), (m, three, other_three)):
        course = scheme.begin(5)
        assert course.conforms(allowed)
        course.close(allowed)
        assert not course.conforms(refused)
        assert course.conforms(np.zeros(6, dtype=bool))
    assert not GC(6, 1).begin(1).conforms(np.array([1, 1, 0, 0, 0, 0], dtype=bool))
    assert GC(6, 1).begin(1).conforms(np.array([1, 0, 1, 0, 0, 1], dtype=bool))  # one of each pair is there


def test_loads_are_those_of_the_paper() -> None:
    assert float(MSGC(256, 1, 2, 27).load) == pytest.approx(0.00754, abs=5e-6)
    assert SRSGC(256, 2, 3, 23).s == 12 and SRSGC(256, 2, 3, 23).load == Fraction(13, 256)
    assert GC(256, 15).load == Fraction(16, 256) and Uncoded(256).load == Fraction(1, 256)


@pytest.mark.parametrize("scheme", M, ids=str)
def test_multiplexed_loads_are_the_formula(scheme: MSGC) -> None:
    n, B, W, lam = scheme.n, scheme.B, scheme.W, scheme.lam
    if lam < n:
        assert scheme.load == Fraction((lam + 1) * (W - 1 + B), n * (B + (W - 1) * (lam + 1)))
    else:
        assert scheme.load == Fraction(W - 1 + B, n * (W - 1))
    assert sum(scheme.sizes) == 1 and scheme.delay == W - 2 + B


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(EVERY), st.integers(0, 2**32 - 1))
def test_nobody_computes_more_than_the_load(scheme: Scheme, seed: int) -> None:
    rng = np.random.default_rng(seed)
    late = random_pattern(PerStretch(scheme), 8 + scheme.delay, scheme.n, rng)
    course: Course = scheme.begin(8)
    while not course.finished:
        for worker, load in enumerate(course.loads()):
            tasks = course.tasks(worker)
            chunks = [sum(scheme.sizes[chunk] for chunk, _ in scheme.encode(part)) for _, part in tasks]
            assert len(tasks) <= scheme.vectors and all(each == scheme.load / scheme.vectors for each in chunks)
            assert load == pytest.approx(float(sum(chunks))) and load <= scheme.load + 1e-12
        course.close(late[course.round])


def test_nobody_late_means_nothing_is_repeated() -> None:
    run = Decoding(SRSGC(6, 2, 3, 3), 5, np.random.default_rng(0))
    while not run.course.finished:
        run.close(np.zeros(6, dtype=bool))
    assert run.done == {job: job for job in range(5)}


def test_the_delay_is_taken_where_it_is_needed() -> None:
    run = Decoding(SRSGC(6, 2, 3, 4), 3, np.random.default_rng(0))
    run.close(np.arange(6) < 4)
    assert 0 not in run.done
    assert [run.course.tasks(worker)[0].job for worker in range(6)] == [1] * 6
    run.close(np.zeros(6, dtype=bool))
    assert sorted(run.course.tasks(worker)[0].job for worker in range(6)) == [0, 0, 2, 2, 2, 2]
    run.close(np.zeros(6, dtype=bool))
    run.check()
    assert run.done[0] == 2


@pytest.mark.parametrize("examples", [1, 7, 64, 1000])
def test_chunks_are_all_examples_once(examples: int) -> None:
    for scheme in (GC(6, 2), SRSGC(5, 1, 2, 2), MSGC(4, 2, 3, 2), MSGC(4, 1, 3, 4)):
        bounds = scheme.bounds(examples)
        assert bounds[0] == 0 and bounds[-1] == examples and bounds == sorted(bounds)
        assert len(bounds) == len(scheme.sizes) + 1
        for size, begin, end in zip(scheme.sizes, bounds, bounds[1:], strict=False):
            assert abs(end - begin - size * examples) <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GC(4, 4), "0 <= s < n, got n=4, s=4"),
        (lambda: GC(4, -1), "got n=4, s=-1"),
        (lambda: Uncoded(4, copies=5), "copies=5"),
        (lambda: SRSGC(4, 2, 4, 2), r"B >= 1 that divides W - 1 >= 1, got B=2, W=4"),
        (lambda: SRSGC(4, 0, 3, 2), "got B=0"),
        (lambda: SRSGC(4, 1, 1, 2), "W=1"),
        (lambda: SRSGC(4, 1, 2, 5), "1 <= lam <= n, got n=4, lam=5"),
        (lambda: MSGC(4, 2, 2, 2), "0 < B < W, got B=2, W=2"),
        (lambda: MSGC(4, 0, 2, 2), "got B=0"),
        (lambda: MSGC(4, 1, 2, 0), "lam=0"),
        (lambda: MSGC(1, 1, 2, 1), "n >= 2"),
        (lambda: GC(4, 1).begin(0), "at least 1 job"),
    ],
)  # fmt: skip
def test_impossible_parameters_are_refused(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_what_a_scheme_lives_with_is_what_its_name_says() -> None:
    assert SRSGC(6, 2, 5, 4).tolerates == (PerRound(2), Bursty(2, 5, 4))
    assert MSGC(6, 2, 3, 4).conforms(np.eye(6, dtype=bool)[:4])
