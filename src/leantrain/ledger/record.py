"""The small interface through which any room tells the ledger what it did.

Everything here is free while no ledger is active: `phase` returns one shared object that does nothing, `add` and
`event` return at once. That is what keeps a run without a ledger bit-identical to one that never heard of it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

PHASES = ("data", "forward", "backward", "exchange", "update")


class Recorder(Protocol):
    """What an active ledger offers to the rooms."""

    def phase(self, name: str, block: int | None = None) -> AbstractContextManager[object]: ...
    def add(self, name: str, amount: float) -> None: ...


_active: Recorder | None = None
_NOTHING: AbstractContextManager[None] = nullcontext()


def activate(recorder: Recorder | None) -> Recorder | None:
    """Make `recorder` the one that is told (None: nobody). Returns the one it replaces, to be put back later."""
    global _active
    previous, _active = _active, recorder
    return previous


def phase(name: str, block: int | None = None) -> AbstractContextManager[object]:
    """Time what is done here as part of the phase `name` of the current step (one of PHASES).

    Args:
        block: which block of layers, from 1, it is done for; None: no block in particular.
    """
    if _active is None:
        return _NOTHING
    return _active.phase(name) if block is None else _active.phase(name, block)


def add(name: str, amount: float) -> None:
    """Add `amount` to the run's counter `name`, for instance `add("bytes_sent", packet.numel())`."""
    if _active is not None:
        _active.add(name, amount)


def event(name: str) -> None:
    """Count one occurrence of something that is worth knowing, such as a decomposition that fell back."""
    if _active is not None:
        _active.add(f"event/{name}", 1)
