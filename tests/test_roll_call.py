"""Whoever is gone is named, by everybody, also by those who notice late."""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist

from leantrain.roll_call import RollCall


def meet(size: int) -> list[dist.Store]:
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return [host, *(dist.TCPStore("127.0.0.1", host.port, is_master=False) for _ in range(1, size))]


def test_the_silent_are_named_and_the_busy_are_not() -> None:
    """Process 1 has no roll call: it is dead. Process 2's main thread does nothing, as if stuck in a collective."""
    stores = meet(3)
    first, _stuck = RollCall(stores[0], 0, 3), RollCall(stores[2], 2, 3)
    assert first.gone(patience_s=1.0) == "1"


def test_who_notices_late_hears_the_verdict_even_if_the_store_has_left() -> None:
    stores = meet(3)
    first, late = RollCall(stores[0], 0, 3), RollCall(stores[2], 2, 3)
    assert first.gone(patience_s=1.0) == "1"
    assert late._verdict == "1"  # rank 0 did not leave before it was heard

    class Gone:
        def set(self, key: str, value: str) -> None:
            raise dist.DistNetworkError("Connection reset by peer")

    late._store = Gone()  # type: ignore[assignment]
    assert late.gone(patience_s=1.0) == "1"


def test_when_all_answer_nobody_is_accused_and_nobody_waits() -> None:
    stores = meet(2)
    calls = [RollCall(store, rank, 2) for rank, store in enumerate(stores)]
    started = time.monotonic()
    assert calls[0].gone(patience_s=20.0) == ""
    assert time.monotonic() - started < 10


def test_the_process_that_held_the_store_is_named_when_it_is_gone_without_a_word() -> None:
    class Dead:
        def clone(self) -> Dead:
            return self

        def wait(self, keys: list[str], timeout: timedelta) -> None:
            raise dist.DistNetworkError("Connection refused")

        def set(self, key: str, value: str) -> None:
            raise dist.DistNetworkError("Connection refused")

    assert RollCall(Dead(), 1, 2).gone(patience_s=0.1) == "0"  # type: ignore[arg-type]
