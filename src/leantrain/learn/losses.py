"""The loss of each task, as a mean to train on and as sums to evaluate with.

| task | outputs | targets | loss |
| --- | --- | --- | --- |
| next_token | [B, T, V] | [B, T] int64, already shifted | cross entropy per token, in nats |
| classification | [B, classes] | [B] int64 | cross entropy per example, in nats |
| regression | [B, outputs] | [B, outputs], or [B] for one output; floats | squared error per element |

Losses are computed in at least float32, whatever the outputs are in. A class target of -100 is left out of
sums and means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from leantrain.errors import UsageError, nearest

Task = Literal["next_token", "classification", "regression"]
TASKS: tuple[str, ...] = get_args(Task)
Loss = Task | Callable[[Tensor, Tensor], Tensor]
"""A task, or a function of logits and targets that returns the batch's mean loss."""
IGNORED = -100  # PyTorch's and Hugging Face's value for a target that does not count


@dataclass(frozen=True)
class Objective:
    """What outputs are judged by."""

    mean: Callable[[Tensor, Tensor], Tensor]
    """Of outputs and targets: the batch's mean loss, 0-dim and differentiable."""
    sums: Callable[[Tensor, Tensor], dict[str, Tensor]]
    """Of outputs and targets: `loss_sum`, the `count` of its terms and, given classes, how many were `correct`."""


def objective(loss: Loss) -> Objective:
    """What trains and evaluates by `loss`.

    Raises:
        UsageError: it is neither a task nor a function.
    """
    if callable(loss):
        return Objective(loss, partial(_sums_of, loss))
    if loss not in TASKS:
        raise UsageError(f"task {loss!r} is unknown{nearest(str(loss), TASKS)}")
    return Objective(partial(mean_loss, loss), partial(sums, loss))


def mean_loss(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """The batch's mean loss, 0-dim and differentiable."""
    outputs, targets = aligned(task, outputs, targets)
    if task == "regression":
        return F.mse_loss(outputs, targets)
    return F.cross_entropy(outputs, targets, ignore_index=IGNORED)


def sums(task: Task, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """`loss_sum`, the `count` of its terms and, given classes, how many were `correct`: 0-dim each."""
    outputs, targets = aligned(task, outputs, targets)
    if task == "regression":
        count = torch.tensor(targets.numel(), device=targets.device)
        return {"loss_sum": F.mse_loss(outputs, targets, reduction="sum"), "count": count}
    return {
        "loss_sum": F.cross_entropy(outputs, targets, ignore_index=IGNORED, reduction="sum"),
        "count": (targets != IGNORED).sum(),
        "correct": (outputs.argmax(-1) == targets).sum(),
    }


def _sums_of(loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """As `sums`, for a loss that only tells its mean; given int64 targets, those of classes."""
    classes = targets.dtype == torch.int64 and outputs.shape[:-1] == targets.shape
    count = (targets != IGNORED).sum() if classes else torch.tensor(len(targets), device=targets.device)
    found = {"loss_sum": loss(outputs, targets).detach() * count, "count": count}
    return {**found, "correct": (outputs.argmax(-1) == targets).sum()} if classes else found


def aligned(task: Task, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the shapes the loss functions take, [N, classes] and [N] or twice the same, or a UsageError."""
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if task == "regression":
        if outputs.shape == (*targets.shape, 1):
            outputs = outputs.squeeze(-1)
        # Checked, because a mean over the broadcast [B, 1] and [B] would be a plausible number.
        fits = outputs.shape == targets.shape and targets.is_floating_point()
    else:
        fits = outputs.shape[:-1] == targets.shape and targets.dtype == torch.int64
    if not fits:
        raise UsageError(
            f"{task} takes {_ALLOWED[task]}; got outputs {list(outputs.shape)} and "
            f"{str(targets.dtype).removeprefix('torch.')} targets {list(targets.shape)}"
        )
    if task == "regression":
        return outputs, targets.to(outputs.dtype)  # float64 targets would otherwise make a float64 loss
    return outputs.flatten(0, -2), targets.flatten()


_ALLOWED = {
    "next_token": "outputs [batch, time, vocab_size] and int64 targets [batch, time]",
    "classification": "outputs [batch, classes] and int64 targets [batch]",
    "regression": "outputs and float targets of one shape, or outputs [batch, 1] and targets [batch]",
}
