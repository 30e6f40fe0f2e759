"""What every learner has: a model, a loss and a number format, and the stations that the loop asks about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leantrain.errors import UsageError, nearest
from leantrain.learn.fitting import fit
from leantrain.learn.losses import Loss, Objective, objective
from leantrain.learn.protocol import Batch, Part, StepResult
from leantrain.ledger import record
from leantrain.modes import evaluation_mode
from leantrain.outputs import logits_of

Precision = Literal["fp32", "bf16"]


class Whole:
    """A learner that trains the whole model from the first step to the last. Write `step` in a subclass.

    Args:
        model: Any module: `model(inputs)` returns logits or an output with `.logits`.
        loss: A task, "next_token", "classification" or "regression", whose loss is then used (see
            `leantrain.learn.losses`); or a function of logits and targets that returns the batch's mean loss.
        precision: "fp32" computes in the parameters' own type; "bf16" runs the forward pass, and with it the
            backward pass, under bfloat16 autocast. Parameters, their gradients and the loss keep their type.

    Raises:
        UsageError: an unknown task or precision, a model without parameters to train, or, in use, outputs and
            targets that do not fit the task.
    """

    stages: int = 1
    stage: int = 0
    completes_late: bool = False
    """Whether a gradient is complete only in `hand_over`, not in one backward pass per batch."""

    def __init__(self, model: nn.Module, loss: Loss, precision: Precision = "fp32") -> None:
        if precision not in get_args(Precision):
            raise UsageError(f"precision {precision!r} is unknown{nearest(str(precision), get_args(Precision))}")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UsageError(f"the model {type(model).__name__} has no parameters to train")
        self.model = model
        self._module = model
        self.objective: Objective = objective(loss)
        self.precision: Precision = precision

    @property
    def module(self) -> nn.Module:
        """What is trained and exchanged: the model, however it is wrapped later."""
        return self._module

    @property
    def parts(self) -> Sequence[Part]:
        """All parameters in one part."""
        return [Part(tuple(param for param in self.module.parameters() if param.requires_grad))]

    def attach(self, attached: nn.Module) -> None:
        """Run `attached` from now on: `module` as an exchange has wrapped it."""
        self.model = attached

    def enter(self, spent: float) -> float:
        """One stage only: the place in the schedule is the place in the run."""
        return spent

    def step(self, batch: Batch, weight: float = 1.0) -> StepResult:
        """Add `weight` * d(mean loss of `batch`)/d(parameter) to every parameter's `.grad`."""
        raise NotImplementedError

    def _backprop(self, batch: Batch, weight: float) -> StepResult:
        """One forward and one backward pass of all of the model."""
        with record.phase("forward"):
            loss = self.objective.mean(self._logits(batch.inputs), batch.targets)
        with record.phase("backward"):
            (loss if weight == 1.0 else loss * weight).backward()
        return StepResult(loss=loss.detach(), examples_used=len(batch))

    def hand_over(self) -> None:
        """Nothing is left to do: the backward pass went through the attached model."""

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """The sums of `losses.sums` over `batch`, in evaluation mode; each module's own mode is put back."""
        with evaluation_mode(self.model):
            return self.objective.sums(self._logits(batch.inputs), batch.targets)

    def fit(
        self, loader: Iterable[Any], optimizer: Callable[[list[nn.Parameter]], Optimizer] = torch.optim.AdamW,
        *, epochs: int = 1, clip: float | None = None,
    ) -> list[float]:  # fmt: skip
        """Train on `loader`, `epochs` times over: `leantrain.learn.fitting.fit` with this learner."""
        return fit(self, loader, optimizer, epochs=epochs, clip=clip)

    def state_dict(self) -> dict[str, Any]:
        """No state: the model and the optimizers have it all."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """No state."""

    def _logits(self, inputs: Tensor) -> Tensor:
        with self._autocast():
            return logits_of(self.model(inputs))

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "fp32":
            return nullcontext()
        # Asked at every step, because a model may be moved after its learner was made.
        device_type = next(self.model.parameters()).device.type
        return torch.autocast(device_type, dtype=torch.bfloat16)
