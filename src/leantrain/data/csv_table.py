"""Tables in CSV files: numbers standardised, categories one-hot, everything learnt from the training rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from leantrain.data.columns import encode_classes, encode_features, encode_target
from leantrain.data.csv_file import CsvFile, read_csv
from leantrain.data.examples import Examples, Table
from leantrain.data.order import Rows, split_rows
from leantrain.data.protocol import Spec
from leantrain.errors import UsageError, nearest

TASKS = ("classification", "regression")


class Csv(Examples):
    """One target column, predicted from all others.

    A column whose known cells are all numbers is standardised; any other becomes one feature of 0 or 1 per value that
    training rows hold (another value, met later, is zeros). An empty cell, `?`, `NA`, `N/A`, `NaN` or `null`, in any
    case of letters, is missing: it becomes the mean of a column of numbers, zeros in one of words.

    Args:
        path: the CSV file, UTF-8.
        target: the column to predict, by name or by place (0 is the first, -1 the last).
        task: "classification" numbers the target's distinct values (`class_names`); "regression" standardises it
            (`target_mean` and `target_std` lead back to its unit).
        header: whether the first row holds names; None takes it for names unless one of its cells is a number.
        ignore: columns to leave out, by name or place.
        held_out: fraction of the rows to hold out, in (0, 1); None is 0.2, unless there is a `held_out_path`.
        held_out_path: a second file with the same columns to evaluate on, for sets published in two parts. A full
            stop after its class names, as in UCI's Adult, is dropped if that makes them known.
        delimiter: the character between cells; spaces around cells are dropped.

    Raises:
        UsageError: an argument is not allowed, a column or file is not there, or a cell cannot be used.
        RunError: a file is damaged: rows of different lengths, an unclosed quote, not UTF-8.
    """

    def __init__(
        self,
        path: str,
        target: int | str = -1,
        task: Literal["classification", "regression"] = "classification",
        header: bool | None = None,
        ignore: Sequence[int | str] = (),
        held_out: float | None = None,
        held_out_path: str | None = None,
        delimiter: str = ",",
    ) -> None:
        if task not in TASKS:
            raise UsageError(f"unknown task {task!r}{nearest(str(task), TASKS)}")
        file = read_csv(Path(path).expanduser(), header, delimiter)
        aim = file.place(target, "target")
        if held_out_path is None:
            train, held = split_rows(len(file.rows), 0.2 if held_out is None else held_out)
        elif held_out is not None:
            raise UsageError(f"held_out={held_out} and held_out_path={held_out_path!r} exclude each other; give one")
        else:
            more = read_csv(Path(held_out_path).expanduser(), header, delimiter)
            train, held, file = _followed_by(file, more, aim if task == "classification" else None)
        left_out = {aim, *(file.place(column, "ignore") for column in ignore)}
        blocks = [encode_features(file, place, train) for place in range(len(file.names)) if place not in left_out]
        if not blocks:
            raise UsageError(f"{path} has no column besides the target and the ignored ones")
        features = np.concatenate([block for block, _ in blocks], axis=1)
        self.feature_names = [name for _, names in blocks for name in names]
        spec: Spec = {"features": features.shape[1]}
        targets: NDArray[Any]
        if task == "regression":
            targets, self.target_mean, self.target_std = encode_target(file, aim, train)
            spec["outputs"] = 1
        else:
            targets, self.class_names = encode_classes(file, aim)
            spec["classes"] = len(self.class_names)
        super().__init__(Table(features, targets, train, held), task, spec, path)


def _followed_by(first: CsvFile, second: CsvFile, classes_at: int | None) -> tuple[Rows, Rows, CsvFile]:
    """Two files as one: the rows of the first, those of the second, and both together.

    Raises:
        UsageError: their columns differ, or the second has a class (column `classes_at`) that the first has not.
    """
    if first.names != second.names:
        raise UsageError(f"{second.path} has the columns {second.names}, but {first.path} has {first.names}")
    rows = second.rows
    if classes_at is not None:
        known = set(first.column(classes_at))
        rows = [_with_known_class(row, classes_at, known) for row in rows]
        for number, row in enumerate(rows):
            label = row[classes_at]
            if label not in known:
                where = second.where(number, classes_at)
                raise UsageError(f"{where}: class {label!r} is not in {first.path}{nearest(label, known)}")
    count = len(first.rows)
    both = CsvFile(first.path, first.names, first.rows + rows, first.origins + second.origins)
    return np.arange(count), np.arange(count, count + len(rows)), both


def _with_known_class(row: list[str], place: int, known: set[str]) -> list[str]:
    label = row[place]
    if label in known or label.removesuffix(".") not in known:
        return row
    return [*row[:place], label.removesuffix("."), *row[place + 1 :]]
