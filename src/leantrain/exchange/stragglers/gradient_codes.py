"""Which worker computes which parts of a batch, with what weight, so that any n - s answers give the whole gradient.

The batch is cut into n chunks with gradients g_j. Worker i computes the chunks where row i of B is not 0 and sends
one vector; from the answers of a set I of workers the sum of all g_j is found, exactly:

    sent       c_i = sum_j B[i, j] g_j                  B: [n, n], s + 1 non-zeros in each row
    decoded    sum_{i in I} a_i c_i = sum_j g_j         where  a^T B_I = 1^T,  for every I of n - s workers
    error      at most about A eps,                     A = max over I of sum_i |a_i| max_j |B[i, j]|

    fractional_repetition    s + 1 divides n: groups of s + 1 workers with the same chunks, B is 0 or 1, A = n / (s + 1)
    circulant                n + s is odd: one positive row, rotated; found from s consecutive roots of unity
    random_cyclic            any s < n: every row orthogonal to the same s random vectors; A grows fast with n

Computing costs s + 1 times what it costs uncoded. Matrices are float64; eps is that of the type that travels.

Source: Tandon, Lei, Dimakis and Karampatziakis 2017 (Gradient Coding, ICML) for repetition and the random cyclic code;
Raviv, Tandon, Dimakis and Tamo 2018 (ICML) for codes from roots of unity.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from leantrain.errors import RunError, UsageError

TOLERANCE = 1e-8
"""Largest entry of a^T B_I - 1^T that counts as solved."""
_DRAWS = 30


class Undecodable(RunError):
    """The answers at hand do not determine the sum of all chunks' gradients."""


def choose_code(n: int, s: int) -> Tensor:
    """The best conditioned code for n workers of which s may be late: B, [n, n] float64, not to be written to.

    Raises:
        UsageError: s is below 0, or not below n.
    """
    _check(n, s)
    if n % (s + 1) == 0:
        return fractional_repetition(n, s)
    return circulant(n, s) if (n + s) % 2 else random_cyclic(n, s)


