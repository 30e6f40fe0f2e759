"""Cells of a CSV column to numbers a network can use. What is learnt is learnt from the training rows alone."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from leantrain.data.csv_file import CsvFile, is_missing, is_number
from leantrain.data.order import Rows
from leantrain.data.standardise import standardised
from leantrain.errors import UsageError

MAX_CATEGORIES = 256
"""More distinct values than this in a column of words are a text or a key, not categories."""


def encode_features(file: CsvFile, place: int, train: Rows) -> tuple[NDArray[np.float32], list[str]]:
    """One column as features.

    Returns: [N, 1] standardised numbers, or [N, categories] zeros and ones; and a name for each feature.

    Raises:
        UsageError: too many categories, or a cell that does not fit a column of numbers.
    """
    cells = file.column(place)
    known = {cell for cell in {cells[row] for row in train.tolist()} if not is_missing(cell)}
    words = {cell for cell in known if not is_number(cell)}
    name = file.names[place]
    if not words:
        return standardised(_numbers(file, place)[:, None], train)[0], [name]
    categories = sorted(known)
    if len(categories) > MAX_CATEGORIES:
        raise UsageError(
            f"column {name!r} of {file.path} is not numeric ({next(filter(words.__contains__, cells))!r} is no number) "
            f"and has {len(categories)} distinct values, more than the {MAX_CATEGORIES} that are one-hot encoded; "
            f"correct it, or use ignore=[{name!r}]"
        )
    numbers = {category: number for number, category in enumerate(categories)}
    codes = np.array([numbers.get(cell, len(categories)) for cell in cells])
    one_hot = np.eye(len(categories) + 1, len(categories), dtype=np.float32)[codes]  # unknown: the row of zeros
    return one_hot, [f"{name}={category}" for category in categories]


def encode_classes(file: CsvFile, place: int) -> tuple[NDArray[np.int64], list[str]]:
    """The target as [N] int64 class numbers, and the classes' names: in order of value if numeric, else of alphabet.

    Raises:
        UsageError: a cell is missing, all cells are equal, or most differ, as measurements do.
    """
    cells = file.column(place)
    for row, cell in enumerate(cells):
        if is_missing(cell):
            raise UsageError(f"the target is missing at {file.where(row, place)}: {cell!r}")
    numeric = all(map(is_number, set(cells)))
    classes = sorted(set(cells), key=lambda cell: (float(cell) if numeric else 0.0, cell))
    if len(classes) < 2:
        raise UsageError(f"the target {file.names[place]!r} of {file.path} is always {classes[0]!r}")
    if len(classes) > max(2, len(cells) // 2):
        hint = "task='regression'" if numeric else "another target"
        raise UsageError(
            f"the target {file.names[place]!r} of {file.path} has {len(classes)} distinct values in {len(cells)} rows, "
            f"too many for classes; use {hint}"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[cell] for cell in cells], np.int64), classes


def encode_target(file: CsvFile, place: int, train: Rows) -> tuple[NDArray[np.float32], float, float]:
    """The target as [N, 1] float32 standardised numbers, with its mean and std in its own unit.

    Raises:
        UsageError: a cell is missing or no finite number.
    """
    numbers = _numbers(file, place)
    missing = np.flatnonzero(np.isnan(numbers))
    if len(missing):
        raise UsageError(f"the target is missing at {file.where(int(missing[0]), place)}")
    targets, mean, std = standardised(numbers[:, None], train)
    return targets, mean.item(), std.item()


def _numbers(file: CsvFile, place: int) -> NDArray[np.float64]:
    """One column as [N] float64, NaN where missing."""
    cells = file.column(place)
    values = {cell: _value(cell) for cell in set(cells)}
    for row, cell in enumerate(cells):
        if values[cell] is None:
            raise UsageError(f"{file.where(row, place)} must be a finite number, got {cell!r}")
    return np.array([values[cell] for cell in cells], np.float64)


def _value(cell: str) -> float | None:
    """A cell's number, NaN if missing, None if it is no finite number."""
    if is_missing(cell):
        return math.nan
    return float(cell) if is_number(cell) and math.isfinite(float(cell)) else None
