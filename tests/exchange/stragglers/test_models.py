"""Patterns of stragglers are judged as their definitions say; recorded delays are replayed as a slow clock would."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leantrain.errors import UsageError
from leantrain.exchange.stragglers.coding_scheme import Scheme
from leantrain.exchange.stragglers.models import (
    Arbitrary,
    Bursty,
    OnePerGroup,
    PerRound,
    StragglerModel,
    random_pattern,
)
from leantrain.exchange.stragglers.planner import DelayProfile, candidates, plan_scheme, simulate, synthetic_times
from leantrain.exchange.stragglers.sequential_coding import GC, MSGC, SRSGC, Uncoded

SLOW = settings(deadline=None, max_examples=300)
MODELS = [PerRound(1), OnePerGroup(2), Bursty(1, 2, 2), Bursty(2, 3, 2), Bursty(2, 4, 3), Arbitrary(1, 3, 2),
          Arbitrary(2, 4, 2)]  # fmt: skip


def allowed_by_definition(model: StragglerModel, late: list[list[bool]]) -> bool:
    """The definitions, over sets of (round, worker), with no arrays."""
    when = [{worker for worker, is_late in enumerate(row) if is_late} for row in late]
    if isinstance(model, PerRound):
        return all(len(who) <= model.s for who in when)
    if isinstance(model, OnePerGroup):
        groups = [set(range(first, first + model.size)) for first in range(0, len(late[0]), model.size)] if late else []
        return not any(group <= who for who in when for group in groups)
    assert isinstance(model, Bursty | Arbitrary)
    for start in range(len(when)):
        window = when[start : start + model.W]
        if len(set().union(*window)) > model.lam:
            return False
        for worker in set().union(*window):
            rounds = [number for number, who in enumerate(window) if worker in who]
            if isinstance(model, Bursty) and rounds[-1] - rounds[0] >= model.B:
                return False
            if isinstance(model, Arbitrary) and len(rounds) > model.N:
                return False
    return True


@pytest.mark.parametrize("model", MODELS, ids=str)
@SLOW
@given(rows=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), max_size=7))
def test_a_pattern_is_allowed_as_the_definition_says(model: StragglerModel, rows: list[list[bool]]) -> None:
    assert model.allows(np.array(rows, dtype=bool).reshape(len(rows), 4)) == allowed_by_definition(model, rows)


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_random_patterns_are_allowed_and_reach_the_limits(model: StragglerModel) -> None:
    rng = np.random.default_rng(0)
    patterns = [random_pattern(model, 8, 4, rng, probability) for probability in (0.2, 0.5, 1.0) for _ in range(10)]
    assert all(allowed_by_definition(model, pattern.tolist()) for pattern in patterns)
    assert all(pattern.any() for pattern in patterns[-10:])
    full = patterns[-1]
    for number, worker in zip(*np.nonzero(~full), strict=True):  # at probability 1 nobody could have been added
        more = full.copy()
        more[number, worker] = True
        assert not model.allows(more[: number + 1])


@pytest.mark.parametrize(
    "make",
    [lambda: PerRound(-1), lambda: OnePerGroup(0), lambda: Bursty(3, 2, 1), lambda: Bursty(0, 2, 1),
     lambda: Arbitrary(0, 1, 1), lambda: Arbitrary(1, 1, -1)],
)  # fmt: skip
def test_impossible_models_are_refused(make) -> None:
    with pytest.raises(UsageError, match="got"):
        make()


def replayed(profile: DelayProfile, scheme: Scheme, jobs: int, mu: float, restart: bool) -> tuple[list[float], int]:
    """The same master on a clock that ticks through every worker's arrivals, one worker at a time."""
    course, free, now, rounds, waited = scheme.begin(jobs), [0.0] * scheme.n, 0.0, [], 0
    while not course.finished:
        number, loads = course.round, course.loads()
        recorded = profile.times[number % len(profile.times)]
        vectors = max(len(course.tasks(worker)) for worker in range(scheme.n))
        arrives: dict[int, float] = {}
        for worker in range(scheme.n):
            if loads[worker]:
                takes = recorded[worker] + (loads[worker] - profile.load) * profile.slope
                takes += (vectors - 1) * profile.seconds_per_vector
                arrives[worker] = max(now, free[worker]) + takes
        end = now
        if arrives:
            grace = now + (1 + mu) * (min(arrives.values()) - now)
            for end in sorted({*arrives.values(), grace}):
                missing = np.array([arrives.get(worker, now) > end for worker in range(scheme.n)])
                if not missing.any() or (end >= grace and course.conforms(missing)):
                    break
            waited += end > grace * (1 + 1e-12)
        late = np.array([arrives.get(worker, now) > end for worker in range(scheme.n)])
        for worker, moment in arrives.items():
            began = max(now, free[worker])
            free[worker] = end if restart else moment if began < end else began
        course.close(late)
        rounds.append(end - now)
        now = end
    return rounds, waited


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize(
    "scheme",
    [Uncoded(6), GC(6, 2), GC(6, 3), SRSGC(6, 1, 2, 4), SRSGC(6, 2, 3, 3), MSGC(6, 1, 2, 3), MSGC(6, 1, 2, 6)],
    ids=str,
)  # fmt: skip
def test_the_simulator_is_the_master_on_a_slow_clock(scheme: Scheme, restart: bool) -> None:
    for seed in range(4):
        profile = DelayProfile(synthetic_times(17, 6, seed, begins=0.2), 1 / 6, 0.8, 0.01)
        for mu in (0.0, 1.0):
            found = simulate(profile, scheme, 12, mu, restart=restart)
            rounds, waited = replayed(profile, scheme, 12, mu, restart)
            assert found.rounds == pytest.approx(rounds) and found.seconds == pytest.approx(sum(rounds))
            assert found.waited == waited


