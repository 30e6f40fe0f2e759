"""Both clocks: whose time it is, and that reading the CUDA one never waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leantrain.ledger.clock import UNCOUNTED, CudaClock, HostClock


class Hand:
    """A clock's hand that the test moves."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_each_moment_belongs_to_the_phase_switched_to_last() -> None:
    hand = Hand()
    clock = HostClock(hand)
    for phase, seconds in [("other", 1.0), ("forward", 2.0), (UNCOUNTED, 50.0), ("other", 4.0), ("forward", 8.0)]:
        clock.switch(phase)
        hand.time += seconds
    clock.end_step()
    hand.time += 100  # after the end: nobody's
    clock.switch("other")
    hand.time += 16
    clock.end_step()
    assert clock.finished() == [{"other": 5.0, "forward": 10.0}, {"other": 16.0}]
    assert clock.finished() == []


@given(st.lists(st.tuples(st.sampled_from(["data", "forward", "other"]), st.integers(0, 100)), min_size=1))
def test_phases_add_up_to_the_step(moves: list[tuple[str, int]]) -> None:
    hand = Hand()
    clock = HostClock(hand)
    for phase, seconds in moves:
        clock.switch(phase)
        hand.time += seconds
    clock.end_step()
    assert sum(clock.finished()[0].values()) == sum(seconds for _, seconds in moves)


class Device:
    """A GPU that reaches a mark when told to: `now` is its time, `reached` how far it has come."""

    def __init__(self) -> None:
        self.now, self.reached, self.waits, self.made = 0.0, -1.0, 0, 0

    def event(self) -> Any:
        self.made += 1
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self, stream: object) -> None:
        assert stream == "stream"
        self.at = self.device.now

    def query(self) -> bool:
        return self.at <= self.device.reached

    def synchronize(self) -> None:
        self.device.waits += 1
        self.device.reached = max(self.device.reached, self.at)

    def elapsed_time(self, end: Event) -> float:
        assert end.query(), "read before the device was there"
        return (end.at - self.at) * 1e3


def cuda_clock(monkeypatch: pytest.MonkeyPatch, device: Device) -> CudaClock:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    clock = CudaClock(torch.device("cuda"), device.event)
    clock.start()
    return clock


def run_step(clock: CudaClock, device: Device) -> None:
    for phase, seconds in [("other", 1.0), ("forward", 2.0), (UNCOUNTED, 50.0), ("other", 4.0)]:
        clock.switch(phase)
        device.now += seconds
    clock.end_step()
    device.now += 100


def test_a_cuda_step_comes_out_when_the_device_has_done_it_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    clock = cuda_clock(monkeypatch, device)
    run_step(clock, device)
    end_of_first = device.now - 100
    run_step(clock, device)
    assert clock.finished() == []
    device.reached = end_of_first
    step = {"other": pytest.approx(5.0), "forward": pytest.approx(2.0)}
    assert clock.finished() == [step]
    assert device.waits == 0
    assert clock.finished(wait=True) == [step]
    assert device.waits == 1


def test_cuda_events_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    clock = cuda_clock(monkeypatch, device)
    for _ in range(10):
        run_step(clock, device)
        assert len(clock.finished(wait=True)) == 1
    assert device.made <= 12
