"""A worker's connection to the process that decodes, and how all of them are made.

Rank 0 listens on a port of its own and tells the others through the process group where, with a random token that a
connection must show. Addresses are tried in the order in which they are likely: that of GLOO_SOCKET_IFNAME or, without
it, MASTER_ADDR, the machine's name, this machine. Rank 0's own worker has a socket pair.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.distributed as dist

from leantrain.errors import RunError
from leantrain.exchange.packet import PacketError
from leantrain.exchange.stragglers.messages import Inbox, Message, Topic

_TOKEN = 16
_WELCOME = b"leantrain"
_GREETING_S = 10.0
"""Seconds that a connection has to show its token, and rank 0 to take it."""
_ADDRESS_BYTES = 1024
_SIOCGIFADDR = 0x8915


class Link:
    """Sends in the caller's thread and receives in one of its own, so what was decided is known in the middle of work.

    Args:
        connection: to rank 0.
        largest: bytes that no packet may exceed.
        timeout_s: seconds within which rank 0 gives up who is late, so that it answers within twice as many.
    """

    def __init__(self, connection: socket.socket, largest: int, timeout_s: float) -> None:
        self.socket, self.patience = connection, 2 * timeout_s
        connection.setblocking(True)
        self._changed = threading.Condition()
        self._decided: dict[int, Message] = {}
        self._met: tuple[float, ...] | None = None
        self._error: str | None = None
        threading.Thread(target=self._receive, args=(Inbox(connection, largest),), daemon=True).start()

    def send(self, message: Message) -> int:
        """Send a message; the bytes it took. Rank 0 always reads, so this waits for nobody else."""
        pieces = message.pieces()
        try:
            for piece in pieces:
                self.socket.sendall(piece)
        except OSError as error:
            with self._changed:
                self._error = self._error or f"rank 0, which decodes, is gone: {error}"
        return sum(len(piece) for piece in pieces)

    def is_decided(self, step: int) -> bool:
        """Whether the decoded gradient of `step` is here."""
        return step in self._decided

    def take(self, step: int) -> Message:
        """The decoded gradient of `step`, as soon as it is here.

        Raises:
            RunError: it will never be.
        """
        with self._changed:
            self._wait_for(lambda: step in self._decided)
            return self._decided.pop(step)

    def meet(self, step: int, values: tuple[float, ...]) -> tuple[float, ...]:
        """Wait for all workers that are left; every value's maximum over them.

        Raises:
            RunError: this worker was given up, or rank 0 is gone.
        """
        self.send(Message(Topic.MEET, step, values))
        with self._changed:
            self._wait_for(lambda: self._met is not None)
            met, self._met = self._met, None
            assert met is not None
            return met

    def close(self) -> None:
        with suppress(OSError):  # the other side may have been faster
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: condition() or self._error is not None, self.patience)
        if not condition():
            raise RunError(self._error or f"rank 0, which decodes, has not answered for {self.patience:g} s")

    def _receive(self, inbox: Inbox) -> None:
        error = None
        while error is None:
            try:
                packet = inbox.read()
                assert packet is not None  # the socket blocks
                message = Message.from_packet(packet)
            except (OSError, PacketError) as caught:
                message, error = None, f"the connection to rank 0, which decodes, has ended: {caught}"
            with self._changed:
                if message is None or message.topic == Topic.FAILED:
                    error = error or (message.rest.numpy().tobytes().decode(errors="replace") if message else "")
                    self._error = self._error or error
                elif message.topic == Topic.DECIDED:
                    self._decided[message.step] = message
                elif message.topic == Topic.MET:
                    self._met = message.values
                self._changed.notify_all()


def connect_all(group: dist.ProcessGroup, timeout_s: float) -> tuple[socket.socket, dict[int, socket.socket]]:
    """Connect every process of a gloo group with rank 0. All call it.

    Returns:
        The worker's end in this process, and in rank 0 the other ends of all, by rank.

    Raises:
        RunError: somebody did not connect within `timeout_s`.
    """
    rank, size = group.rank(), group.size()
    address = torch.zeros(_ADDRESS_BYTES, dtype=torch.uint8)
    if rank != 0:
        dist.broadcast(address, group=group, group_src=0)
        return _connect(json.loads(bytes(address.tolist()).rstrip(b"\0")), rank, timeout_s), {}
    with _listener() as listener:
        token = secrets.token_bytes(_TOKEN)
        where = {"hosts": _hosts(), "port": listener.getsockname()[1], "token": token.hex()}
        text = json.dumps(where).encode()
        address[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        dist.broadcast(address, group=group, group_src=0)
        mine, its = socket.socketpair()
        return mine, {0: its, **_accept(listener, token, set(range(1, size)), timeout_s)}


def _accept(listener: socket.socket, token: bytes, missing: set[int], timeout_s: float) -> dict[int, socket.socket]:
    deadline, found = time.monotonic() + timeout_s, {}
    while missing:
        listener.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            raise RunError(f"rank {sorted(missing)} did not connect to rank 0 within {timeout_s:g} s") from None
        try:
            connection.settimeout(_GREETING_S)
            shown, rank = _exactly(connection, _TOKEN), int.from_bytes(_exactly(connection, 4), "little")
            if not hmac.compare_digest(shown, token) or rank not in missing:
                raise ConnectionError("a stranger")
            connection.sendall(_WELCOME)
        except OSError:
            connection.close()
            continue
        missing.remove(rank)
        found[rank] = _tuned(connection, timeout_s)
    return found


def _connect(where: dict[str, object], rank: int, timeout_s: float) -> socket.socket:
    hosts, port, token = where["hosts"], where["port"], bytes.fromhex(str(where["token"]))
    assert isinstance(hosts, list) and isinstance(port, int)
    deadline, problems = time.monotonic() + timeout_s, ""
    while time.monotonic() < deadline:
        problems = ""
        for host in hosts:
            try:
                connection = socket.create_connection((host, port), timeout=min(_GREETING_S, timeout_s))
            except OSError as error:
                problems += f"; {host}: {error}"
                continue
            with suppress(OSError):
                connection.sendall(token + rank.to_bytes(4, "little"))
                if _exactly(connection, len(_WELCOME)) == _WELCOME:
                    return _tuned(connection, timeout_s)
            connection.close()
            problems += f"; {host}: somebody else answered"
        time.sleep(0.1)
    raise RunError(f"rank {rank} could not connect to rank 0, which decodes, on port {port}{problems}")


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        if not (piece := connection.recv(size - len(data))):
            raise ConnectionResetError("the connection was closed")
        data += piece
    return data


def _tuned(connection: socket.socket, timeout_s: float) -> socket.socket:
    """Small messages leave at once, and a peer that was cut off is noticed although nothing is sent to it."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_USER_TIMEOUT", int(1000 * timeout_s))):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection


def _listener() -> socket.socket:
    """On the interface that gloo was told to use, else on all."""
    address = _interface_address()
    if address is None and socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError:
            pass  # built with IPv6 and booted without
    return socket.create_server((address or "", 0))


def _hosts() -> list[str]:
    if address := _interface_address():
        return [address]
    named = [os.environ.get("MASTER_ADDR", ""), socket.gethostname(), "127.0.0.1"]
    return list(dict.fromkeys(name for name in named if name))


def _interface_address() -> str | None:
    """The IPv4 address of the interface in GLOO_SOCKET_IFNAME, where there is one."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if not name or sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(found[20:24])
