"""Means, spreads and the paired test over seeds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leantrain.paired import spread, versus

# The textbook example of Student's t for pairs (Student 1908, after Cushny & Peebles): hours of sleep gained with two
# drugs by ten patients; t = 4.0621 with 9 degrees of freedom, two-sided p = 0.002833.
DEXTRO = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
LAEVO = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]

losses = st.floats(0.5, 10.0)


def by_seed(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values))


def test_the_test_gives_the_p_value_of_students_own_example():
    found = versus(by_seed(LAEVO), by_seed(DEXTRO))
    assert found is not None and found.p_value is not None
    assert found.difference == pytest.approx(1.58)
    assert found.p_value == pytest.approx(0.002833, abs=1e-6)
    assert found.n == 10 and "10 seeds" in found.test


def test_mean_and_sample_standard_deviation():
    found = spread([2.0, 4.0, 9.0])
    assert found is not None
    assert (found.mean, found.n) == (5.0, 3)
    assert found.std == pytest.approx(math.sqrt((9 + 1 + 16) / 2))


def test_one_value_has_no_spread_and_no_values_have_no_mean():
    one = spread([3.0])
    assert one is not None and one.std is None
    assert spread([]) is None


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_seeds_give_no_p_value_but_the_reason(n: int):
    found = versus(by_seed([2.0, 2.5][:n]), by_seed([1.0, 1.2][:n]))
    assert found is not None
    assert found.p_value is None
    assert f"{n} seed" in found.test and "3 needed" in found.test


def test_only_seeds_that_both_have_are_compared():
    found = versus({0: 2.0, 1: 100.0}, {0: 1.0, 2: 50.0})
    assert found is not None
    assert (found.difference, found.ratio, found.n) == (1.0, 2.0, 1)
    assert versus({0: 2.0}, {1: 1.0}) is None


def test_pairs_are_matched_by_seed_and_not_by_order():
    ours, theirs = {0: 1.0, 1: 2.0, 2: 3.5}, {2: 3.0, 1: 1.6, 0: 0.7}
    shuffled = versus(ours, dict(sorted(theirs.items())))
    assert versus(ours, theirs) == shuffled


def test_differences_that_do_not_vary_are_not_tested():
    equal = versus(by_seed([1.0, 2.0, 3.0]), by_seed([1.0, 2.0, 3.0]))
    shifted = versus(by_seed([1.1, 2.1, 3.1]), by_seed([1.0, 2.0, 3.0]))
    assert equal is not None and shifted is not None
    assert equal.p_value is None and "equal in all 3" in equal.test
    assert shifted.p_value is None and "same difference" in shifted.test


def test_what_no_seed_can_change_is_not_tested():
    found = versus(by_seed([1.0, 2.0, 4.0]), by_seed([1.0, 1.5, 3.0]), tested=False)
    assert found is not None and found.p_value is None and found.ratio == pytest.approx(7 / 5.5)


def test_a_baseline_of_zero_has_a_difference_but_no_ratio():
    found = versus({0: 5.0}, {0: 0.0})
    assert found is not None and found.ratio is None and found.difference == 5.0


@given(st.lists(st.tuples(losses, losses), min_size=3, max_size=8))
def test_swapping_run_and_baseline_turns_the_sign_and_keeps_the_p_value(pairs: list[tuple[float, float]]):
    ours, theirs = by_seed([a for a, _ in pairs]), by_seed([b for _, b in pairs])
    there, back = versus(ours, theirs), versus(theirs, ours)
    assert there is not None and back is not None
    assert there.difference == pytest.approx(-back.difference)
    if there.p_value is None or back.p_value is None:
        assert there.p_value is back.p_value is None
    else:
        assert there.p_value == pytest.approx(back.p_value)
        assert 0 <= there.p_value <= 1
