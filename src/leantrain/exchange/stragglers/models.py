"""Which workers may be late when: patterns of stragglers that a coding scheme is built to live with.

A pattern is a bool array [rounds, workers], True where a worker's answer was not waited for. A model of stragglers is a
set of patterns; taking stragglers out of an allowed pattern, or rounds off its ends, leaves it allowed.

    PerRound(s)             at most s stragglers in a round
    OnePerGroup(size)       in every round somebody of each group of `size` neighbours answers
    Bursty(B, W, lam)       in any W rounds at most lam different stragglers, and the first and the last round in which
                            one of them is late are less than B apart
    Arbitrary(N, W, lam)    in any W rounds at most lam different stragglers, each late at most N times

Source: Krishnan, Ebrahimi and Khisti 2023 (Sequential Gradient Coding for Straggler Mitigation, ICLR).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from leantrain.errors import UsageError

Pattern = NDArray[np.bool_]
"""[rounds, workers]: who was late when."""


class StragglerModel(Protocol):
    """A set of patterns."""

    def allows(self, late: Pattern) -> bool:
        """Whether the pattern, bool [rounds, workers], belongs to it. One without rounds does."""
        ...


@dataclass(frozen=True)
class PerRound:
    """At most `s` stragglers in every round.

    Raises:
        UsageError: s is below 0.
    """

    s: int

    def __post_init__(self) -> None:
        if self.s < 0:
            raise UsageError(f"s counts stragglers in a round and must be at least 0, got {self.s}")

    def allows(self, late: Pattern) -> bool:
        """Whether no round has more than s."""
        return bool((late.sum(1) <= self.s).all())


@dataclass(frozen=True)
class OnePerGroup:
    """Workers 0 to size-1 are a group, the next `size` another one, and so on: none of them is ever late as a whole.

    Raises:
        UsageError: size is below 1.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"a group must have at least 1 worker, got size={self.size}")

    def allows(self, late: Pattern) -> bool:
        """Whether somebody of each group is in time in each round; `size` must divide the number of workers."""
        return not late.reshape(len(late), late.shape[1] // self.size, self.size).all(2).any()


@dataclass(frozen=True)
class Bursty:
    """Few stragglers, each for a short time: in any `W` rounds at most `lam` workers are late, each within `B` rounds.

    Raises:
        UsageError: not 1 <= B <= W, or lam is below 0.
    """

    B: int
    W: int
    lam: int

    def __post_init__(self) -> None:
        _check_window(self.B, "B", self.W, self.lam)

    def allows(self, late: Pattern) -> bool:
        """Whether every window of W rounds, or the whole pattern if it is shorter, has only short bursts of few."""
        for window in _windows(late, self.W):
            who = window.any(0)
            first = window.argmax(0)
            last = len(window) - 1 - window[::-1].argmax(0)
            if who.sum() > self.lam or (last - first)[who].max(initial=0) >= self.B:
                return False
        return True


@dataclass(frozen=True)
class Arbitrary:
    """Few stragglers, each a few times: in any `W` rounds at most `lam` workers are late, each at most `N` times.

    Raises:
        UsageError: not 1 <= N <= W, or lam is below 0.
    """

    N: int
    W: int
    lam: int

    def __post_init__(self) -> None:
        _check_window(self.N, "N", self.W, self.lam)

    def allows(self, late: Pattern) -> bool:
        """Whether every window of W rounds, or the whole pattern if it is shorter, has few and each of them rarely."""
        times = [window.sum(0) for window in _windows(late, self.W)]
        return all((each > 0).sum() <= self.lam and each.max(initial=0) <= self.N for each in times)


def random_pattern(
    model: StragglerModel, rounds: int, workers: int, rng: np.random.Generator, probability: float = 0.5
) -> Pattern:
    """A pattern that the model allows, made by trying to make workers late, round by round and in random order.

    Args:
        model: what must allow it.
        rounds, workers: its shape.
        rng: the source of chance.
        probability: that a worker is tried in a round. At 1 no straggler can be added in a round without taking out
            others in that or an earlier round.

    Returns:
        bool, [rounds, workers].
    """
    late = np.zeros((rounds, workers), dtype=bool)
    for number in range(rounds):
        for worker in rng.permutation(workers):
            late[number, worker] = rng.random() < probability
            if late[number, worker] and not model.allows(late[: number + 1]):
                late[number, worker] = False
    return late


def _windows(late: Pattern, length: int) -> Iterator[Pattern]:
    for start in range(max(1, len(late) - length + 1) if len(late) else 0):
        yield late[start : start + length]


def _check_window(times: int, name: str, window: int, lam: int) -> None:
    if not 1 <= times <= window:
        raise UsageError(f"{name} and W count rounds, 1 <= {name} <= W, got {name}={times}, W={window}")
    if lam < 0:
        raise UsageError(f"lam counts stragglers in a window and must be at least 0, got {lam}")
