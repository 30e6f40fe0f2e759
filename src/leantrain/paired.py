"""Is a run different from the baseline, or is it the luck of the seed? Means, spreads and a paired test over seeds.

The same seed gives two runs the same initial weights (where their models agree) and the same batches, so the seeds
are pairs: the test looks at the differences within each pair, which is far more sensitive than comparing two means.

    t = mean(d) / (std(d) / sqrt(n)),   d_i = run_i - baseline_i,   n - 1 degrees of freedom   (two-sided)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

FEWEST_FOR_TEST = 3
"""With two pairs the t distribution has one degree of freedom: almost nothing would ever be significant."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1 in the denominator; None for a single value) of `n` values."""

    mean: float
    std: float | None
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


@dataclass(frozen=True)
class Versus:
    """A run measured against the baseline over the seeds that both have.

    Attributes:
        difference: mean of run minus baseline, in the metric's unit.
        ratio: mean of the run over mean of the baseline; None where the baseline's mean is 0.
        p_value: two-sided p of the paired t-test; None where there is no test.
        test: what was tested, or the reason why nothing was.
        n: number of pairs.
    """

    difference: float
    ratio: float | None
    p_value: float | None
    test: str
    n: int

    def to_dict(self) -> dict[str, float | int | str | None]:
        return asdict(self)


def spread(values: Sequence[float]) -> Spread | None:
    """The Spread of `values`; None when there are none."""
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), std=std, n=len(values))


def versus(run: Mapping[int, float], baseline: Mapping[int, float], *, tested: bool = True) -> Versus | None:
    """Compare two runs given as {seed: value}, over their common seeds; None when they have none in common.

    Args:
        tested: False for figures that no seed can change, such as bytes of optimizer state: no test then.
    """
    seeds = sorted(run.keys() & baseline.keys())
    if not seeds:
        return None
    ours, theirs = [run[s] for s in seeds], [baseline[s] for s in seeds]
    mean, base = statistics.fmean(ours), statistics.fmean(theirs)
    p_value, test = _paired_t(ours, theirs) if tested else (None, "not tested: not a matter of the seed")
    return Versus(
        difference=mean - base,
        ratio=mean / base if base else None,
        p_value=p_value,
        test=test,
        n=len(seeds),
    )


def _paired_t(ours: list[float], theirs: list[float]) -> tuple[float | None, str]:
    n = len(ours)
    if n < FEWEST_FOR_TEST:
        return None, f"no test: {n} seed{'s' if n > 1 else ''}, at least {FEWEST_FOR_TEST} needed"
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    # Rounding alone makes differences "vary" by some 1e-16 of the values; a t of 1e15 would say nothing.
    noise = 1e-12 * max(abs(x) for x in ours + theirs)
    if max(differences) - min(differences) <= noise:
        same = "equal" if abs(differences[0]) <= noise else "the same difference"
        return None, f"no test: {same} in all {n} seeds"
    # Imported here: scipy.stats takes a second to load, and is needed once, at the end.
    from scipy.stats import ttest_rel

    p_value = float(ttest_rel(ours, theirs).pvalue)
    if not math.isfinite(p_value):
        return None, "no test: a value is not finite"
    return p_value, f"paired t-test over {n} seeds, two-sided"
