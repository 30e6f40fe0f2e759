"""Columns of numbers scaled by what the training rows show, and by nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from leantrain.data.order import Rows

Numbers = NDArray[np.float64]


def standardised(columns: NDArray[Any], train: Rows) -> tuple[NDArray[np.float32], Numbers, Numbers]:
    """(columns - mean) / std, where mean and std are taken over the training rows.

    Missing numbers (NaN) are left out of both and become 0, the training mean. A column that is constant, or missing
    throughout, has a std of 1.

    Args:
        columns: [N, F] float64.
        train: rows to learn mean and std from.

    Returns: [N, F] float32 without NaN; mean [F] and std [F] float64, in the columns' own units.
    """
    seen = columns[train]
    known = ~np.isnan(seen)
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, seen, 0).sum(axis=0) / count
    std = np.sqrt((np.where(known, seen - mean, 0) ** 2).sum(axis=0) / count)
    std[std <= 1e-12 * np.abs(mean)] = 1  # constant up to rounding; 0 <= 0 covers a mean of 0
    return np.nan_to_num((columns - mean) / std, nan=0.0).astype(np.float32), mean, std
