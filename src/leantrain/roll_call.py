"""Finding out who is to blame when a collective fails.

A failed collective says that a connection broke or that time is up, not whose fault it is. So each process keeps a
thread that answers for it while the main thread is stuck. Whoever notices first calls the roll; every thread reports

    waits      is this process's main thread in a collective, or has one failed here?
    count      how many collectives it has begun, by process group
    where      the line of Python at which the main thread is
    knocks     how the other processes' lifelines answer from here

and one verdict, the same for all, reaches everybody before anybody leaves:

    gone       no report: the process is dead, frozen as a whole, or cut off from the store
    hung       it reports, others ran out of time, and it neither waits nor has come as far as they have
    cut        pairs of processes one of which cannot reach the other's machine

The main thread never talks to the store itself: on a cut link that may take for ever.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch.distributed.distributed_c10d import Store

from leantrain.lifeline import knock

_FOREVER = timedelta(days=365)
_REPORT_AGAIN_S = 0.1
_LOOK_AGAIN_S = 0.02
_STORE_S = 3.0
"""Longer than patience plus this, a verdict does not take if the store is in reach."""


_background: set[int] = set()


@contextmanager
def in_background() -> Iterator[None]:
    """In the block, that this thread waits for a message says nothing of its process: it always does."""
    _background.add(threading.get_ident())
    try:
        yield
    finally:
        _background.discard(threading.get_ident())


@dataclass(frozen=True)
class Report:
    """What a process says of itself."""

    waits: bool
    timed_out: bool
    count: dict[str, int]
    where: str
    knocks: dict[str, str]


@dataclass(frozen=True)
class Verdict:
    """Who is to blame. All empty: everybody is there and waits, so a connection broke for a moment or is too slow."""

    gone: list[int] = field(default_factory=list)
    hung: dict[str, str] = field(default_factory=dict)
    """{rank: where its main thread is}"""
    cut: list[list[int]] = field(default_factory=list)

    def sentence(self, rank: int, size: int) -> str:
        """What happened, as process `rank` of `size` tells it."""
        cut = ", ".join(f"{one} and {other}" for one, other in self.cut)
        if self.gone:
            unreachable = f" (no connection between ranks {cut})" if cut else ""
            return f"rank {_list(self.gone)} of {size} stopped answering rank {rank}{unreachable}"
        if self.hung:
            where = ", ".join(self.hung.values())
            return f"rank {_list(self.hung)} of {size} hangs ({where}) and stopped answering rank {rank}"
        if cut:
            return f"the connection between ranks {cut} of {size} is cut, which stopped rank {rank}"
        return (
            f"a connection between processes stopped answering rank {rank}, though all {size} processes are there and "
            "none hangs: the network broke for a moment, or is too slow"
        )


class RollCall:
    """This process's part in finding out. All processes of a group make one, on stores that meet.

    Args:
        store: shared by the processes; nothing else may use its keys.
        rank: this process.
        lifelines: every process's `Lifeline.address`, in rank order.
    """

    def __init__(self, store: Store, rank: int, lifelines: Sequence[str]) -> None:
        self._rank, self._lifelines = rank, dict(enumerate(lifelines))
        self._main = threading.current_thread()
        self._failed = self._timed_out = False
        self._verdict: Verdict | None = None
        self._settled = threading.Event()
        # Connections of their own: a waiting one blocks whoever shares it.
        self._store: Store = store.clone()  # type: ignore[attr-defined]
        own = store.clone()  # type: ignore[attr-defined]
        self._answering = threading.Thread(target=self._answer, args=(own,), daemon=True)
        self._answering.start()

    def verdict(self, *, timed_out: bool, patience_s: float = 5.0) -> Verdict:
        """Whose fault it is that a collective failed here; the same in all processes.

        Takes `patience_s` where a process is there and silent, because that is how long its report is waited for.
        """
        self._timed_out, self._failed = timed_out, True
        judging = threading.Thread(target=self._judge, args=(patience_s,), daemon=True)
        judging.start()
        if self._settled.wait(patience_s + _STORE_S):
            for thread in (judging, self._answering):  # Python should not end while they are in the store
                thread.join(_STORE_S)
        else:  # the store is out of reach
            self._settle(self._by_myself())
        assert self._verdict is not None
        return self._verdict

    def close(self) -> None:
        """End this process's part, because all went well. Rank 0, which may hold the store, leaves last: where a
        store goes away while somebody asks it, PyTorch prints a page of warnings."""
        if self._answering.is_alive() and not self._failed:
            with suppress(RuntimeError):  # who held the store has left already
                self._store.set(f"{self._rank} called", "to leave")
                self._answering.join(_STORE_S)
                self._store.set(f"{self._rank} left", "")
                if self._rank == 0:
                    self._wait_for_all(self._store, "left")

    def _answer(self, store: Store) -> None:
        """Report until there is a verdict."""
        try:
            store.wait([f"{self._rank} called"], _FOREVER)
            if store.get(f"{self._rank} called") == b"to leave":
                return
            knocks: dict[str, str] = {str(peer): answer for peer, answer in knock(self._others()).items()}
            while not store.check(["verdict"]):
                store.set(f"{self._rank} reports", json.dumps(asdict(self._report(knocks))))
                time.sleep(_REPORT_AGAIN_S)
            store.set(f"{self._rank} knows", "")
            self._settle(Verdict(**json.loads(store.get("verdict"))))
        except RuntimeError:  # the store went away: the run is over, or whoever held it is to blame
            if self._failed:
                self._settle(self._by_myself())

    def _judge(self, patience_s: float) -> None:
        """Call the roll, wait for reports, and have one verdict."""
        store, deadline = self._store, time.monotonic() + patience_s
        try:
            for peer in self._lifelines:
                store.compare_set(f"{peer} called", "", "to report")
            while not store.check(["verdict"]):
                reports = self._reports(store)
                if time.monotonic() > deadline or self._complete(reports):
                    store.compare_set("verdict", "", json.dumps(asdict(_judge(reports, set(self._lifelines)))))
                time.sleep(_LOOK_AGAIN_S)
            self._settle(Verdict(**json.loads(store.get("verdict"))))
            if self._rank == 0:  # it may hold the store, and the others have not read the verdict
                self._wait_for_all(store, "knows")
        except RuntimeError:  # rank 0 held the store, unless torchrun does, and has left
            self._settled.wait(_REPORT_AGAIN_S)  # the answering thread may have heard a verdict before
            self._settle(self._by_myself())

    def _reports(self, store: Store) -> dict[int, Report]:
        there = set(self._lifelines) - self._silent(store, "reports")
        return {rank: Report(**json.loads(store.get(f"{rank} reports"))) for rank in there}

    def _silent(self, store: Store, word: str) -> set[int]:
        """The processes that have not said `word`."""
        return {rank for rank in self._lifelines if not store.check([f"{rank} {word}"])}

    def _wait_for_all(self, store: Store, word: str) -> None:
        """Until everybody who is still alive has said `word`, but not for ever."""
        deadline = time.monotonic() + _STORE_S
        while time.monotonic() < deadline and self._alive(self._silent(store, word)):
            time.sleep(_LOOK_AGAIN_S)

    def _alive(self, ranks: set[int]) -> bool:
        """Whether waiting for one of these processes makes sense."""
        answers = knock({rank: self._lifelines[rank] for rank in ranks})
        return any(answer == "connected" for answer in answers.values())

    def _complete(self, reports: Mapping[int, Report]) -> bool:
        """Whether waiting longer would teach nothing: whoever is silent is dead, or else all are there and wait."""
        silent = set(self._lifelines) - set(reports)
        return not self._alive(silent) if silent else all(each.waits for each in reports.values())

    def _by_myself(self) -> Verdict:
        """What can be said without the store."""
        knocks = knock(self._others())
        if knocks.get(0) == "connected":  # its machine answers, and the store that it holds does not: it is frozen
            return Verdict(gone=[0])
        refused = [peer for peer, answer in knocks.items() if answer == "refused"]
        cut = [sorted((self._rank, peer)) for peer, answer in knocks.items() if answer == "unreachable"]
        return Verdict(gone=refused or ([] if cut else [0]), cut=cut)

    def _settle(self, verdict: Verdict) -> None:
        if not self._settled.is_set():
            self._verdict = verdict
            self._settled.set()

    def _others(self) -> dict[int, str]:
        return {rank: address for rank, address in self._lifelines.items() if rank != self._rank}

    def _report(self, knocks: dict[str, str]) -> Report:
        frames = sys._current_frames()
        main = frames.get(self._main.ident or 0)
        count, under_way = _collectives()
        waiting = any(_in_collective(frame) for thread, frame in frames.items() if thread not in _background)
        waits = self._failed or under_way or waiting
        return Report(waits, self._timed_out, count, "at an unknown place" if main is None else _place(main), knocks)


def _judge(reports: Mapping[int, Report], everybody: set[int]) -> Verdict:
    gone = sorted(everybody - set(reports))
    busy = {rank: each for rank, each in reports.items() if not each.waits}
    hung: dict[int, Report] = {}
    if any(each.timed_out for each in reports.values()):
        most: dict[str, int] = {}
        for each in reports.values():
            most = {group: max(count, most.get(group, 0)) for group, count in {**most, **each.count}.items()}
        behind = {r: each for r, each in busy.items() if any(each.count[group] < most[group] for group in each.count)}
        hung = behind or busy
    unreachable = {
        (min(rank, int(peer)), max(rank, int(peer)))
        for rank, each in reports.items()
        for peer, answer in each.knocks.items()
        if answer == "unreachable"
    }
    return Verdict(
        gone, {str(rank): each.where for rank, each in hung.items()}, [list(pair) for pair in sorted(unreachable)]
    )


def _collectives() -> tuple[dict[str, int], bool]:
    """How many collectives were begun in each process group, and whether any of them has not ended.

    PyTorch's flight recorder knows, and is always on; where it says nothing nobody is accused.
    """
    try:
        from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]

        groups: dict[str, dict[str, Any]] = json.loads(_dump_fr_trace_json(False, False)).get("pg_status", {})
    except (ImportError, ValueError):
        return {}, False
    begun = {group: int(status["last_enqueued_collective"]) for group, status in groups.items()}
    return begun, any(begun[group] > int(status["last_completed_collective"]) for group, status in groups.items())


def _in_collective(frame: FrameType | None) -> bool:
    """Whether a thread is inside torch.distributed, as one that waits for a message is."""
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.distributed_c10d":
            return True
        frame = frame.f_back
    return False


def _place(frame: FrameType) -> str:
    """The innermost line that is neither Python's library nor PyTorch, such as "in forward, model.py line 12"."""
    library, innermost = (torch.__path__[0], sys.prefix, sys.base_prefix), frame
    at: FrameType | None = frame
    while at is not None and at.f_code.co_filename.startswith(("<", *library)):
        at = at.f_back
    at = at or innermost
    name = at.f_code.co_filename.replace("\\", "/").rpartition("/")[2]
    return f"in {at.f_code.co_name}, {name} line {at.f_lineno}"


def _list(ranks: Sequence[int] | Mapping[str, str]) -> str:
    return ", ".join(map(str, ranks))
