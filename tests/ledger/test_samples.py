"""Quantiles against numpy, and a reservoir that stays small and fair."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leantrain.ledger.samples import Samples, StepTimes

numbers = st.lists(st.floats(0, 1e6), min_size=1, max_size=50)


def filled(values: list[float], limit: int = 8192) -> Samples:
    samples = Samples(limit)
    for value in values:
        samples.add(value)
    return samples


@given(numbers, st.floats(0.01, 1.0))
def test_up_to_the_limit_everything_is_exact(values: list[float], fraction: float) -> None:
    samples = filled(values)
    assert samples.median() == pytest.approx(np.median(values))
    assert samples.quantile(fraction) == np.quantile(values, fraction, method="inverted_cdf")
    assert samples.max == max(values)
    assert samples.total == pytest.approx(sum(values))


def test_beyond_the_limit_the_sample_is_fair_and_count_total_max_stay_exact() -> None:
    samples = filled([float(i) for i in range(20_000)], limit=1000)
    assert (samples.count, samples.max, samples.total) == (20_000, 19_999.0, sum(range(20_000)))
    assert len(samples.state_dict()["kept"]) == 1000
    assert samples.median() == pytest.approx(10_000, abs=1600)  # five standard deviations of a sampled median
    assert samples.quantile(0.99) == pytest.approx(19_800, abs=320)


def test_sampling_leaves_the_global_generator_alone() -> None:
    state = random.getstate()
    filled([1.0] * 50, limit=5)
    assert random.getstate() == state


def test_no_values_give_zeros() -> None:
    assert (Samples().median(), Samples().quantile(0.99), Samples().max) == (0.0, 0.0, 0.0)


def test_step_times_go_through_json_and_go_on() -> None:
    whole, first, second = (StepTimes(["forward", "other"]) for _ in range(3))
    steps = [{"forward": 1.0, "other": 0.5}, {"other": 4.0}, {"forward": 3.0}]
    for step in steps:
        whole.add(step)
    first.add(steps[0])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.add(steps[1])
    second.add(steps[2])
    assert second.of_steps() == whole.of_steps() == {"median": 3.0, "p99": 4.0, "max": 4.0, "total": 8.5}
    assert second.of_phases() == whole.of_phases() == {"forward": 1.0, "other": 0.5}
