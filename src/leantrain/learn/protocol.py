"""What a learner is: the part of a training step between a batch and the gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


class Batch(Protocol):
    """What a learner reads of a batch: B examples."""

    @property
    def inputs(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class StepResult:
    """What a learner says of one batch. Its tensors are detached: keeping a result keeps no graph alive."""

    loss: Tensor
    """Mean loss of the batch: 0-dim, not multiplied by `weight`, still on the model's device."""
    examples_used: int
    """Examples that contributed to the gradient."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """What else the method has to say of the batch, by name: 0-dim tensors."""


class Learner(Protocol):
    """A way to fill `.grad` from a batch."""

    def step(self, batch: Batch, weight: float = 1.0) -> StepResult:
        """Add `weight` * d(mean loss of `batch`)/d(parameter) to every parameter's `.grad`.

        With n equal micro-batches, weight=1/n makes their sum the gradient of the whole batch's mean loss.
        """
        ...

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over a held-out batch, changing nothing: `loss_sum`, `count` and, where there are classes,
        `correct`.

        `loss_sum` / `count`, each added up over batches first, is the mean loss.
        """
        ...
