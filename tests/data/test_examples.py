"""Rows of a table as batches: complete epochs, rows that keep their id, and nothing that is not a number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from leantrain.data import Data
from leantrain.data.examples import Examples, Table
from leantrain.errors import RunError, UsageError


def a_table(count: int = 20) -> Table:
    """Row number i holds i, and its class is i modulo 3; every fifth row is held out."""
    rows = np.arange(count)
    inputs = np.stack([rows, -rows], axis=1).astype(np.float32)
    return Table(inputs, rows % 3, rows[rows % 5 > 0], rows[rows % 5 == 0])


def examples(table: Table) -> Examples:
    return Examples(table, "classification", {"features": 2, "classes": 3}, "a table")


def test_inputs_targets_and_ids_are_of_the_same_row() -> None:
    batch = examples(a_table()).train_batch(0, 0, 16)
    torch.testing.assert_close(batch.inputs[:, 0], batch.ids.float())
    torch.testing.assert_close(batch.targets, batch.ids % 3)


def test_one_epoch_is_every_training_row_once_and_no_other() -> None:
    data = examples(a_table())
    ids = torch.cat([data.train_batch(5, step, 4).ids for step in range(4)])
    assert sorted(ids.tolist()) == [row for row in range(20) if row % 5]


def test_evaluation_is_every_held_out_row_in_order() -> None:
    assert [batch.ids.tolist() for batch in examples(a_table()).eval_batches(3)] == [[0, 5, 10], [15]]


def test_a_limited_evaluation_is_spread_over_all_held_out_rows() -> None:
    data = examples(a_table(100))
    assert [batch.ids.tolist() for batch in data.eval_batches(2, limit=2)] == [[0, 25], [50, 75]]
    assert sum(len(batch) for batch in data.eval_batches(8, limit=3)) == 20, "there are no more"


def test_changing_a_batch_does_not_change_the_table() -> None:
    data = examples(a_table())
    before = data.train_batch(0, 0, 16).inputs.clone()
    data.train_batch(0, 0, 16).inputs.zero_()
    torch.testing.assert_close(data.train_batch(0, 0, 16).inputs, before)


def test_shards_of_any_world_size_are_the_global_batch() -> None:
    data = examples(a_table())
    batch = data.train_batch(1, 3, 12)
    for world in (1, 2, 3, 4, 6, 12):
        shards = [data.train_batch(1, 3, 12).shard(rank, world) for rank in range(world)]
        torch.testing.assert_close(torch.cat([shard.inputs for shard in shards]), batch.inputs)
        torch.testing.assert_close(torch.cat([shard.ids for shard in shards]), batch.ids)


def test_examples_are_data() -> None:
    assert isinstance(examples(a_table()), Data)


def test_a_batch_larger_than_the_training_part_is_refused() -> None:
    with pytest.raises(UsageError, match="between 1 and the 16 training examples, got 17"):
        examples(a_table()).train_batch(0, 0, 17)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_input_that_is_not_finite_is_refused_by_row(value: float) -> None:
    table = a_table()
    table.inputs[7, 1] = value
    with pytest.raises(RunError, match="example 7 of a table holds a number that is not finite"):
        examples(table)


@pytest.mark.parametrize("label", [3, -1])
def test_a_class_out_of_range_is_refused_by_row(label: int) -> None:
    table = a_table()
    table.targets[4] = label
    with pytest.raises(RunError, match=f"example 4 of a table has class {label}, but classes are 0 to 2"):
        examples(table)


def test_a_target_that_is_not_finite_is_refused_by_row() -> None:
    table = a_table()
    targets = np.zeros((20, 1), np.float32)
    targets[9] = np.nan
    with pytest.raises(RunError, match="target of example 9 of a table is not finite"):
        Examples(Table(table.inputs, targets, table.train, table.held_out), "regression", {"outputs": 1}, "a table")


@pytest.mark.parametrize("side", ["training", "held-out"])
def test_an_empty_side_is_refused(side: str) -> None:
    table, none = a_table(), np.empty(0, np.int64)
    rows = (none, table.held_out) if side == "training" else (table.train, none)
    with pytest.raises(UsageError, match=f"the {side} part of a table has no examples"):
        examples(Table(table.inputs, table.targets, *rows))


def test_the_test_part_is_held_out_unless_a_fraction_is_asked_for() -> None:
    train, test = (np.zeros((10, 2)), np.zeros(10)), (np.ones((4, 2)), np.ones(4))
    table = Table.of_parts(*train, test, held_out=None)
    assert (len(table.train), table.targets[table.held_out].tolist()) == (10, [1, 1, 1, 1])
    table = Table.of_parts(*train, test, held_out=0.3)
    assert (len(table.train), len(table.held_out), table.targets.sum()) == (7, 3, 0)
    table = Table.of_parts(*train, None, held_out=None)
    assert (len(table.train), len(table.held_out)) == (9, 1)
