"""Which examples a step sees, as a pure function of (seed, step, size): nothing to save, nothing to drift.

Randomness is the raw output of the counter-based generator Philox (Salmon et al. 2011), keyed by what the draw is
for. NumPy promises that raw output never changes, which it does not promise for `shuffle` or `permutation`: an order
is therefore the sorting of raw draws, and a run resumed years later under another NumPy sees the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from leantrain.errors import UsageError

Rows = NDArray[np.int64]


class Stream(IntEnum):
    """What random numbers are for. Draws for different purposes are independent even under equal seeds."""

    ORDER = 0
    SPLIT = 1
    AUGMENT = 2


def raw(stream: Stream, seed: int, index: int, count: int) -> NDArray[np.uint64]:
    """`count` random 64-bit numbers that depend on the arguments only (`index` is a step or an epoch).

    Raises:
        UsageError: seed or index is not in [0, 2**64).
    """
    for name, value in (("seed", seed), ("index", index)):
        if not 0 <= value < 2**64:
            raise UsageError(f"the data's {name} must be in [0, 2**64), got {value}")
    key = np.array([seed, index], dtype=np.uint64)
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def train_rows(count: int, seed: int, step: int, size: int) -> Rows:
    """Which of `count` examples the global batch of `step` holds, in order.

    Epochs, each a new permutation of all examples, are laid end to end and cut into batches of `size`. While `size`
    stays the same, each example is seen exactly once per epoch; a batch at the seam holds the end of one epoch and
    the start of the next.

    Returns: [size] int64 in [0, count).

    Raises:
        UsageError: size is not in [1, count], or seed or step is negative.
    """
    if not 1 <= size <= count:
        raise UsageError(f"batch size must be between 1 and the {count} training examples, got {size}")
    if step < 0:
        raise UsageError(f"step must be >= 0, got {step}")
    epoch, start = divmod(step * size, count)
    rows = _permutation(count, seed, epoch)[start : start + size]
    if len(rows) < size:
        rows = np.concatenate([rows, _permutation(count, seed, epoch + 1)[: size - len(rows)]])
    return rows


def eval_rows(count: int, size: int, limit: int | None) -> Iterator[Rows]:
    """[0, count) in order, cut into batches of `size` (the last may be smaller), at most `limit` of them.

    Raises:
        UsageError: size or limit is below 1.
    """
    if size < 1:
        raise UsageError(f"batch size must be >= 1, got {size}")
    if limit is not None and limit < 1:
        raise UsageError(f"the number of evaluation batches must be >= 1 or None for all, got {limit}")
    starts = range(0, count, size)[:limit]
    return (np.arange(start, min(start + size, count)) for start in starts)


def split_rows(count: int, held_out: float) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out, each ascending. Random, but the same for every run and every seed.

    Exactly `round(held_out * count)` rows are held out, but at least one on either side.

    Raises:
        UsageError: held_out is not in (0, 1), or there are fewer than 2 rows.
    """
    check_fraction(held_out)
    if count < 2:
        raise UsageError(f"holding out examples needs at least 2 of them, got {count}")
    held = min(max(round(held_out * count), 1), count - 1)
    by_draw = np.argsort(raw(Stream.SPLIT, 0, 0, count), kind="stable")
    return np.sort(by_draw[held:]), np.sort(by_draw[:held])


def check_fraction(held_out: float) -> None:
    """Refuse a held-out fraction that would leave nothing to train on or nothing to evaluate on."""
    if not 0 < held_out < 1:
        raise UsageError(f"held_out must be a fraction in (0, 1), got {held_out}")


@lru_cache(maxsize=4)  # a batch touches at most two epochs; the rest serves a second data set
def _permutation(count: int, seed: int, epoch: int) -> Rows:
    """All of [0, count) in the order of `epoch`. Read-only, because it is shared between callers."""
    order = np.argsort(raw(Stream.ORDER, seed, epoch, count), kind="stable")
    order.flags.writeable = False
    return order