def test_a_simulation_by_hand() -> None:
    times = np.array([[1.0, 1.1, 5.0], [1.0, 1.0, 1.0], [2.0, 9.0, 9.0]])
    profile = DelayProfile(times, load=1 / 3, slope=3.0)
    assert simulate(profile, Uncoded(3), 3).rounds == pytest.approx((5.0, 1.0, 9.0))
    assert simulate(profile, GC(3, 1), 3, mu=1.0, restart=True).rounds == pytest.approx((4.0, 2.0, 10.0))
    eager = simulate(profile, GC(3, 1), 3, restart=True)
    assert eager.rounds == pytest.approx((2.1, 2.0, 10.0)) and eager.late == 1
    busy = simulate(profile, GC(3, 1), 3)  # worker 2 is at its first task until 6.0, and after that late for round 2
    assert busy.rounds == pytest.approx((2.1, 2.0, 10.0)) and busy.late == 2 + 1


def test_the_slope_is_that_of_the_means() -> None:
    rng = np.random.default_rng(0)
    probes = {load: 0.5 + 2.2 * load + 0.01 * rng.standard_normal((50, 8)) for load in (0.25, 0.5, 0.75, 1.0)}
    profile = DelayProfile.fitted(probes)
    assert profile.load == 0.25 and profile.slope == pytest.approx(2.2, abs=0.02)
    assert profile.seconds(3, np.full(8, 1.0), 1) == pytest.approx(probes[0.25][3] + 0.75 * profile.slope)


def test_a_plan_is_the_best_of_all_candidates() -> None:
    profile = DelayProfile(synthetic_times(20, 6, seed=3, begins=0.1, ends=1.0), 1 / 6, 0.5)
    plans = plan_scheme(profile, models=3, jobs=20, restart=True, longest_window=5)
    everything = [simulate(profile, scheme, 20, restart=True) for scheme in candidates(6, 2, 5)]
    for plan in plans:
        same_kind = [each.seconds for each in everything if type(each.scheme) is type(plan.scheme)]
        assert plan.seconds == min(same_kind)
    assert [plan.seconds for plan in plans] == sorted(plan.seconds for plan in plans) and len(plans) == 4


def test_with_one_model_only_schemes_without_delay_are_planned() -> None:
    profile = DelayProfile(synthetic_times(10, 6), 1 / 6, 0.5)
    assert {type(plan.scheme) for plan in plan_scheme(profile, models=1, jobs=10)} == {Uncoded, GC}
    with pytest.raises(UsageError, match=r"T \+ 1 independent models, because one model's next step waits"):
        plan_scheme(profile, models=1, kinds=["SRSGC", "MSGC"])


def test_gradient_coding_is_planned_only_where_it_pays() -> None:
    """n=4, s=1, a worker late by .45 s with chance .1: it pays for 50 ms of computing, and not for 200 ms."""
    rng = np.random.default_rng(0)
    for compute, pays in ((0.05, True), (0.2, False)):
        times = compute + 0.45 * (rng.random((4000, 4)) < 0.1)
        profile = DelayProfile(times, 1 / 4, slope=4 * compute)
        uncoded = simulate(profile, Uncoded(4), 4000, restart=True).seconds / 4000
        coded = simulate(profile, GC(4, 1), 4000, mu=0.0, restart=True).seconds / 4000
        assert uncoded == pytest.approx(compute + 0.45 * (1 - 0.9**4), rel=0.03)
        more_than_one = 1 - 0.9**4 - 4 * 0.1 * 0.9**3
        assert coded <= 2 * compute + 0.45 * more_than_one * 1.1  # repetition decodes two thirds of the pairs as well
        assert coded == pytest.approx(2 * compute + 0.45 * (1 - (1 - 0.01) ** 2), rel=0.05)
        assert (coded < uncoded) == pays
        best = plan_scheme(DelayProfile(times[:400], 1 / 4, 4 * compute), 1, 400, restart=True)[0]
        assert isinstance(best.scheme, Uncoded) != pays


@pytest.mark.parametrize("times", [np.ones(3), np.array([[1.0, math.nan]]), np.array([[-1.0]])])
def test_a_record_with_gaps_is_refused(times) -> None:
    with pytest.raises(UsageError, match="times must be"):
        DelayProfile(times, 0.25, 1.0)


def test_profiles_that_cannot_serve_are_refused() -> None:
    profile = DelayProfile(np.ones((2, 4)), 0.25, 1.0)
    with pytest.raises(UsageError, match="profile of 4 workers"):
        simulate(profile, GC(5, 1), 3)
    with pytest.raises(UsageError, match="two loads"):
        DelayProfile.fitted({0.25: np.ones((2, 4))})
    with pytest.raises(UsageError, match="slope"):
        DelayProfile(np.ones((2, 4)), 0.25, -1.0)
