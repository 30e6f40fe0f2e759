"""Processes find those of their own life in a store that remembers earlier ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from leantrain.meeting import Meeting, meet


def everybody_meets(stores: list[dist.Store], notes: list[str], timeout_s: float = 20) -> list[Meeting]:
    with ThreadPoolExecutor(len(notes)) as pool:
        meetings = [
            pool.submit(meet, store, rank, len(notes), note, timeout_s)
            for rank, (store, note) in enumerate(zip(stores, notes, strict=True))
        ]
        return [each.result() for each in meetings]


@pytest.fixture
def stores() -> list[dist.Store]:
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return [host, *(dist.TCPStore("127.0.0.1", host.port, is_master=False) for _ in range(3))]


def test_all_hear_all_notes_and_share_an_empty_store(stores: list[dist.Store]) -> None:
    meetings = everybody_meets(stores, ["a b", "", "c", "d"])
    assert [each.notes for each in meetings] == [["a b", "", "c", "d"]] * 4
    meetings[0].store.set("key", "value")
    assert [each.store.get("key") for each in meetings] == [b"value"] * 4


def test_what_earlier_lives_left_in_the_store_fools_nobody(stores: list[dist.Store]) -> None:
    before = everybody_meets(stores, ["old"] * 4)
    before[0].store.set("key", "old")
    for life in range(3):
        size = 4 - life
        meetings = everybody_meets(stores[:size], [f"new {life}"] * size)
        assert [each.notes for each in meetings] == [[f"new {life}"] * size] * size
        assert not meetings[0].store.check(["key"])


def test_a_life_that_broke_off_half_way_is_forgotten(stores: list[dist.Store]) -> None:
    """Rank 0 and 2 of the life before came; 1 did not, and gave up."""
    for rank in (0, 2):
        with pytest.raises(dist.DistStoreError):
            meet(stores[rank], rank, 3, "old", timeout_s=0.1)
    meetings = everybody_meets(stores[:3], ["new"] * 3)
    assert [each.notes for each in meetings] == [["new"] * 3] * 3


def test_who_does_not_come_is_named(stores: list[dist.Store]) -> None:
    with pytest.raises(dist.DistStoreError, match="rank 1, 2 did not come"):
        meet(stores[0], 0, 3, "", timeout_s=0.1)
    with pytest.raises(dist.DistStoreError, match="rank 0 did not come"):
        meet(stores[1], 1, 3, "", timeout_s=0.1)


def test_alone() -> None:
    assert meet(dist.HashStore(), 0, 1, "me", timeout_s=1).notes == ["me"]
