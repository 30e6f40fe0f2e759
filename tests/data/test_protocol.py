"""Batches can be cut, moved and counted without changing what they hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leantrain.data import Batch
from leantrain.errors import UsageError


def a_batch(size: int) -> Batch:
    return Batch(torch.randn(size, 3), torch.arange(size) % 2, torch.arange(size) + 100)


def joined(parts: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "targets", "ids")))


def assert_same(left: Batch, right: Batch) -> None:
    torch.testing.assert_close(left.inputs, right.inputs, rtol=0, atol=0)
    torch.testing.assert_close(left.targets, right.targets, rtol=0, atol=0)
    torch.testing.assert_close(left.ids, right.ids, rtol=0, atol=0)


@settings(deadline=None, max_examples=40)
@given(world=st.integers(1, 8), each=st.integers(1, 8))
def test_shards_laid_end_to_end_are_the_global_batch(world: int, each: int) -> None:
    batch = a_batch(world * each)
    shards = [batch.shard(rank, world) for rank in range(world)]
    assert [len(shard) for shard in shards] == [each] * world
    assert_same(joined(shards), batch)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 8), each=st.integers(1, 8))
def test_micro_batches_laid_end_to_end_are_the_batch(n: int, each: int) -> None:
    batch = a_batch(n * each)
    parts = batch.split(n)
    assert len(parts) == n
    assert_same(joined(list(parts)), batch)


def test_a_world_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(UsageError, match=r"batch of 10 examples .* world=4 workers"):
        a_batch(10).shard(0, 4)


@pytest.mark.parametrize(("rank", "world"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused(rank: int, world: int) -> None:
    with pytest.raises(UsageError, match=rf"rank={rank}, world={world}"):
        a_batch(4).shard(rank, world)


@pytest.mark.parametrize("n", [0, -1, 3])
def test_a_number_of_micro_batches_that_does_not_fit_is_refused(n: int) -> None:
    with pytest.raises(UsageError, match=f"n={n} micro-batches"):
        a_batch(4).split(n)


def test_only_integer_matrices_count_as_tokens() -> None:
    ids = torch.arange(4)
    assert Batch(torch.zeros(4, 7, dtype=torch.int64), torch.zeros(4, 7), ids).tokens == 28
    assert Batch(torch.zeros(4, 7), torch.zeros(4), ids).tokens == 0
    assert Batch(torch.zeros(4, dtype=torch.int64), torch.zeros(4), ids).tokens == 0


def test_a_batch_whose_parts_differ_in_length_is_refused() -> None:
    with pytest.raises(UsageError, match="got 3, 2 and 3"):
        Batch(torch.zeros(3, 1), torch.zeros(2), torch.arange(3))


def test_moving_a_batch_moves_all_three_tensors() -> None:
    moved = a_batch(2).to("meta")
    assert {moved.inputs.device.type, moved.targets.device.type, moved.ids.device.type} == {"meta"}
