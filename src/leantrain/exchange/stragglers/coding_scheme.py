"""What every way to spread jobs over workers has to say of itself: see `sequential_coding`.

Source: Krishnan, Ebrahimi and Khisti 2023 (Sequential Gradient Coding for Straggler Mitigation, ICLR).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from fractions import Fraction
from typing import TYPE_CHECKING

from leantrain.exchange.stragglers.models import Pattern, StragglerModel

if TYPE_CHECKING:
    from leantrain.exchange.stragglers.coding_course import Course


class Scheme(ABC):
    """Parameters of a way to spread jobs over n workers, and what follows from them. Workers and parts count from 0."""

    n: int
    """Workers."""

    @property
    @abstractmethod
    def delay(self) -> int:
        """T: job t is decoded by the end of round t + T. It takes T + 1 independent models to keep everybody busy."""

    @property
    @abstractmethod
    def load(self) -> Fraction:
        """The largest share of a job's examples that a worker computes in a round."""

    @property
    @abstractmethod
    def vectors(self) -> int:
        """The most vectors, each as long as a gradient, that a worker sends in a round. All take as long to compute."""

    @property
    @abstractmethod
    def tolerates(self) -> tuple[StragglerModel, ...]:
        """A run in which each stretch of `memory` rounds is allowed by one of these never has to wait."""

    @property
    @abstractmethod
    def memory(self) -> int:
        """How many rounds, the present one included, decide whether the present one has to be waited out."""

    @property
    @abstractmethod
    def sizes(self) -> tuple[Fraction, ...]:
        """The share of a job's examples in each of its chunks; they add up to 1."""

    @property
    @abstractmethod
    def amplification(self) -> float:
        """By how much decoding enlarges rounding errors, about: see `gradient_codes.amplification`."""

    @abstractmethod
    def encode(self, part: int) -> list[tuple[int, float]]:
        """Chunks and coefficients: the vector of `part` is the sum of coefficient * gradient of the chunk's sum."""

    @abstractmethod
    def begin(self, jobs: int) -> Course:
        """The course of a run of `jobs` jobs, before its first round."""

    def conforms(self, late: Pattern) -> bool:
        """Whether a run with these stragglers, bool [rounds, n], never had to wait in any of its rounds."""
        ends = range(1, len(late) + 1)
        stretches = (late[max(0, end - self.memory) : end] for end in ends)
        return all(any(model.allows(stretch) for model in self.tolerates) for stretch in stretches)

    def bounds(self, examples: int) -> list[int]:
        """Where chunks begin and end among a job's examples: chunk c is [bounds[c], bounds[c + 1]), at times empty."""
        ends, total = [0], Fraction(0)
        for size in self.sizes:
            total += size
            ends.append(math.floor(total * examples + Fraction(1, 2)))
        return ends
