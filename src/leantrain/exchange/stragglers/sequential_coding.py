"""Coding across rounds (Krishnan and others): a late answer is made up for later, so each worker computes less.

Job t is one gradient: the sum over all chunks of a batch, at fixed weights. It starts in round t and is known by the
end of round t + T. In a round everybody works; some answer late and are not waited for. The share of a job's examples
that each worker computes per round (load), and the stragglers that never make a round wait:

    Uncoded(n)           load 1/n                                      T = 0        none
    GC(n, s)             (s+1)/n                                       T = 0        s per round
    SRSGC(n, B, W, lam)  (s+1)/n, s = ceil(B lam / (W-1+B))            T = B        s per round or (B, W, lam)-bursty
    MSGC(n, B, W, lam)   (lam+1)(W-1+B) / (n (B + (W-1)(lam+1)))       T = W-2+B    (B, W, lam)-bursty
                         (W-1+B) / (n (W-1)) for lam = n                            or (B, W-1+B, lam)-arbitrary

Saves: load, and so the time of every round, against plain gradient coding that lives with the same bursts. Costs: T + 1
independent models in flight, because the weights of one model are not known before its last gradient is; the weights
of T + 1 jobs in every worker; with M-SGC one vector for each of W-1+B jobs sent per round instead of one.

Schemes are parameters; `begin` gives a `Course`, which is told who was late in each round and says who computes what,
which rounds must be waited out, and with which weights the answers add up to each job's gradient. Neither knows of
processes, clocks or tensors of a model.

Source: Krishnan, Ebrahimi and Khisti 2023 (Sequential Gradient Coding for Straggler Mitigation, ICLR); Tandon et al.
2017 (Gradient Coding, ICML).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.exchange.stragglers.coding_course import Course, Multiplexed, Repeating
from leantrain.exchange.stragglers.coding_scheme import Scheme
from leantrain.exchange.stragglers.gradient_codes import Decoder, amplification, choose_code
from leantrain.exchange.stragglers.models import Arbitrary, Bursty, OnePerGroup, PerRound, StragglerModel


@dataclass(frozen=True)
class GC(Scheme):
    """Gradient coding: every chunk is computed by s + 1 workers, and every round ends with its own job decoded.

    Args:
        n: workers.
        s: how many of them may be late in a round. Where s + 1 divides n, one of each group of s + 1 is enough.

    Raises:
        UsageError: not 0 <= s < n.
    """

    n: int
    s: int

    def __post_init__(self) -> None:
        if not 0 <= self.s < self.n:
            raise UsageError(f"GC needs 0 <= s < n, got n={self.n}, s={self.s}")

    delay, vectors, memory = 0, 1, 1

    @property
    def load(self) -> Fraction:
        """(s + 1) / n."""
        return Fraction(self.s + 1, self.n)

    @property
    def tolerates(self) -> tuple[StragglerModel, ...]:
        """s in every round; and with repetition, all but one of each group."""
        return (PerRound(self.s), *([OnePerGroup(self.s + 1)] if self.n % (self.s + 1) == 0 else []))

    @property
    def sizes(self) -> tuple[Fraction, ...]:
        """n equal chunks."""
        return (Fraction(1, self.n),) * self.n

    @cached_property
    def code(self) -> Tensor:
        """B, [n, n] float64, of `gradient_codes.choose_code`."""
        return choose_code(self.n, self.s)

    @cached_property
    def decoder(self) -> Decoder:
        """Finds the weights of answers."""
        return Decoder(self.code)

    @cached_property
    def amplification(self) -> float:
        """That of the code."""
        return amplification(self.code, self.s)

    def encode(self, part: int) -> list[tuple[int, float]]:
        """Part i is what worker i computes: row i of the code."""
        return [(chunk, value) for chunk, value in enumerate(self.code[part].tolist()) if value]

    def begin(self, jobs: int) -> Course:
        """A course in which nothing is ever made up for."""
        return Repeating(self, jobs, code=self)


@dataclass(frozen=True)
class Uncoded(GC):
    """Plain data parallelism: everybody is waited for.

    Args:
        n: workers.
        copies: how many workers compute each chunk, to no other end than finding out what load costs.

    Raises:
        UsageError: not 1 <= copies <= n.
    """

    s: int = field(default=0, init=False, repr=False)
    copies: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.copies <= self.n:
            raise UsageError(f"Uncoded needs 1 <= copies <= n, got n={self.n}, copies={self.copies}")

    @property
    def load(self) -> Fraction:
        """copies / n."""
        return Fraction(self.copies, self.n)

    @property
    def tolerates(self) -> tuple[StragglerModel, ...]:
        """Nobody's being late."""
        return (PerRound(0),)

    @cached_property
    def code(self) -> Tensor:
        """Every chunk in equal parts from `copies` workers."""
        first = torch.tensor([1 / self.copies] * self.copies + [0.0] * (self.n - self.copies), dtype=torch.float64)
        return torch.stack([first.roll(worker) for worker in range(self.n)])


