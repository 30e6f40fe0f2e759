"""Whoever is to blame is named, by everybody, also by those who notice late."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from leantrain.lifeline import Lifeline
from leantrain.roll_call import Report, RollCall, Verdict, _judge, _place
from tests.test_lifeline import unreachable


def meet(size: int) -> tuple[list[dist.Store], list[Lifeline]]:
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [host, *(dist.TCPStore("127.0.0.1", host.port, is_master=False) for _ in range(1, size))]
    return stores, [Lifeline("127.0.0.1") for _ in range(size)]


def calls(stores: list[dist.Store], lifelines: list[Lifeline], without: int | None = None) -> dict[int, RollCall]:
    addresses = [each.address for each in lifelines]
    return {rank: RollCall(store, rank, addresses) for rank, store in enumerate(stores) if rank != without}


def test_the_dead_are_named_at_once_and_the_busy_are_not() -> None:
    """Process 1 is dead. Process 2 is busy: it has not noticed, and nobody ran out of time."""
    stores, lifelines = meet(3)
    lifelines[1].close()
    started = time.monotonic()
    assert calls(stores, lifelines, without=1)[0].verdict(timed_out=False, patience_s=60.0) == Verdict(gone=[1])
    assert time.monotonic() - started < 20


def test_the_frozen_are_named_after_a_while() -> None:
    """Process 1 lives, but answers nothing."""
    stores, lifelines = meet(3)
    assert calls(stores, lifelines, without=1)[2].verdict(timed_out=True, patience_s=1.0).gone == [1]


def test_who_notices_late_hears_the_verdict_even_if_the_store_has_left() -> None:
    stores, lifelines = meet(3)
    lifelines[1].close()
    call = calls(stores, lifelines, without=1)
    assert call[0].verdict(timed_out=False, patience_s=30.0).gone == [1]
    assert call[2]._settled.is_set()  # rank 0 did not leave before it was heard
    lifelines[0].close()  # and now it has left

    class Gone:
        def compare_set(self, key: str, expected: str, value: str) -> None:
            raise dist.DistNetworkError("Connection reset by peer")

    call[2]._store = Gone()
    assert call[2].verdict(timed_out=False, patience_s=1.0).gone == [1]


def test_without_the_store_who_holds_it_is_blamed_before_those_who_have_left() -> None:
    """Process 0 is frozen: its machine answers, its store does not. Process 1 has noticed and is gone already."""
    stores, lifelines = meet(3)
    call = calls(stores, lifelines)
    lifelines[1].close()
    assert call[2]._by_myself() == Verdict(gone=[0])
    lifelines[0].close()
    assert call[2]._by_myself() == Verdict(gone=[0, 1])
    for each in call.values():
        each.close()


def test_rank_0_leaves_last_where_all_went_well() -> None:
    stores, lifelines = meet(2)
    call = calls(stores, lifelines)
    left: list[int] = []
    first = threading.Thread(target=lambda: (call[0].close(), left.append(0)))
    first.start()
    time.sleep(0.3)
    call[1].close()
    left.append(1)
    first.join()
    assert left == [1, 0]
    for each in lifelines:
        each.close()


def test_when_all_wait_nobody_is_accused_and_nobody_waits_longer() -> None:
    stores, lifelines = meet(2)
    call = calls(stores, lifelines)
    verdicts: list[Verdict] = []
    started = time.monotonic()
    late = threading.Thread(target=lambda: verdicts.append(call[1].verdict(timed_out=True, patience_s=60.0)))
    late.start()
    verdicts.append(call[0].verdict(timed_out=True, patience_s=60.0))
    late.join()
    assert verdicts == [Verdict()] * 2
    assert time.monotonic() - started < 20


def test_a_main_thread_that_does_not_wait_hangs_when_time_is_up() -> None:
    """This thread is the main thread of both; process 1 has not failed, so it must be computing."""
    stores, lifelines = meet(2)
    found = calls(stores, lifelines)[0].verdict(timed_out=True, patience_s=0.5)
    assert found.gone == [] and list(found.hung) == ["1"]
    assert found.hung["1"].startswith("in verdict, roll_call.py line ")


@pytest.mark.parametrize("holder", ["dead", "frozen", "unreachable"])
def test_the_process_that_held_the_store_is_to_blame_when_it_is_gone_without_a_word(holder: str) -> None:
    class Dead:
        def clone(self) -> Dead:
            return self

        def wait(self, keys: list[str], timeout: timedelta) -> None:
            raise dist.DistNetworkError("Connection refused")

        def compare_set(self, key: str, expected: str, value: str) -> None:
            raise dist.DistNetworkError("Connection refused")

    lifeline = Lifeline("127.0.0.1")
    if holder == "dead":
        lifeline.close()
    _open, nowhere = unreachable()
    first = nowhere if holder == "unreachable" else lifeline.address
    found = RollCall(Dead(), 1, [first, nowhere]).verdict(timed_out=True, patience_s=0.1)  # type: ignore[arg-type]
    assert found == (Verdict(cut=[[0, 1]]) if holder == "unreachable" else Verdict(gone=[0]))


def test_who_leaves_in_peace_leaves_no_thread_behind() -> None:
    stores, lifelines = meet(2)
    call = calls(stores, lifelines)
    for each in call.values():
        each.close()
        assert not each._answering.is_alive()


def report(waits: bool, *count: int, timed_out: bool = True, **knocks: str) -> Report:
    return Report(waits, timed_out, dict(zip("ab", count, strict=False)), "here", {k[1:]: v for k, v in knocks.items()})


def test_who_is_behind_is_blamed_and_not_who_is_on_the_way_out() -> None:
    """Processes 0 and 1 do not wait just now: 1 because it never came, 0 because its collective has just failed."""
    reports = {0: report(False, 5, 9), 1: report(False, 5, 8), 2: report(True, 5, 9)}
    assert _judge(reports, {0, 1, 2}) == Verdict(hung={"1": "here"})


def test_who_waits_in_an_earlier_collective_than_others_does_not_hang() -> None:
    reports = {0: report(True, 6), 1: report(True, 5), 2: report(True, 6)}
    assert _judge(reports, {0, 1, 2}) == Verdict()


def test_nobody_hangs_where_nobody_ran_out_of_time() -> None:
    reports = {0: report(True, 6, timed_out=False), 1: report(False, 5, timed_out=False)}
    assert _judge(reports, {0, 1}) == Verdict()


def test_a_cut_link_is_named_once_for_both_ends() -> None:
    reports = {
        0: report(True, 5, _1="connected", _2="unreachable"),
        1: report(True, 5),
        2: report(True, 5, _0="unreachable"),
    }
    assert _judge(reports, {0, 1, 2}) == Verdict(cut=[[0, 2]])


def test_what_is_said() -> None:
    assert Verdict(gone=[1, 3]).sentence(0, 4) == "rank 1, 3 of 4 stopped answering rank 0"
    assert "(no connection between ranks 0 and 1)" in Verdict(gone=[1], cut=[[0, 1]]).sentence(0, 2)
    assert Verdict(hung={"2": "in f, m.py line 3"}).sentence(1, 4).startswith("rank 2 of 4 hangs (in f, m.py line 3)")
    assert (
        Verdict(cut=[[0, 2]]).sentence(1, 3) == "the connection between ranks 0 and 2 of 3 is cut, which stopped rank 1"
    )
    assert "none hangs" in Verdict().sentence(0, 2)


def test_the_place_is_the_users_code_and_not_pythons_library() -> None:
    found: list[str] = []

    class Noticing(list):  # type: ignore[type-arg]
        def __len__(self) -> int:
            import sys

            found.append(_place(sys._getframe()))
            return 0

    import statistics

    with pytest.raises(statistics.StatisticsError):
        statistics.median(Noticing())
    assert found[0].startswith("in __len__, test_roll_call.py line ")
