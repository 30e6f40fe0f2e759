"""The order of examples: complete epochs, no hidden state, and the same on every machine for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leantrain.data import order
from leantrain.data.order import Stream, eval_rows, raw, split_rows, train_rows
from leantrain.errors import UsageError


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 50), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 5), data=st.data())
def test_every_example_is_used_exactly_once_per_epoch_whatever_the_batch_size(
    count: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, count))
    steps = range(epoch * count // size, -(-(epoch + 1) * count // size))
    drawn = np.concatenate([train_rows(count, seed, step, size) for step in steps])
    first = epoch * count - steps[0] * size
    assert sorted(drawn[first : first + count]) == list(range(count))


def test_a_step_does_not_depend_on_the_steps_asked_for_before() -> None:
    forward = [train_rows(23, 7, step, 5).tolist() for step in range(40)]
    order._permutation.cache_clear()
    backward = [train_rows(23, 7, step, 5).tolist() for step in reversed(range(40))]
    assert forward == backward[::-1]


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {tuple(train_rows(100, seed, epoch, 100)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_order_never_changes_between_versions() -> None:
    # Frozen. A change here means that a resumed run would see other examples than the run it goes on with.
    assert train_rows(10, 0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert raw(Stream.AUGMENT, 1, 2, 2).tolist() == [8522060295706411025, 5118440093117415833]


def test_every_position_of_an_epoch_is_equally_likely_for_an_example() -> None:
    places = np.array([np.flatnonzero(train_rows(8, seed, 0, 8) == 0)[0] for seed in range(4000)])
    counts = np.bincount(places, minlength=8)
    chi_square = ((counts - 500) ** 2 / 500).sum()
    assert chi_square < 24.3  # 0.999 quantile at 7 degrees of freedom; the draw is fixed


def test_streams_are_independent() -> None:
    draws = [tuple(raw(stream, 3, 4, 4)) for stream in Stream]
    assert len(set(draws)) == len(Stream)


@pytest.mark.parametrize("size", [0, -1, 11])
def test_a_batch_that_does_not_fit_the_set_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match=f"between 1 and the 10 training examples, got {size}"):
        train_rows(10, 0, 0, size)


@pytest.mark.parametrize(("seed", "step"), [(-1, 0), (0, -1), (2**64, 0)])
def test_seeds_and_steps_out_of_range_are_refused(seed: int, step: int) -> None:
    with pytest.raises(UsageError, match=r"must be"):
        train_rows(10, seed, step, 2)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(0, 40), size=st.integers(1, 12))
def test_evaluation_sees_every_held_out_row_once_and_in_order(count: int, size: int) -> None:
    batches = list(eval_rows(count, size, None))
    assert [row for batch in batches for row in batch] == list(range(count))
    assert all(len(batch) == size for batch in batches[:-1])


def test_evaluation_stops_at_its_limit() -> None:
    assert [len(batch) for batch in eval_rows(10, 4, 2)] == [4, 4]


@pytest.mark.parametrize(("size", "limit"), [(0, None), (4, 0)])
def test_an_evaluation_of_nothing_is_refused_at_once(size: int, limit: int | None) -> None:
    with pytest.raises(UsageError, match="must be >= 1"):
        eval_rows(10, size, limit)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(2, 300), held_out=st.floats(0.01, 0.99))
def test_a_split_leaves_no_row_out_and_puts_none_on_both_sides(count: int, held_out: float) -> None:
    train, held = split_rows(count, held_out)
    assert sorted([*train, *held]) == list(range(count))
    assert len(held) == min(max(round(held_out * count), 1), count - 1)


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_that_leaves_a_side_empty_is_refused(held_out: float) -> None:
    with pytest.raises(UsageError, match="held_out must be a fraction"):
        split_rows(10, held_out)
