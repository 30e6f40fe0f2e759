"""A long series of numbers in little memory: exact count, sum and maximum; quantiles from a fair sample."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import Any


class Samples:
    """Keeps up to `limit` of the values it was given, each with equal chance (reservoir sampling, Vitter 1985).

    With at most `limit` values every answer is exact. The choice is repeatable and leaves global generators alone.
    """

    def __init__(self, limit: int = 8192) -> None:
        self.count, self.total, self.max = 0, 0.0, 0.0
        self._limit = limit
        self._kept: list[float] = []
        self._random = random.Random(0)

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.max = max(self.max, value)
        if len(self._kept) < self._limit:
            self._kept.append(value)
        elif (place := self._random.randrange(self.count)) < self._limit:
            self._kept[place] = value

    def quantile(self, fraction: float) -> float:
        """The smallest kept value that at least `fraction` of the kept values do not exceed; 0 without values."""
        if not self._kept:
            return 0.0
        return sorted(self._kept)[max(0, math.ceil(fraction * len(self._kept)) - 1)]

    def median(self) -> float:
        """The middle value, or the mean of the two in the middle."""
        if not self._kept:
            return 0.0
        ordered, half = sorted(self._kept), len(self._kept) // 2
        return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "total": self.total, "max": self.max, "kept": list(self._kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.total, self.max = state["count"], state["total"], state["max"]
        self._kept = list(state["kept"])


class StepTimes:
    """Seconds of every step, whole and by phase."""

    def __init__(self, phases: Iterable[str]) -> None:
        self._whole = Samples()
        self._phases = {phase: Samples() for phase in phases}

    def add(self, seconds: dict[str, float]) -> None:
        """Add one step; a phase it did not have took 0 seconds."""
        self._whole.add(sum(seconds.values()))
        for phase, samples in self._phases.items():
            samples.add(seconds.get(phase, 0.0))

    def of_steps(self) -> dict[str, float]:
        whole = self._whole
        return {"median": whole.median(), "p99": whole.quantile(0.99), "max": whole.max, "total": whole.total}

    def of_phases(self) -> dict[str, float]:
        """Median over the steps of each phase's seconds."""
        return {phase: samples.median() for phase, samples in self._phases.items()}

    def state_dict(self) -> dict[str, Any]:
        phases = {phase: samples.state_dict() for phase, samples in self._phases.items()}
        return {"whole": self._whole.state_dict(), "phases": phases}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._whole.load_state_dict(state["whole"])
        for phase, samples in self._phases.items():
            samples.load_state_dict(state["phases"][phase])
