"""Many vectors to one, of which up to f of n may say anything: pure functions `(stack [n, d], f) -> [d]`.

    mean                          1/n sum_i v_i                                            one liar moves it anywhere
    nearest_neighbor_average      mean of the n - f vectors nearest to row `own`           n > 2f   O(n d)
    krum                          the v_i nearest to its n - f - 2 nearest others          n > 2f + 2   O(n^2 d)
    multi_krum                    mean of the n - f vectors that Krum likes best           n > 2f + 2   O(n^2 d)
    coordinate_median             in every coordinate the median                           n > 2f   O(n^2 d)
    trimmed_mean                  in every coordinate the mean without f lowest, f highest n > 2f   O(n^2 d)
    geometric_median              argmin_z sum_i |v_i - z|                                 n > 2f   O(steps n d)
    centered_clipping             c + mean_i (v_i - c) min(1, radius / |v_i - c|)          n > 2f   O(n d)
    minimum_diameter_average      mean of the n - f vectors that lie closest together      n > 2f   O(n^2 d + C(n, f))
    minimum_variance_average      mean of the n - f with the least greatest variance       n > 2f   O(n^2 d + C(n, f))

    nearest_neighbor_mixing       [n, d] -> [n, d]: before a rule, each v_i becomes the mean of its n - f nearest

A vector with a NaN or an infinity is known to be a lie: k <= f of them are left out, and the rule sees n - k vectors
and f - k liars. With more than f there is no answer: the result is NaN. Where n - f vectors are equal, every rule but
`mean` (and `centered_clipping` to a given radius) returns them.

Sources: nearest neighbours Farhadkhani et al. 2022 (MoNNA, ICML 2023); Krum Blanchard et al. 2017 (NeurIPS); median and
trimmed mean Yin et al. 2018 (ICML); geometric median Pillutla et al. 2022 (IEEE TSP), by Weiszfeld's iteration; centred
clipping Karimireddy et al. 2021 (ICML); least diameter El Mhamdi et al. 2018 (ICML); mixing Allouah et al. 2023
(AISTATS).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import combinations
from math import comb
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.exchange.robust.distances import (
    chunks,
    finite_rows,
    mean_of_rows,
    nearest_rows,
    neighbour_scores,
    pairwise_squared_distances,
    squared_distances,
)

R = TypeVar("R", bound=Callable[..., Tensor])
FEWEST: dict[str, Callable[[int], int]] = {
    "mean": lambda f: 1,
    "krum": lambda f: 2 * f + 3,
    "multi_krum": lambda f: 2 * f + 3,
}
"""The fewest vectors that a rule works with, from f; 2f + 1 for those that are not named here."""
_MOST_SUBSETS = 20_000


class Rule(Protocol):
    """Called with the vectors, [n, d], and how many of them may be lies."""

    def __call__(self, stack: Tensor, f: int) -> Tensor: ...


def mean(stack: Tensor, f: int = 0) -> Tensor:
    """The plain average, for comparison: `f` changes nothing, and one liar can make the result whatever it likes."""
    _check(stack, f, "mean")
    return stack.mean(0)


def nearest_neighbor_average(stack: Tensor, f: int, own: int = 0) -> Tensor:
    """The mean of the n - f vectors nearest to vector `own`, itself included.

    Args:
        stack: float [n, d], one vector per worker.
        f: how many of them may be lies, n > 2f.
        own: the row of whoever asks. It trusts itself, so its own vector is always part of the mean, and is the
            result where fewer than n - f vectors are finite.

    Raises:
        UsageError: n <= 2f; `own` is no row; `stack` is not float [n, d].
    """
    _check(stack, f, "nearest_neighbor_average")
    if not 0 <= own < len(stack):
        raise UsageError(f"own must be a row of the stack, 0 to {len(stack) - 1}, got {own}")
    nearest = nearest_rows(squared_distances(stack, stack[own]), len(stack) - f, own)
    return stack[own].clone() if nearest is None else mean_of_rows(stack, nearest)


def _robust(rule: R) -> R:
    """What rules do first: check n against f, leave out vectors that are not finite, give up if those are too many."""

    @wraps(rule)
    def checked(stack: Tensor, f: int, **options: Any) -> Tensor:
        _check(stack, f, rule.__name__)
        finite = finite_rows(stack)
        lies = len(stack) - int(finite.sum())
        if lies > f:
            return torch.full_like(stack[0], torch.nan)
        return rule(stack[finite] if lies else stack, f - lies, **options).to(stack.dtype)

    return cast("R", checked)


@_robust
def krum(stack: Tensor, f: int) -> Tensor:
    """The vector whose n - f - 2 nearest others are nearest to it, by the sum of squared distances; n > 2f + 2.

    ByzFL and other code of EPFL takes the n - f - 1 nearest others: their Krum(f) is `krum(stack, f - 1)`.

    Raises:
        UsageError: n <= 2f + 2; `stack` is not float [n, d].
    """
    return stack[int(neighbour_scores(pairwise_squared_distances(stack), len(stack) - f - 2).argmin())].clone()


@_robust
def multi_krum(stack: Tensor, f: int) -> Tensor:
    """The mean of the n - f vectors with the best scores of `krum`; n > 2f + 2.

    Raises:
        UsageError: n <= 2f + 2; `stack` is not float [n, d].
    """
    scores = neighbour_scores(pairwise_squared_distances(stack), len(stack) - f - 2)
    return mean_of_rows(stack, _smallest(scores, len(stack) - f))


@_robust
def coordinate_median(stack: Tensor, f: int) -> Tensor:
    """In every coordinate the median: the middle value, or the mean of the two in the middle; n > 2f.

    Raises:
        UsageError: n <= 2f; `stack` is not float [n, d].
    """
    return _middle(stack, drop=(len(stack) - 1) // 2)


@_robust
def trimmed_mean(stack: Tensor, f: int) -> Tensor:
    """In every coordinate the mean of what is left without the f lowest and the f highest values; n > 2f.

    Raises:
        UsageError: n <= 2f; `stack` is not float [n, d].
    """
    return _middle(stack, drop=f)


@_robust
def geometric_median(stack: Tensor, f: int, *, steps: int = 100, tolerance: float = 1e-7) -> Tensor:
    """The point whose distances to all vectors have the least sum, by Weiszfeld's iteration; n > 2f.

        z <- sum_i w_i v_i / sum_i w_i,   w_i = 1 / max(|v_i - z|, nu)

    It starts at the coordinate-wise median (from 0, a few far liars hold it for many steps) and ends when a step is
    shorter than `tolerance` times the median distance at the start. nu is 1e-6 of that distance.

    Raises:
        UsageError: n <= 2f; `stack` is not float [n, d].
    """
    point = _middle(stack, drop=(len(stack) - 1) // 2).double()
    distances = squared_distances(stack, point).sqrt()
    scale = distances.median()
    if scale == 0:  # half of the vectors are this point, and no other has a smaller sum
        return point
    for _ in range(steps):
        weights = 1 / distances.clamp_min(1e-6 * scale)
        moved = _weighted_mean(stack, weights / weights.sum())
        step = (moved - point).norm()
        point, distances = moved, squared_distances(stack, moved).sqrt()
        if step <= tolerance * scale:
            break
    return point


@_robust
def centered_clipping(
    stack: Tensor, f: int, *, radius: float | None = None, steps: int = 1, start: Tensor | None = None
) -> Tensor:
    """A centre, moved by the mean of the differences to it, each cut to a length of at most `radius`; n > 2f.

    Args:
        radius: None takes the median distance to `start`.
        steps: how often the centre is moved.
        start: [d], the last result where vectors change slowly; None takes the coordinate-wise median.

    Raises:
        UsageError: n <= 2f; `stack` is not float [n, d]; the radius is below 0 or `start` is not [d].
    """
    if radius is not None and not radius >= 0:
        raise UsageError(f"radius must be a number >= 0, got {radius!r}")
    if start is not None and start.shape != stack.shape[1:]:
        raise UsageError(f"start must be [{stack.shape[1]}], one number per coordinate, got {list(start.shape)}")
    centre = (_middle(stack, drop=(len(stack) - 1) // 2) if start is None else start).double()
    for _ in range(steps):
        distances = squared_distances(stack, centre).sqrt()
        reach = float(distances.median()) if radius is None else radius
        shares = (reach / distances.clamp_min(1e-300)).clamp_max(1.0) / len(stack)
        centre = (1 - shares.sum()) * centre + _weighted_mean(stack, shares)
    return centre


@_robust
def minimum_diameter_average(stack: Tensor, f: int) -> Tensor:
    """The mean of the n - f vectors of which the two farthest apart are nearest to each other; n > 2f.

    Raises:
        UsageError: n <= 2f; more than 20,000 subsets; `stack` is not float [n, d].
    """
    distances = pairwise_squared_distances(stack)
    return mean_of_rows(stack, _best_subset(len(stack), f, lambda rows: float(distances[rows][:, rows].max())))


@_robust
def minimum_variance_average(stack: Tensor, f: int) -> Tensor:
    """The mean of the n - f vectors whose variance, in the direction in which it is greatest, is least; n > 2f.

    Called SMEA (smallest maximum eigenvalue averaging) elsewhere. The eigenvalue comes from the distances: that of the
    centred Gram matrix -1/2 C D C, which is the covariance's up to a factor.

    Raises:
        UsageError: n <= 2f; more than 20,000 subsets; `stack` is not float [n, d].
    """
    distances = pairwise_squared_distances(stack)

    def variance(rows: list[int]) -> float:
        inner = distances[rows][:, rows]
        if not inner.isfinite().all():  # squares beyond float64
            return torch.inf
        centred = inner - inner.mean(0) - inner.mean(1, keepdim=True) + inner.mean()
        return float(torch.linalg.eigvalsh(-0.5 * centred)[-1])

    return mean_of_rows(stack, _best_subset(len(stack), f, variance))


def nearest_neighbor_mixing(stack: Tensor, f: int) -> Tensor:
    """Every vector replaced by the mean of its n - f nearest, itself included: [n, d] -> [n, d], for a rule to follow.

    Vectors that are not finite stay as they are, for that rule to leave out; with more than f of them all stay.

    Raises:
        UsageError: n <= 2f; `stack` is not float [n, d].
    """
    _check(stack, f, "nearest_neighbor_mixing")
    finite = finite_rows(stack)
    mixed = stack.clone()
    distances = pairwise_squared_distances(stack)
    for row in finite.nonzero().flatten().tolist():
        nearest = nearest_rows(torch.where(finite, distances[row], torch.inf), len(stack) - f, row)
        if nearest is not None:
            mixed[row] = mean_of_rows(stack, nearest)
    return mixed


AGGREGATORS: dict[str, Rule] = {
    "mean": mean,
    "nearest_neighbor_average": nearest_neighbor_average,
    "krum": krum,
    "multi_krum": multi_krum,
    "coordinate_median": coordinate_median,
    "trimmed_mean": trimmed_mean,
    "geometric_median": geometric_median,
    "centered_clipping": centered_clipping,
    "minimum_diameter_average": minimum_diameter_average,
    "minimum_variance_average": minimum_variance_average,
}
"""Every rule by its name."""


def check_workers(rule: str, n: int, f: int) -> None:
    """Refuse a number of vectors, one per worker, that a rule cannot work with.

    Raises:
        UsageError: f is not an integer >= 0, or n is too small for it.
    """
    if not isinstance(f, int) or isinstance(f, bool) or f < 0:
        raise UsageError(f"f, how many of the {n} vectors may be lies, must be an integer >= 0, got {f!r}")
    fewest = FEWEST.get(rule, lambda f: 2 * f + 1)
    if n < fewest(f):
        allowed = f"f <= {(n - fewest(0)) // 2}" if n >= fewest(0) else "no f at all"
        raise UsageError(f"{rule} with f={f} needs at least {fewest(f)} vectors, got n={n}, which allows {allowed}")


def _check(stack: Tensor, f: int, rule: str) -> None:
    if stack.ndim != 2 or not stack.is_floating_point() or not stack.numel():
        raise UsageError(f"{rule} takes float vectors [n, d], got {stack.dtype} {list(stack.shape)}")
    check_workers(rule, len(stack), f)


def _smallest(values: Tensor, count: int) -> list[int]:
    return sorted(values.argsort(stable=True)[:count].tolist())


def _middle(stack: Tensor, drop: int) -> Tensor:
    """In every coordinate the mean of the values without the `drop` lowest and highest.

    Rows are sorted by exchanging neighbours (odd-even transposition): n rounds of minima and maxima of whole rows,
    which for the n of workers takes a quarter of the time of torch.sort along the first axis.
    """
    n, result = len(stack), torch.empty_like(stack[0])
    for columns in chunks(stack):
        rows = list(stack[:, columns])
        for turn in range(n if drop else 0):
            for i in range(turn % 2, n - 1, 2):
                rows[i], rows[i + 1] = torch.minimum(rows[i], rows[i + 1]), torch.maximum(rows[i], rows[i + 1])
        kept = torch.stack(rows[drop : n - drop])
        result[columns] = mean_of_rows(kept, list(range(len(kept))))
    return result


def _weighted_mean(stack: Tensor, weights: Tensor) -> Tensor:
    """Sum of the rows times their weights, float64 [d]."""
    return torch.cat([weights @ stack[:, columns].double() for columns in chunks(stack)])


def _best_subset(n: int, f: int, badness: Callable[[list[int]], float]) -> list[int]:
    """The n - f rows with the least badness; of equal ones the first in lexicographic order."""
    if comb(n, f) > _MOST_SUBSETS:
        raise UsageError(
            f"{comb(n, f)} subsets of {n - f} of n={n} vectors are too many to compare (at most {_MOST_SUBSETS}); use "
            "nearest_neighbor_average, trimmed_mean or multi_krum"
        )
    return min((list(rows) for rows in combinations(range(n), n - f)), key=badness)
