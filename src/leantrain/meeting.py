"""How processes that share a store find one another, and nobody who was there before.

torchrun keeps one store for all the lives of its workers, and what the dead have written is still in it. So rank 0
draws a name for this life, and everybody checks that it was drawn in answer to them:

    rank i    greets   with a number that only this process can know
    rank 0    repeats  all greetings it finds, with the name of this life, as often as they change
    rank i    agrees   under that name, once it hears its own greeting
    rank 0    is done  when all have agreed

A greeting is repeated only after it was made, so nobody takes an old life's name for this one's.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

_LOOK_AGAIN_S = 0.02


@dataclass(frozen=True)
class Meeting:
    """What the processes of one life share."""

    store: Store
    """Empty at first, and nobody else's."""
    notes: list[str]
    """What each process had to tell, in rank order."""


def meet(store: Store, rank: int, size: int, note: str, timeout_s: float) -> Meeting:
    """Meet the others of this life. All of them must call it.

    Args:
        store: reached by all; may hold what earlier lives left.
        note: something that the others shall know of this process.

    Raises:
        torch.distributed.DistStoreError: somebody did not come within `timeout_s`; the message says who.
    """
    deadline = time.monotonic() + timeout_s
    own = f"{secrets.token_hex(8)} {note}"
    store.set(f"greeting/{rank}", own)
    if rank == 0:
        life, greetings = _gather(store, size, deadline)
    else:
        life, greetings = _hear(store, rank, own, deadline)
    return Meeting(PrefixStore(life, store), [each.partition(" ")[2] for each in greetings])


def _gather(store: Store, size: int, deadline: float) -> tuple[str, list[str]]:
    """Rank 0's part."""
    life, repeated = secrets.token_hex(8), None
    while True:
        greetings = [_read(store, f"greeting/{each}") for each in range(size)]
        if greetings != repeated:
            store.set("life", json.dumps([life, greetings]))
            repeated = greetings
        if store.check(_agreements(life, size)):
            return life, [each or "" for each in greetings]
        if time.monotonic() > deadline:
            late = [each for each, key in enumerate(_agreements(life, size), start=1) if not store.check([key])]
            raise dist.DistStoreError(f"rank {', '.join(map(str, late))} did not come in time")
        time.sleep(_LOOK_AGAIN_S)


def _hear(store: Store, rank: int, own: str, deadline: float) -> tuple[str, list[str]]:
    """Everybody else's part."""
    agreed = None
    while True:
        life, greetings = json.loads(_read(store, "life") or "[null, []]")
        if rank < len(greetings) and greetings[rank] == own:
            if agreed != life:
                store.set(f"{life}/agrees/{rank}", "")
                agreed = life
            if store.check(_agreements(life, len(greetings))):  # rank 0 has repeated the last greeting by now
                return json.loads(store.get("life"))
        if time.monotonic() > deadline:
            raise dist.DistStoreError("rank 0 did not come in time" if agreed is None else "not all came in time")
        time.sleep(_LOOK_AGAIN_S)


def _agreements(life: str, size: int) -> list[str]:
    return [f"{life}/agrees/{rank}" for rank in range(1, size)]


def _read(store: Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None
