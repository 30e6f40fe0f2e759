"""Checks that an optimizer, ours or anybody's, keeps the promises that users of PyTorch rely on.

`check_optimizer(MyOptimizer, {"lr": 1e-2}, ...)` runs them all and raises one error that lists what failed;
`parametrize_with_checks([OptimizerCase(...), ...])` makes each of them a pytest test. docs/testing.md says what each
check asks for.
"""

from leantrain.testing.case import NotApplicable, OptimizerCase, Twin
from leantrain.testing.checker import (
    BoundCheck,
    Report,
    check_optimizer,
    optimizer_checks,
    parametrize_with_checks,
    run_checks,
)
from leantrain.testing.checks import OPTIMIZER_CHECKS

__all__ = [
    "OPTIMIZER_CHECKS",
    "BoundCheck",
    "NotApplicable",
    "OptimizerCase",
    "Report",
    "Twin",
    "check_optimizer",
    "optimizer_checks",
    "parametrize_with_checks",
    "run_checks",
]