@dataclass(frozen=True)
class SRSGC(Scheme):
    """Gradient coding for fewer stragglers than there may be, with selective repetition B rounds later.

    Round r first looks at job r-B. If v > s workers have not delivered their part of it, v-s of them compute it now, in
    place of their part of job r. With that job r-B decodes.

    Args:
        n: workers.
        B: rounds within which a burst of lateness begins and ends, at least 1. It is also the delay T.
        W: rounds of a window, of which B divides W-1.
        lam: how many workers may be late in a window, 1 <= lam <= n.

    Raises:
        UsageError: parameters for which there is no such scheme.
    """

    n: int
    B: int
    W: int
    lam: int

    def __post_init__(self) -> None:
        _check_workers("SRSGC", self.n, self.lam)
        if self.B < 1 or self.W < 2 or (self.W - 1) % self.B:
            raise UsageError(f"SRSGC needs B >= 1 that divides W - 1 >= 1, got B={self.B}, W={self.W}")

    vectors = 1

    @property
    def s(self) -> int:
        """ceil(B lam / (W-1+B)), late workers of a round that need no repetition."""
        return -(-self.B * self.lam // (self.W - 1 + self.B))

    @property
    def delay(self) -> int:
        """B."""
        return self.B

    @property
    def load(self) -> Fraction:
        """(s + 1) / n."""
        return self.inner.load

    @property
    def tolerates(self) -> tuple[StragglerModel, ...]:
        """s in every round, or lam in a window, each in a burst shorter than B + 1."""
        return (PerRound(self.s), Bursty(self.B, self.W, self.lam))

    @property
    def memory(self) -> int:
        """W."""
        return self.W

    @property
    def sizes(self) -> tuple[Fraction, ...]:
        """n equal chunks."""
        return self.inner.sizes

    @property
    def amplification(self) -> float:
        """That of GC(n, s)."""
        return self.inner.amplification

    @cached_property
    def inner(self) -> GC:
        """The code of every job, GC(n, s)."""
        return GC(self.n, self.s)

    def encode(self, part: int) -> list[tuple[int, float]]:
        """Part i is row i of the code, in whichever round worker i computes it."""
        return self.inner.encode(part)

    def begin(self, jobs: int) -> Course:
        """A course in which what is missing of a job is made up for B rounds later."""
        return Repeating(self, jobs, code=self.inner, gap=self.B)


@dataclass(frozen=True)
class MSGC(Scheme):
    """Most of each job uncoded with time to repeat it, the rest in B coded groups; parts of W-1+B jobs in every round.

    A job has (W-1) n large chunks (D1) of lam + 1 units and B groups of n small ones (D2) of one unit; a unit is
    1 / (n (B + (W-1)(lam+1))) of its examples. In the W-1 rounds from its start, worker i computes its own W-1 large
    chunks, one in each. In each of the B rounds after that it repeats one that it has not delivered or, if it has
    delivered all, computes its row of GC(n, lam) over the round's group. Every vector takes lam + 1 units.

    Args:
        n: workers.
        B: rounds within which a burst of lateness begins and ends, 0 < B < W.
        W: rounds of a window.
        lam: how many workers may be late in a window, 1 <= lam <= n. With lam = n there are no coded groups.

    Raises:
        UsageError: parameters for which there is no such scheme.
    """

    n: int
    B: int
    W: int
    lam: int

    def __post_init__(self) -> None:
        _check_workers("MSGC", self.n, self.lam)
        if not 0 < self.B < self.W:
            raise UsageError(f"MSGC needs 0 < B < W, got B={self.B}, W={self.W}")

    @property
    def delay(self) -> int:
        """W - 2 + B."""
        return self.W - 2 + self.B

    @property
    def load(self) -> Fraction:
        """W-1+B vectors of one large chunk each."""
        return self.vectors * self.sizes[0]

    @property
    def vectors(self) -> int:
        """One for each job in flight, W - 1 + B."""
        return self.W - 1 + self.B

    @property
    def tolerates(self) -> tuple[StragglerModel, ...]:
        """lam in a window, in bursts shorter than B + 1; or lam in W-1+B rounds, each at most B times."""
        return (Bursty(self.B, self.W, self.lam), Arbitrary(self.B, self.memory, self.lam))

    @property
    def memory(self) -> int:
        """The rounds of a job, W - 1 + B."""
        return self.W - 1 + self.B

    @cached_property
    def sizes(self) -> tuple[Fraction, ...]:
        """Worker i's large chunks are i (W-1) to (i+1)(W-1) - 1; after all these come the groups of n small ones."""
        large, groups = (self.lam + 1, self.B) if self.lam < self.n else (1, 0)
        unit = Fraction(1, self.n * (groups + (self.W - 1) * large))
        return (large * unit,) * self.large_chunks + (unit,) * (groups * self.n)

    @property
    def large_chunks(self) -> int:
        """How many there are; parts and chunks below this number are large ones."""
        return (self.W - 1) * self.n

    @property
    def amplification(self) -> float:
        """That of the groups' code."""
        return self.inner.amplification if self.inner else 1.0

    @cached_property
    def inner(self) -> GC | None:
        """The code of every group, GC(n, lam); None for lam = n."""
        return GC(self.n, self.lam) if self.lam < self.n else None

    def encode(self, part: int) -> list[tuple[int, float]]:
        """A large chunk is a part of the same number; after them, part i of each group is row i of its code."""
        if part < self.large_chunks or self.inner is None:
            return [(part, 1.0)]
        row = (part - self.large_chunks) % self.n
        return [(part - row + chunk, value) for chunk, value in self.inner.encode(row)]

    def begin(self, jobs: int) -> Course:
        """A course in which every round has a part of each job in flight."""
        return Multiplexed(self, jobs)


def _check_workers(name: str, n: int, lam: int) -> None:
    if n < 2:
        raise UsageError(f"{name} needs n >= 2 workers, got n={n}")
    if not 1 <= lam <= n:
        raise UsageError(f"{name} needs 1 <= lam <= n, got n={n}, lam={lam}")