def fractional_repetition(n: int, s: int) -> Tensor:
    """n / (s + 1) groups of s + 1 workers who all compute their group's s + 1 chunks. One answer per group decodes.

    Raises:
        UsageError: s + 1 does not divide n.
    """
    _check(n, s)
    if n % (s + 1):
        raise UsageError(f"fractional repetition needs s + 1 to divide n, got n={n}, s={s}")
    return torch.block_diag(*[torch.ones(s + 1, s + 1, dtype=torch.float64)] * (n // (s + 1)))


def circulant(n: int, s: int) -> Tensor:
    """Row i is row 0 rotated by i. Row 0 is the polynomial with the roots exp(2 pi i f / n), for the s consecutive f
    centred on n / 2, scaled to sum 1: real, positive and symmetric. Worker i computes chunks i to i + s, modulo n.

    Raises:
        UsageError: n + s is even, for which these roots give no real polynomial.
    """
    _check(n, s)
    if (n + s) % 2 == 0:
        raise UsageError(f"the real circulant code needs n + s to be odd, got n={n}, s={s}; s={s + 1} would do")
    row = [1.0]
    for k in range(s):
        row.append(row[-1] * math.sin(math.pi * (s - k) / n) / math.sin(math.pi * (k + 1) / n))
    first = torch.tensor([*row, *[0.0] * (n - s - 1)], dtype=torch.float64) / sum(row)
    return torch.stack([first.roll(i) for i in range(n)])


@functools.cache
def random_cyclic(n: int, s: int) -> Tensor:
    """Tandon's code: with a random H, [s, n], whose columns add up to 0, every row of B solves H B[i] = 0 with
    B[i, i] = 1 on chunks i to i + s. The best of 30 draws, the same ones in every process.

    Raises:
        UsageError: s is below 0, or not below n.
    """
    _check(n, s)
    return min((_drawn(n, s, seed) for seed in range(_DRAWS if s else 1)), key=lambda code: amplification(code, s, 200))


def decoding_weights(code: Tensor, present: Sequence[int]) -> Tensor:
    """`a` with a^T B_I = 1^T, one weight for each of the `present` workers I, in their order.

    Of workers with the same row the first present one has its weight, and the others have 0. `Decoder` remembers.

    Args:
        code: B, [n, n] float64.
        present: distinct workers, each in [0, n).

    Returns:
        float64, [len(present)].

    Raises:
        Undecodable: there are no such weights, because too many workers are missing.
    """
    rows = code[list(present)]
    first: dict[tuple[float, ...], int] = {}
    for place, row in enumerate(rows.tolist()):
        first.setdefault(tuple(row), place)
    kept = list(first.values())
    weights = torch.zeros(len(rows), dtype=torch.float64)
    if kept:
        ones = torch.ones(code.shape[1], 1, dtype=torch.float64)
        solved = torch.linalg.lstsq(rows[kept].mT, ones, rcond=1e-15, driver="gelsd").solution[:, 0]
        whole = solved.round()
        weights[kept] = torch.where((solved - whole).abs() < 1e-12, whole, solved)  # repetition adds, it never scales
    if not kept or (weights @ rows - 1).abs().max() > TOLERANCE:
        missing = sorted(set(range(len(code))) - set(present))
        raise Undecodable(f"the answers of {len(present)} of {len(code)} workers do not decode, without {missing}")
    return weights


class Decoder:
    """`decoding_weights` of one code, with the sets of workers that were present of late remembered.

    Args:
        code: B, [n, n] float64.
        remembered: how many sets.
    """

    def __init__(self, code: Tensor, remembered: int = 1024) -> None:
        self.code, self.remembered = code, remembered
        self._found: OrderedDict[frozenset[int], dict[int, float] | None] = OrderedDict()

    def weights(self, present: Iterable[int]) -> dict[int, float] | None:
        """The weight of every worker that counts, by worker in rising order; None where the answers do not decode."""
        key = frozenset(present)
        if key in self._found:
            self._found.move_to_end(key)
        else:
            self._found[key] = self._solved(sorted(key))
            if len(self._found) > self.remembered:
                self._found.popitem(last=False)
        return self._found[key]

    def _solved(self, present: list[int]) -> dict[int, float] | None:
        try:
            weights = decoding_weights(self.code, present).tolist()
        except Undecodable:
            return None
        return {worker: weight for worker, weight in zip(present, weights, strict=True) if weight}


def amplification(code: Tensor, s: int, most: int = 5000) -> float:
    """A, by how much decoding may enlarge rounding errors; infinite where a set does not decode in float64 either.

    Looks at every set of s missing workers, or, where there are more than `most`, at `most` random ones: then the
    worst set may have been missed.
    """
    n = len(code)
    if math.comb(n, s) <= most:
        sets: list[tuple[int, ...]] = list(itertools.combinations(range(n), s))
    else:
        drawn = random.Random(0)
        sets = [tuple(drawn.sample(range(n), s)) for _ in range(most)]
    largest = code.abs().amax(1)
    present = [[worker for worker in range(n) if worker not in missing] for missing in sets]
    try:
        return max(float(decoding_weights(code, workers).abs() @ largest[workers]) for workers in present)
    except Undecodable:
        return math.inf


def _drawn(n: int, s: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    checks = torch.randn(s, n, dtype=torch.float64, generator=generator)
    checks[:, -1] = -checks[:, :-1].sum(1)
    code = torch.eye(n, dtype=torch.float64)
    for i in range(n if s else 0):
        rest = [(i + k) % n for k in range(1, s + 1)]
        code[i, rest] = -torch.linalg.solve(checks[:, rest], checks[:, i])
    return code


def _check(n: int, s: int) -> None:
    if not 0 <= s < n:
        raise UsageError(f"a code for n={n} workers can do without s of them, 0 <= s < n, got s={s}")
