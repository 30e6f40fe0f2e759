"""What models return."""

from __future__ import annotations

from torch import Tensor

from leantrain.errors import UsageError


def logits_of(outputs: object) -> Tensor:
    """The tensor in what a model returned: itself, or the `.logits` of a Hugging Face output."""
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise UsageError(
            f"a model must return a tensor of logits or an output with .logits, got {type(outputs).__name__}"
        )
    return logits
