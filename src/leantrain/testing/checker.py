"""Running the checks: all at once with a report, or one by one as pytest tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

from torch import Tensor
from torch.optim import Optimizer

from leantrain.errors import UsageError, nearest
from leantrain.testing.case import OptimizerCase, Twin
from leantrain.testing.checks import OPTIMIZER_CHECKS

if TYPE_CHECKING:
    import pytest


def check_optimizer(
    optimizer_class: Callable[..., Optimizer],
    settings: Mapping[str, Any],
    *,
    knobs: Mapping[str, Any] | None = None,
    switches: Mapping[str, Any] | None = None,
    untested: Mapping[str, str] | None = None,
    bad: Sequence[tuple[Mapping[str, Any], str | Sequence[str]]] = (),
    twin: Callable[..., Twin] | None = None,
    predicted_bytes: Callable[[list[Tensor], Mapping[str, Any]], int] | None = None,
    off_equals: tuple[Mapping[str, Any], Callable[[list[Tensor]], Optimizer]] | None = None,
    matrices_only: bool = False,
    trains_below: float = 0.5,
    skips: Mapping[str, str] | None = None,
) -> Report:
    """Check that an optimizer, anybody's, does what users of PyTorch rely on. Takes five to ten seconds.

    Args:
        optimizer_class: the class, or a function called as `optimizer_class(params, **settings)`.
        settings: the settings to check it with; must contain `lr`. For the other arguments see `OptimizerCase`.

    Returns:
        A report: what passed, and what was skipped and why.

    Raises:
        AssertionError: one error that lists every check that failed, each with its reason.
        UsageError: `skips` names a check that does not exist.

    Examples:
        >>> import torch
        >>> report = check_optimizer(
        ...     torch.optim.Adadelta, {"lr": 1.0},
        ...     knobs={"lr": 0.5, "rho": 0.5, "eps": 1e-2, "weight_decay": 0.1},
        ...     switches={"foreach": True},
        ...     untested={"capturable": "needs a GPU", "differentiable": "for meta-learning"},
        ... )
        >>> report.failed
        {}
    """
    case = OptimizerCase(
        name=getattr(optimizer_class, "__name__", repr(optimizer_class)),
        optimizer_class=optimizer_class,
        settings=settings,
        knobs=knobs or {},
        switches=switches or {},
        untested=untested or {},
        bad=bad,
        twin=twin,
        predicted_bytes=predicted_bytes,
        off_equals=off_equals,
        matrices_only=matrices_only,
        trains_below=trains_below,
        skips=skips or {},
    )
    report = run_checks(case)
    if report.failed:
        raise AssertionError(str(report))
    return report


@dataclass
class Report:
    """What the checks found about one optimizer."""

    name: str
    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """{check: reason}"""
    skipped: dict[str, str] = field(default_factory=dict)
    """{check: reason}"""

    def __str__(self) -> str:
        counts = f"{len(self.failed)} checks failed, {len(self.passed)} passed, {len(self.skipped)} skipped"
        lines = [f"{self.name}: {counts}"]
        lines += [f"  failed   {name}: {reason}" for name, reason in self.failed.items()]
        lines += [f"  skipped  {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class BoundCheck:
    """One check of one case, ready to be called. Raises AssertionError (or what the optimizer raises) when it fails."""

    case: OptimizerCase
    name: str

    def __call__(self) -> None:
        if self.name in self.case.skips:
            raise SkipTest(self.case.skips[self.name])
        OPTIMIZER_CHECKS[self.name](self.case)

    def __str__(self) -> str:
        return f"{self.case.name}-{self.name}"


def optimizer_checks(case: OptimizerCase) -> Iterator[BoundCheck]:
    """Every check of the case, one by one; those that do not apply raise `unittest.SkipTest` when called.

    Raises:
        UsageError: `case.skips` names a check that does not exist.
    """
    for name in case.skips:
        if name not in OPTIMIZER_CHECKS:
            hint = nearest(name, OPTIMIZER_CHECKS)
            raise UsageError(f"skips of case {case.name!r} name an unknown check {name!r}{hint}")
    return (BoundCheck(case, name) for name in OPTIMIZER_CHECKS)


def run_checks(case: OptimizerCase, only: Iterable[str] = OPTIMIZER_CHECKS) -> Report:
    """Run the checks of a case (or `only` those named) and report, without raising for what fails."""
    report, wanted = Report(case.name), set(only)
    for check in optimizer_checks(case):
        if check.name not in wanted:
            continue
        try:
            check()
        except SkipTest as reason:
            report.skipped[check.name] = str(reason)
        except AssertionError as error:
            report.failed[check.name] = str(error)
        except Exception as error:  # an optimizer may raise anything, and the other checks still have to run
            report.failed[check.name] = f"{type(error).__name__}: {error}"
        else:
            report.passed.append(check.name)
    return report


def parametrize_with_checks(cases: Iterable[OptimizerCase]) -> pytest.MarkDecorator:
    """Decorator that makes each check of each case a pytest test of its own, called with the argument `check`.

    Examples:
        @parametrize_with_checks([OptimizerCase(name="mine", optimizer_class=Mine, settings={"lr": 1e-2})])
        def test_my_optimizer(check):
            check()
    """
    import pytest

    checks = [check for case in cases for check in optimizer_checks(case)]
    return pytest.mark.parametrize("check", checks, ids=str)
