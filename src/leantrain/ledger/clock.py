"""Whose time it is: every moment of a step belongs to exactly one phase, so that the phases add up to the step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch

UNCOUNTED = "uncounted"
"""Time that belongs to no step: the ledger's own measuring, and pauses."""


class Clock(Protocol):
    """Seconds by phase of each step. Steps come out of `finished` in order, perhaps some steps late."""

    def start(self) -> None: ...
    def switch(self, phase: str) -> None: ...
    def end_step(self) -> None: ...
    def finished(self, wait: bool = False) -> list[dict[str, float]]: ...


class HostClock:
    """Wall time as the Python program sees it; right for a CPU, where an operation is over when its call returns."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._finished: list[dict[str, float]] = []
        self.start()

    def start(self) -> None:
        """Forget an unfinished step; time is uncounted until `switch`."""
        self._step: dict[str, float] = {}
        self._phase, self._since = UNCOUNTED, self._now()

    def switch(self, phase: str) -> None:
        """From now on time belongs to `phase`."""
        now = self._now()
        self._step[self._phase] = self._step.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def end_step(self) -> None:
        """End the step; what follows is uncounted until `switch`."""
        self.switch(UNCOUNTED)
        self._step.pop(UNCOUNTED, None)
        self._finished.append(self._step)
        self._step = {}

    def finished(self, wait: bool = False) -> list[dict[str, float]]:
        """Seconds by phase of each step finished since the last call."""
        finished, self._finished = self._finished, []
        return finished


class CudaClock:
    """Time on the device: marks in its stream, read when the device has passed them, so nothing is ever waited for.

    A phase lasts from when the device reaches its first mark to when it reaches the next phase's. Work on the CPU that
    hides behind queued work on the device therefore costs nothing, and work that leaves the device idle costs what it
    costs. `finished(wait=True)` waits for the device; nothing else does.
    """

    def __init__(self, device: torch.device, event: Callable[[], torch.cuda.Event] | None = None) -> None:
        self._device = device
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))
        self._spare: list[torch.cuda.Event] = []
        self._pending: deque[list[tuple[torch.cuda.Event, str]]] = deque()
        self._marks: list[tuple[torch.cuda.Event, str]] = []

    def start(self) -> None:
        """Forget an unfinished step; time is uncounted until `switch`."""
        # One stream throughout: marks on different streams could not be compared.
        self._stream = torch.cuda.current_stream(self._device)
        self._marks = []
        self.switch(UNCOUNTED)

    def switch(self, phase: str) -> None:
        """From this point in the stream on, time belongs to `phase`."""
        event = self._spare.pop() if self._spare else self._event()
        event.record(self._stream)
        self._marks.append((event, phase))

    def end_step(self) -> None:
        """End the step; what follows is uncounted until `switch`."""
        self.switch(UNCOUNTED)
        self._pending.append(self._marks)
        self._marks = []
        self.switch(UNCOUNTED)

    def finished(self, wait: bool = False) -> list[dict[str, float]]:
        """Seconds by phase of each step that the device has finished since the last call."""
        finished = []
        while self._pending:
            last = self._pending[0][-1][0]
            if wait:
                last.synchronize()
            elif not last.query():
                break
            finished.append(self._read(self._pending.popleft()))
        return finished

    def _read(self, marks: list[tuple[torch.cuda.Event, str]]) -> dict[str, float]:
        seconds: dict[str, float] = {}
        for (begin, phase), (end, _) in pairwise(marks):
            if phase != UNCOUNTED:
                seconds[phase] = seconds.get(phase, 0.0) + begin.elapsed_time(end) / 1e3
        self._spare.extend(event for event, _ in marks)
        return seconds


def clock_for(device: torch.device) -> Clock:
    """The clock that is right for work on `device`."""
    return CudaClock(device) if device.type == "cuda" else HostClock()
