"""Columns are scaled by what the training rows show, and by nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from leantrain.data.standardise import standardised

TRAIN = np.arange(40)


def columns() -> np.ndarray:
    return np.random.default_rng(0).normal(5, 3, (50, 4))


def test_training_rows_have_mean_zero_and_variance_one() -> None:
    scaled, _, _ = standardised(columns(), TRAIN)
    np.testing.assert_allclose(scaled[TRAIN].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(scaled[TRAIN].std(axis=0), 1, atol=1e-6)


def test_held_out_rows_change_nothing_for_the_others() -> None:
    numbers = columns()
    before, _, _ = standardised(numbers, TRAIN)
    numbers[40:] *= 1000
    after, _, _ = standardised(numbers, TRAIN)
    np.testing.assert_array_equal(before[TRAIN], after[TRAIN])


def test_mean_and_std_lead_back_to_the_unit() -> None:
    numbers = columns()
    scaled, mean, std = standardised(numbers, TRAIN)
    np.testing.assert_allclose(scaled * std + mean, numbers, rtol=1e-5)


def test_missing_numbers_become_the_mean_and_do_not_move_it() -> None:
    numbers = columns()
    known = standardised(numbers[1:], TRAIN[:-1])
    numbers[0] = np.nan
    scaled, mean, std = standardised(numbers, TRAIN)
    np.testing.assert_array_equal(scaled[0], 0)
    np.testing.assert_allclose(mean, known[1])
    np.testing.assert_allclose(std, known[2])


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9, np.nan])
def test_a_column_without_variation_becomes_zeros(value: float) -> None:
    scaled, _, std = standardised(np.full((50, 1), value), TRAIN)
    np.testing.assert_array_equal(scaled, 0)
    assert std == 1
