"""A port tells whether its process lives, whatever the process does."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest

from leantrain.lifeline import Lifeline, address_towards, knock


def process_with_a_lifeline() -> tuple[int, str]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        lifeline = Lifeline("127.0.0.1")
        os.write(writing, lifeline.address.encode())
        time.sleep(60)
        os._exit(0)
    return child, os.read(reading, 100).decode()


def test_a_frozen_process_is_connected_and_a_dead_one_refused() -> None:
    child, address = process_with_a_lifeline()
    assert knock({7: address}) == {7: "connected"}
    os.kill(child, signal.SIGSTOP)
    assert knock({7: address}) == {7: "connected"}
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert knock({7: address}) == {7: "refused"}


def unreachable() -> tuple[list[socket.socket], str]:
    """An address from which no answer comes: the kernel's queue is full, so it drops what asks to be let in."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    port = listener.getsockname()[1]
    crowd = [socket.socket() for _ in range(8)]
    for each in crowd:
        each.setblocking(False)
        each.connect_ex(("127.0.0.1", port))
    return [listener, *crowd], f"127.0.0.1 {port}"


def test_who_does_not_answer_costs_the_patience_once_and_hides_nobody() -> None:
    lifeline = Lifeline("127.0.0.1")
    _open, nowhere = unreachable()
    started = time.monotonic()
    found = knock({0: nowhere, 1: lifeline.address, 2: nowhere}, patience_s=0.3)
    assert found == {0: "unreachable", 1: "connected", 2: "unreachable"}
    assert time.monotonic() - started < 5
    lifeline.close()


def test_nobody_to_knock_at() -> None:
    assert knock({}) == {}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_way_to_this_machine_is_loopback(host: str) -> None:
    assert address_towards(host, 29500) in ("127.0.0.1", "::1")
