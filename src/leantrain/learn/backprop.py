"""Backpropagation: the learner every other one is compared with.

    grad += weight * d(mean loss) / d(parameter)

found by one forward and one backward pass of the whole network. Source: Rumelhart, Hinton & Williams 1986.
"""

from __future__ import annotations

from leantrain.learn.protocol import Batch, StepResult
from leantrain.learn.whole import Whole


class Backprop(Whole):
    """Fills `.grad` by backpropagation. The model may be wrapped (DDP, FSDP2) or compiled.

    Args:
        model, loss, precision: see `Whole`.

    Examples:
        learner = Backprop(model, "next_token")
        result = learner.step(batch)
        optimizer.step()
    """

    def step(self, batch: Batch, weight: float = 1.0) -> StepResult:
        """Add `weight` * d(mean loss) to every parameter's `.grad`; weight=1 is exactly `loss.backward()`."""
        return self._backprop(batch, weight)
