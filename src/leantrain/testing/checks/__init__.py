"""The checks themselves: functions of one OptimizerCase, named as the sentence they verify, grouped by idea."""

from __future__ import annotations

from collections.abc import Callable

from leantrain.testing.case import OptimizerCase
from leantrain.testing.checks import arguments, loop, numerics, options, processes, state, wrappers

Check = Callable[[OptimizerCase], None]

OPTIMIZER_CHECKS: dict[str, Check] = {
    check.__name__: check
    for module in (numerics, arguments, options, state, loop, wrappers, processes)
    for check in module.CHECKS
}
"""Every check by its name, in the order in which a reader wants to hear of failures."""
