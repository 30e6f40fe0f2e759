"""Telling a dead process from a busy one and from a cut link, without its help.

Each process listens on a port and never accepts. Its kernel answers for it, whatever the process does, until it ends:

    connected      the process is there; it may be busy, hung or frozen
    refused        its machine answers and the process is gone
    unreachable    no answer at all: the link is cut, or the machine is down
"""

from __future__ import annotations

import errno
import selectors
import socket
import time
from collections.abc import Mapping
from typing import Literal

Answer = Literal["connected", "refused", "unreachable"]

_WAITING = 4096
"""Connections that the kernel keeps though nobody accepts them; one is used up by every knock."""


class Lifeline:
    """This process's port, open as long as the process lives.

    Args:
        host: an address of this machine that the other processes can reach.
    """

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=_WAITING)
        self.address = f"{host} {self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._listener.close()


def knock(addresses: Mapping[int, str], patience_s: float = 1.0) -> dict[int, Answer]:
    """How every lifeline answers, by the keys of `addresses`; those that do not in `patience_s` are unreachable."""
    answers: dict[int, Answer] = {}
    deadline = time.monotonic() + patience_s
    with selectors.DefaultSelector() as selector:
        for key, address in addresses.items():
            host, _, port = address.rpartition(" ")
            door = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            door.setblocking(False)
            problem = door.connect_ex((host, int(port)))
            if problem == errno.EINPROGRESS:
                selector.register(door, selectors.EVENT_WRITE, key)
            else:
                answers[key] = _answer(problem)
                door.close()
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for ready, _ in selector.select(left):
                door = ready.fileobj  # type: ignore[assignment]
                answers[ready.data] = _answer(door.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
                selector.unregister(door)
                door.close()
        for late in list(selector.get_map().values()):
            answers[late.data] = "unreachable"
            late.fileobj.close()  # type: ignore[union-attr]
    return answers


def address_towards(host: str, port: int) -> str:
    """The address of this machine from which it would talk to `host`. Nothing is sent."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _answer(problem: int) -> Answer:
    if problem == 0:
        return "connected"
    return "refused" if problem in (errno.ECONNREFUSED, errno.ECONNRESET) else "unreachable"
