"""Any optimizer, one parameter at a time: its step, with groups that hold that parameter alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from leantrain.errors import UsageError

_Changes = list[dict[str, tuple[Any, Any]]]


class OneByOne:
    """Steps single parameters of an optimizer that knows only steps of everything.

    Some optimizers count their steps in the parameter group. Such entries are put back between two parameters of one
    step, so that each of them sees the same.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._changes: _Changes | None = None

    def begin(self) -> None:
        """A new step begins, in which every parameter may be stepped once."""
        self._changes = None

    def step(self, param: Tensor, group: int) -> None:
        """Step `param`, a member of the group of this number, by its `.grad`.

        Raises:
            UsageError: the optimizer keeps numbers that depend on which parameter was stepped.
        """
        groups = self._optimizer.param_groups
        self._put_back()
        numbers, members = [_numbers(each) for each in groups], [each["params"] for each in groups]
        try:
            for number, each in enumerate(groups):
                each["params"] = [param] if number == group else []
            self._optimizer.step()
        finally:
            for each, params in zip(groups, members, strict=True):
                each["params"] = params
        changes = [_difference(before, _numbers(each)) for before, each in zip(numbers, groups, strict=True)]
        if self._changes is not None and changes != self._changes:
            keys = sorted({key for each in (*changes, *self._changes) for key in each})
            raise UsageError(
                f"{type(self._optimizer).__name__} keeps {', '.join(keys)} for all of its parameters together, "
                "so they cannot be stepped one at a time"
            )
        self._changes = changes

    def _put_back(self) -> None:
        """Undo what the step of another parameter did to the groups' own entries."""
        for group, changes in zip(self._optimizer.param_groups, self._changes or (), strict=False):
            for key, (before, _) in changes.items():
                if before is None:
                    del group[key]
                else:
                    group[key] = before


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    """The plain numbers of a parameter group, among which an optimizer may keep count."""
    return {key: value for key, value in group.items() if isinstance(value, (int, float))}


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The entries of `after` that are new or not as they were, as (before, after)."""
    return {key: (before.get(key), value) for key, value in after.items() if before.get(key) != value}
