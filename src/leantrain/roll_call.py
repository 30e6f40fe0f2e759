"""Finding out which process is gone when a collective fails.

A failed collective says that a connection broke, not who is dead: a process that waits for a survivor learns nothing
until that survivor hangs up. So each process keeps a thread that answers for it while the main thread is stuck. Whoever
notices the loss first calls the roll, and its verdict reaches all threads before anybody leaves.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

_FOREVER = timedelta(days=365)
_ONE_READ_S = 0.5
"""What is in the store already gets this long to be read, however long something else was waited for."""


class RollCall:
    """This process's part in finding out who is gone. All processes of a group make one, on stores that meet.

    Args:
        store: shared by the processes; nothing else may use its keys.
        rank: this process.
        size: of the group.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank, self._peers = store, rank, range(size)
        self._verdict: str | None = None
        # A connection of its own: a waiting one blocks whoever shares it.
        own = store.clone()  # type: ignore[attr-defined]
        threading.Thread(target=self._answer, args=(own,), daemon=True).start()

    def gone(self, patience_s: float = 5.0) -> str:
        """The ranks that do not answer, such as "1, 3"; empty if all do and only a connection broke.

        Takes `patience_s` if somebody is gone, because that is how long an answer is waited for.
        """
        try:
            self._store.set("roll call", "")
            silent = self._silent("lives", patience_s)
            self._store.set("verdict", ", ".join(map(str, silent)))
            if self._rank == 0:  # it may hold the store, and the others have not read the verdict
                self._silent("knows", patience_s, without=silent)
            return ", ".join(map(str, silent))
        except dist.DistNetworkError:  # rank 0 held the store, unless torchrun does, and has left
            return "0" if self._verdict is None else self._verdict

    def _answer(self, store: Store) -> None:
        try:
            store.wait(["roll call"], _FOREVER)
            store.set(f"{self._rank} lives", "")
            store.wait(["verdict"], _FOREVER)
            self._verdict = store.get("verdict").decode()
            store.set(f"{self._rank} knows", "")
        except RuntimeError:  # the store went away: the run is over
            return

    def _silent(self, word: str, patience_s: float, without: list[int] | None = None) -> list[int]:
        """The processes that have not said `word` after `patience_s`."""
        deadline, silent = time.monotonic() + patience_s, []
        for peer in self._peers:
            if peer in (without or ()):
                continue
            try:
                wait = max(_ONE_READ_S, deadline - time.monotonic())
                self._store.wait([f"{peer} {word}"], timedelta(seconds=wait))
            except dist.DistStoreError:
                silent.append(peer)
        return silent
