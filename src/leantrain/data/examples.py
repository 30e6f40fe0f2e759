"""Examples that lie in arrays, one row each: what tables and images have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leantrain.data.order import Rows, eval_rows, split_rows, train_rows
from leantrain.data.protocol import Batch, Spec, Task
from leantrain.errors import RunError, UsageError


@dataclass(frozen=True)
class Table:
    """Inputs and targets by row, and which rows are trained on and which are held out.

    Args:
        inputs: [N, ...], float32 features or uint8 pixels; may be a memory map.
        targets: [N] int64 classes in [0, classes), or [N, outputs] float32.
        train: [n] int64 rows to train on.
        held_out: [m] int64 rows to evaluate on; none of them in `train`.
    """

    inputs: NDArray[Any]
    targets: NDArray[Any]
    train: Rows
    held_out: Rows

    @staticmethod
    def of_parts(
        inputs: NDArray[Any],
        targets: NDArray[Any],
        test: tuple[NDArray[Any], NDArray[Any]] | None,
        held_out: float | None,
        default: float = 0.1,
    ) -> Table:
        """The usual choice of a held-out part.

        Args:
            inputs, targets: the training part.
            test: inputs and targets of the published test part, if there is one.
            held_out: None for the test part, where there is one; or the fraction of the training part to hold out,
                which leaves the test part untouched for one last measurement.
            default: the fraction when `held_out` is None and there is no test part.
        """
        if held_out is None and test is not None:
            together = np.concatenate([inputs, test[0]]), np.concatenate([targets, test[1]])
            return Table(*together, np.arange(len(inputs)), np.arange(len(inputs), len(together[0])))
        return Table(inputs, targets, *split_rows(len(inputs), default if held_out is None else held_out))


class Examples:
    """Batches of rows of a table. An id is a row's number, and stays with it whatever is held out.

    Args:
        table: the rows.
        task: "classification" (`classes` is needed) or "regression".
        spec: what a model needs to know, in the names of the models' arguments.
        name: of the data, for errors.

    Raises:
        UsageError: a side has no rows.
        RunError: a class is outside [0, classes), or a number is not finite.
    """

    def __init__(self, table: Table, task: Task, spec: Spec, name: str) -> None:
        self.task = task
        self.spec = spec
        self.table = table
        for side, rows in (("training", table.train), ("held-out", table.held_out)):
            if len(rows) == 0:
                raise UsageError(f"the {side} part of {name} has no examples")
        _check_targets(table.targets, task, spec, name)
        if table.inputs.dtype.kind == "f" and not np.isfinite(table.inputs).all():
            row = int(np.argwhere(~np.isfinite(table.inputs))[0][0])
            raise RunError(f"example {row} of {name} holds a number that is not finite (NaN or infinite)")

    @property
    def train_size(self) -> int:
        """Number of rows that are trained on."""
        return len(self.table.train)

    def train_batch(self, seed: int, step: int, size: int) -> Batch:
        """The rows of `step`: each row once per epoch, in an order drawn from (seed, epoch).

        Raises:
            UsageError: size is not in [1, train_size], or seed or step is negative.
        """
        rows = self.table.train[train_rows(self.train_size, seed, step, size)]
        batch = self._batch(rows)
        return Batch(self.augmented(batch.inputs, seed, step), batch.targets, batch.ids)

    def eval_batches(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out rows in their own order, at most `limit` batches of `size`; the last may be smaller. Rows that
        are left out for the limit are left out evenly, because many data sets are sorted by class."""
        held_out = self.table.held_out
        wanted = len(held_out) if limit is None else size * limit
        if 0 < wanted < len(held_out):
            held_out = held_out[np.arange(wanted) * len(held_out) // wanted]
        return (self._batch(held_out[rows]) for rows in eval_rows(len(held_out), size, limit))

    def prepared(self, inputs: NDArray[Any]) -> Tensor:
        """Rows [B, ...] as they are stored to what a model sees. Images are normalised here, by the batch."""
        return torch.from_numpy(inputs)

    def augmented(self, inputs: Tensor, seed: int, step: int) -> Tensor:
        """A training batch's inputs, changed at random as a pure function of (seed, step). Here: unchanged."""
        return inputs

    def _batch(self, rows: Rows) -> Batch:
        inputs = self.prepared(self.table.inputs[rows])
        return Batch(inputs, torch.from_numpy(self.table.targets[rows]), torch.from_numpy(rows))


def _check_targets(targets: NDArray[Any], task: Task, spec: Spec, name: str) -> None:
    if task == "regression":
        if not np.isfinite(targets).all():
            row = int(np.argwhere(~np.isfinite(targets))[0][0])
            raise RunError(f"the target of example {row} of {name} is not finite (NaN or infinite)")
        return
    classes = spec["classes"]
    assert isinstance(classes, int)
    wrong = np.flatnonzero((targets < 0) | (targets >= classes))
    if len(wrong):
        row = int(wrong[0])
        raise RunError(f"example {row} of {name} has class {targets[row]}, but classes are 0 to {classes - 1}")
