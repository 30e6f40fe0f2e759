"""The rooms' small interface, with and without somebody listening."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest

from leantrain.ledger import record


class Listener:
    def __init__(self) -> None:
        self.heard: list[tuple[str, object]] = []

    def phase(self, name: str) -> AbstractContextManager[object]:
        self.heard.append(("phase", name))
        return nullcontext()

    def add(self, name: str, amount: float) -> None:
        self.heard.append((name, amount))


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    previous = record.activate(listener)
    yield listener
    record.activate(previous)


def tell_everything() -> None:
    with record.phase("forward"):
        record.add("bytes_sent", 3)
        record.event("fell_back")


def test_a_listener_hears_everything(listener: Listener) -> None:
    tell_everything()
    assert listener.heard == [("phase", "forward"), ("bytes_sent", 3), ("event/fell_back", 1)]


def test_nobody_listening_is_no_error_and_allocates_no_context() -> None:
    tell_everything()
    assert record.phase("forward") is record.phase("update")


def test_activate_gives_back_whom_it_replaced(listener: Listener) -> None:
    other = Listener()
    assert record.activate(other) is listener
    assert record.activate(listener) is other
