"""Learning-rate schedules as functions of the step: a factor on the base learning rate of every group."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from leantrain.errors import UsageError

Kind = Literal["cosine", "linear", "constant"]


def schedule(
    kind: Kind = "cosine", *, steps: int, warmup: float = 0.1, min_ratio: float = 0.1
) -> Callable[[float], float]:
    """Linear warm-up, then a decay that ends at `min_ratio` on the last step.

    Args:
        kind: shape of the decay after the warm-up.
        steps: length of the run, >= 1.
        warmup: fraction of `steps` over which the factor rises from 1 / warm-up steps to 1; in [0, 1).
        min_ratio: the factor at the end, in [0, 1]; "constant" has no use for it.

    Returns:
        `factor(step)` for step = 0 .. steps - 1, fit for `torch.optim.lr_scheduler.LambdaLR`. A fractional step is
        allowed (a run whose budget is seconds has no whole ones); beyond the end the factor stays at its last value.

    Raises:
        UsageError: an unknown kind or a value outside its range.

    Examples:
        >>> factor = schedule("cosine", steps=100, warmup=0.1, min_ratio=0.1)
        >>> [round(factor(step), 3) for step in (0, 9, 54, 99)]
        [0.1, 1.0, 0.55, 0.1]
    """
    if kind not in _DECAYS:
        raise UsageError(f"schedule must be one of {', '.join(_DECAYS)}, got {kind!r}")
    if steps < 1 or not 0 <= warmup < 1 or not 0 <= min_ratio <= 1:
        raise UsageError(
            f"need steps >= 1, warmup in [0, 1) and min_ratio in [0, 1], "
            f"got steps={steps}, warmup={warmup}, min_ratio={min_ratio}"
        )
    rise = round(warmup * steps)
    decay = _DECAYS[kind]

    def factor(step: float) -> float:
        if step < rise:
            return (step + 1) / rise
        # The peak is reached on step `rise - 1`, the floor on step `steps - 1`.
        progress = min(1.0, (step + 1 - rise) / max(1, steps - rise)) if rise else min(1.0, step / max(1, steps - 1))
        return min_ratio + (1 - min_ratio) * decay(progress) if kind != "constant" else 1.0

    return factor


_DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
