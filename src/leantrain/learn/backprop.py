"""Backpropagation: the learner every other one is compared with.

    grad += weight * d(mean loss) / d(parameter)

found by one forward and one backward pass of the whole network. Source: Rumelhart, Hinton & Williams 1986.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from leantrain.errors import UsageError, nearest
from leantrain.learn.losses import TASKS, Task, logits_of, mean_loss, sums
from leantrain.learn.protocol import Batch, StepResult
from leantrain.ledger import record

Precision = Literal["fp32", "bf16"]


class Backprop:
    """Fills `.grad` by backpropagation.

    Args:
        model: Any module: `model(inputs)` returns logits or an output with `.logits`. It may be wrapped (DDP,
            FSDP2) or compiled.
        task: "next_token", "classification" or "regression"; decides the loss (see `leantrain.learn.losses`).
        precision: "fp32" computes in the parameters' own type; "bf16" runs the forward pass, and with it the
            backward pass, under bfloat16 autocast. Parameters, their gradients and the loss keep their type.

    Raises:
        UsageError: an unknown task or precision, a model without parameters to train, or, in use, outputs and
            targets that do not fit the task.

    Examples:
        learner = Backprop(model, "next_token")
        result = learner.step(batch)
        optimizer.step()
    """

    def __init__(self, model: nn.Module, task: Task, precision: Precision = "fp32") -> None:
        if task not in TASKS:
            raise UsageError(f"task {task!r} is unknown{nearest(str(task), TASKS)}")
        if precision not in get_args(Precision):
            raise UsageError(f"precision {precision!r} is unknown{nearest(str(precision), get_args(Precision))}")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UsageError(f"the model {type(model).__name__} has no parameters to train")
        self.model = model
        self.task: Task = task
        self.precision: Precision = precision

    def step(self, batch: Batch, weight: float = 1.0) -> StepResult:
        """Add `weight` * d(mean loss) to every parameter's `.grad`; weight=1 is exactly `loss.backward()`."""
        with record.phase("forward"):
            loss = mean_loss(self.task, self._logits(batch.inputs), batch.targets)
        with record.phase("backward"):
            (loss if weight == 1.0 else loss * weight).backward()
        return StepResult(loss=loss.detach(), examples_used=len(batch))

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """The sums of `losses.sums` over `batch`, in evaluation mode; each module's own mode is put back."""
        with _evaluation_mode(self.model):
            return sums(self.task, self._logits(batch.inputs), batch.targets)

    def _logits(self, inputs: Tensor) -> Tensor:
        with self._autocast():
            return logits_of(self.model(inputs))

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "fp32":
            return nullcontext()
        # Asked at every step, because a model may be moved after its learner was made.
        device_type = next(self.model.parameters()).device.type
        return torch.autocast(device_type, dtype=torch.bfloat16)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for the block; then each module's own mode again, so that frozen ones stay frozen."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
