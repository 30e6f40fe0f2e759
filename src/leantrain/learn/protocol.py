"""What a learner is: the part of a training step between a batch and the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn


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


@dataclass(frozen=True)
class Part:
    """Parameters that one loss trains: they are clipped together, and may have a learning rate of their own."""

    params: tuple[nn.Parameter, ...]
    rate: float = 1.0
    """What the optimizer's learning rate is multiplied with."""


class Link(Protocol):
    """What joins a learner that trains one block of the model to the processes that train the others.

    A learner that can be joined has `join(link)`, which returns, for each block, the tensors that training changes.
    """

    block: int
    """Which block, from 0."""
    blocks: int
    """Of how many."""

    def receive(self) -> Tensor:
        """The output of the block before, [B, ...] on the CPU, for the next micro-batch; not asked for block 0."""
        ...

    def send(self, features: Tensor) -> None:
        """Pass the block's output on, [B, ...] on any device; not called for the last block."""
        ...


class Learner(Protocol):
    """A way to fill `.grad` from a batch: the stations of a step, in the order in which they are called.

    `leantrain.learn.Whole` has a default for everything but `step`: write a subclass.
    """

    model: nn.Module
    """What is run: the model, or `module` as an exchange has wrapped it."""
    stages: int
    """How many there are in a run; in each something else is trained."""
    stage: int
    """Changes when something else is to be trained from now on, so that optimizers have to be made anew."""
    completes_late: bool
    """Whether a gradient is complete only in `hand_over`, not in one backward pass per batch."""

    @property
    def module(self) -> nn.Module:
        """What is trained and exchanged: the model, with what the method adds to it. What is not trained in this
        stage does not require gradients."""
        ...

    @property
    def parts(self) -> Sequence[Part]:
        """Every parameter that is trained in this stage, once."""
        ...

    def attach(self, attached: nn.Module) -> None:
        """Get to know `module` as an exchange has wrapped it; called once, before the first step."""
        ...

    def enter(self, spent: float) -> float:
        """Called before every step: which part of the run's budget is spent, from 0 up to (not including) 1.

        Returns:
            Where in its learning-rate schedule the stage is that is trained now, in the same measure.
        """
        ...

    def step(self, batch: Batch, weight: float = 1.0) -> StepResult:
        """Add `weight` * d(mean loss of `batch`)/d(parameter) to every parameter's `.grad`.

        With n equal micro-batches, weight=1/n makes their sum the gradient of the whole batch's mean loss.
        """
        ...

    def hand_over(self) -> None:
        """After a step's last micro-batch: give the exchange what is in `.grad`, if no backward pass of the attached
        module has."""
        ...

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over a held-out batch, changing nothing: `loss_sum`, `count` and, where there are classes,
        `correct`; of further outputs the same, each name behind the output's and a slash.

        `loss_sum` / `count`, each added up over batches first, is the mean loss.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the model and the optimizers do not have: nested dicts and lists of tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        ...
