"""The thread of rank 0 that decodes: it takes the first answers that suffice, and never waits for a particular one.

    workers ──ANSWER──► has every chunk been answered for? ──► decode ──DECIDED──► all workers, each when it can

- One thread serves all sockets and blocks on none, so a slow peer delays nobody: what it has not read waits for it.
- Everybody gets every decoded gradient, in the order of the steps, so late workers take the same steps, later.
- A worker that is more than `max_behind` steps behind is waited for. So there are never more gradients to be kept.
- A worker whose connection ends, whose packets are damaged, or that does not answer for `timeout_s` while others wait
  is given up. When those that are left cannot decode any more, all of them are told so.

Source: Tandon, Lei, Dimakis and Karampatziakis 2017 (Gradient Coding, ICML), for the master that waits for the first
n - s answers.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from leantrain.errors import RunError
from leantrain.exchange.packet import PacketError
from leantrain.exchange.stragglers.gradient_codes import Decoder
from leantrain.exchange.stragglers.messages import Inbox, Message, Topic

_UNREAD_S = 10.0
"""Seconds after which, at the end, a peer that reads nothing is no longer waited for. Also busy ones read at once."""


class Coordinator(threading.Thread):
    """Serves the workers until rank 0's own worker closes its socket.

    Args:
        decoder: of the code by which the workers share out their work.
        sockets: one for every worker, by rank, rank 0's own among them.
        largest: bytes that no packet may exceed.
        shape: how many numbers, and bytes of rest, an answer has.
        max_behind: steps.
        timeout_s: seconds that others wait for a worker.
    """

    def __init__(
        self, decoder: Decoder, sockets: Mapping[int, socket.socket], largest: int, shape: tuple[int, int],
        max_behind: int, timeout_s: float,
    ) -> None:  # fmt: skip
        super().__init__(daemon=True, name="gradient coding")
        self.decoder, self.shape, self.max_behind, self.timeout_s = decoder, shape, max_behind, timeout_s
        self.step = 0
        self.peers = {rank: _Peer(rank, sockets[rank], largest) for rank in sorted(sockets)}
        self.gone: dict[int, str] = {}
        self.answers: dict[int, Message] = {}
        self.held = 0
        """Steps that had all they needed and waited for a worker that was too far behind."""
        self._holding = self._closing = False
        self._waiting_since: float | None = None
        self._selector = selectors.DefaultSelector()
        for peer in self.peers.values():
            peer.socket.setblocking(False)
            self._selector.register(peer.socket, selectors.EVENT_READ, peer)

    def run(self) -> None:
        try:
            while not self._closing:
                self._serve()
                self._decide_step()
                self._end_meeting()
                self._give_up_silent()
        except Exception as error:
            reason = str(error) if isinstance(error, RunError) else f"decoding failed: {error!r}"
            text = torch.frombuffer(bytearray(reason.encode()), dtype=torch.uint8)
            self._tell_all(Message(Topic.FAILED, self.step, rest=text))
        self._end()

    def _serve(self) -> None:
        """Read and write what can be, and wait if nothing can."""
        left = None
        if self._waiting_since is not None:
            left = max(0.0, self._waiting_since + self.timeout_s - time.monotonic())
        for key, events in self._selector.select(left):
            peer: _Peer = key.data
            try:
                if events & selectors.EVENT_WRITE:
                    self._flush(peer)
                while events & selectors.EVENT_READ and (packet := peer.inbox.read()) is not None:
                    self._receive(peer, packet)
            except (OSError, PacketError) as error:
                self._give_up(peer, str(error))

    def _receive(self, peer: _Peer, packet: Tensor) -> None:
        message = Message.from_packet(packet)
        if message.topic == Topic.MEET:
            peer.met = message.values
        elif message.topic in (Topic.ANSWER, Topic.PASS):
            peer.finished, peer.values = message.step, message.values
            if message.topic == Topic.ANSWER and message.step == self.step:
                if message.numbers is None or (message.numbers.numel(), message.rest.numel()) != self.shape:
                    raise PacketError(f"rank {peer.rank} answered for another model than rank 0's")
                self.answers[peer.rank] = message
        else:
            raise PacketError(f"rank {peer.rank} sent {message.topic.name}, which only rank 0 does")
        if self._waiting_since is None and (self.answers or peer.met is not None):
            self._waiting_since = time.monotonic()

    def _decide_step(self) -> None:
        """Decode as soon as the answers suffice and nobody is too far behind."""
        if not self.answers:
            return
        weights = self.decoder.weights(self.answers)
        if weights is None:
            if self.decoder.weights(self.answers.keys() | self.peers.keys()) is None:
                reasons = ", ".join(f"rank {rank} ({reason})" for rank, reason in sorted(self.gone.items()))
                raise RunError(f"too many processes are gone to decode step {self.step}: {reasons}")
            return
        behind = max(self.step - peer.finished for peer in self.peers.values())
        if behind > self.max_behind:
            self._holding = True
            return
        self.held += self._holding
        control = (len(self.answers), behind, self.held, *self._who_is_gone(), *self._highest("values"))
        numbers, used = self._decoded(weights)
        self._tell_all(Message(Topic.DECIDED, self.step, control, numbers, used))
        self.step += 1
        self.answers.clear()
        self._holding, self._waiting_since = False, None

    def _decoded(self, weights: Mapping[int, float]) -> tuple[Tensor, Tensor]:
        """The weighted sum of the answers in rank order, and which parameters any of them used."""
        total, used = torch.empty(0), torch.empty(0)
        for place, (rank, weight) in enumerate(weights.items()):
            answer = self.answers[rank]
            assert answer.numbers is not None
            if place == 0:
                total, used = answer.numbers if weight == 1 else answer.numbers.mul_(weight), answer.rest
            else:
                total.add_(answer.numbers, alpha=weight)
                used = used | answer.rest
        return total, used

    def _end_meeting(self) -> None:
        """Let all go on once all are there."""
        if self.peers and all(peer.met is not None for peer in self.peers.values()):
            met = Message(Topic.MET, self.step, self._highest("met"))
            for peer in self.peers.values():
                peer.met = None
            self._tell_all(met)
            self._waiting_since = None

    def _give_up_silent(self) -> None:
        """Give up those that others have waited for too long; without them all goes on, or ends, at once."""
        if self._waiting_since is None or time.monotonic() < self._waiting_since + self.timeout_s:
            return
        if any(peer.met is not None for peer in self.peers.values()):
            late = [peer for peer in self.peers.values() if peer.met is None]
        elif self._holding:
            late = [peer for peer in self.peers.values() if self.step - peer.finished > self.max_behind]
        else:
            late = [peer for rank, peer in self.peers.items() if rank not in self.answers]
        for peer in late:
            if peer.rank == 0:
                raise RunError(f"rank 0, which decodes, did not finish its own work within {self.timeout_s:g} s")
            self._give_up(peer, f"it did not answer for {self.timeout_s:g} s")

    def _give_up(self, peer: _Peer, reason: str) -> None:
        self._selector.unregister(peer.socket)
        peer.socket.close()
        del self.peers[peer.rank]
        self.gone[peer.rank] = reason
        self._closing = self._closing or peer.rank == 0

    def _tell_all(self, message: Message) -> None:
        """Queue a message for everybody and send what can be sent at once; rank 0, which may then end, comes last."""
        pieces = message.pieces()
        for peer in sorted(self.peers.values(), key=lambda peer: peer.rank, reverse=True):
            peer.outbox.extend(pieces)
            try:
                self._flush(peer)
            except OSError as error:
                self._give_up(peer, str(error))

    def _flush(self, peer: _Peer) -> None:
        peer.send()
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.outbox else 0)
        self._selector.modify(peer.socket, wanted, peer)

    def _highest(self, attribute: str) -> tuple[float, ...]:
        """The maximum of each number that the workers gave, of those who gave any."""
        given = [values for peer in self.peers.values() if (values := getattr(peer, attribute))]
        return tuple(max(column) for column in zip(*given, strict=True))

    def _who_is_gone(self) -> list[float]:
        return [float(rank in self.gone) for rank in range(len(self.decoder.code))]

    def _end(self) -> None:
        """Send what is still queued, for as long as somebody reads it, and close all connections."""
        deadline = time.monotonic() + self.timeout_s
        for peer in list(self.peers.values()):
            try:
                while peer.outbox and time.monotonic() < deadline:
                    peer.socket.settimeout(_UNREAD_S)
                    peer.send()
            except OSError:
                pass
            peer.socket.close()
        self._selector.close()


class _Peer:
    """What rank 0 knows of a worker."""

    def __init__(self, rank: int, connection: socket.socket, largest: int) -> None:
        self.rank, self.socket = rank, connection
        self.inbox = Inbox(connection, largest)
        self.outbox: deque[memoryview] = deque()
        self.finished = -1
        """The last step that it has answered or passed."""
        self.values: tuple[float, ...] = ()
        self.met: tuple[float, ...] | None = None

    def send(self) -> None:
        """Send as much as the socket takes."""
        while self.outbox:
            try:
                sent = self.socket.send(self.outbox[0])
            except (BlockingIOError, InterruptedError):
                return
            if sent < len(self.outbox[0]):
                self.outbox[0] = self.outbox[0][sent:]
            else:
                self.outbox.popleft()
