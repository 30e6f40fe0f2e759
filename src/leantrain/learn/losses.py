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

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from leantrain.errors import UsageError

Task = Literal["next_token", "classification", "regression"]
TASKS: tuple[str, ...] = get_args(Task)
IGNORED = -100  # PyTorch's and Hugging Face's value for a target that does not count


def mean_loss(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """The batch's mean loss, 0-dim and differentiable."""
    outputs, targets = _aligned(task, outputs, targets)
    if task == "regression":
        return F.mse_loss(outputs, targets)
    return F.cross_entropy(outputs, targets, ignore_index=IGNORED)


def sums(task: Task, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """`loss_sum`, the `count` of its terms and, given classes, how many were `correct`: 0-dim each."""
    outputs, targets = _aligned(task, outputs, targets)
    if task == "regression":
        count = torch.tensor(targets.numel(), device=targets.device)
        return {"loss_sum": F.mse_loss(outputs, targets, reduction="sum"), "count": count}
    return {
        "loss_sum": F.cross_entropy(outputs, targets, ignore_index=IGNORED, reduction="sum"),
        "count": (targets != IGNORED).sum(),
        "correct": (outputs.argmax(-1) == targets).sum(),
    }


def logits_of(outputs: object) -> Tensor:
    """The tensor in what a model returned: itself, or the `.logits` of a Hugging Face output."""
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise UsageError(
            f"a model must return a tensor of logits or an output with .logits, got {type(outputs).__name__}"
        )
    return logits


def _aligned(task: Task, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
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
