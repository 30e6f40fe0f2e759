"""Checks of the sizes a model is asked for and of the inputs it is given, and how large it turned out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leantrain.errors import UsageError


def num_parameters(model: nn.Module) -> int:
    """How many numbers `model` learns; a tensor used in two places counts once. Works on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters())


def require_sizes(**sizes: object) -> None:
    """Raise UsageError for the first of `sizes` that is not an integer >= 1, by its name."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UsageError(f"{name} must be an integer >= 1, got {name}={size!r}")


def require_multiple(name: str, size: int, divisor_name: str, divisor: int) -> None:
    """Raise UsageError unless `size` can be cut into `divisor` equal parts (or parts of that size)."""
    if size % divisor:
        allowed = ", ".join(str(d) for d in range(1, size + 1) if size % d == 0)
        raise UsageError(
            f"{name} must be a multiple of {divisor_name}, got {name}={size} and {divisor_name}={divisor} "
            f"(allowed {divisor_name} for {name}={size}: {allowed})"
        )


def require_tokens(inputs: Tensor, context: int | None) -> None:
    """Raise UsageError unless `inputs` are token ids [B, T] with T <= context (None: of any length)."""
    if inputs.dtype not in (torch.int64, torch.int32) or inputs.ndim != 2:
        raise UsageError(
            f"inputs must be token ids of shape [batch, time] and dtype int64 or int32, {_describe(inputs)}"
        )
    if context is not None and inputs.shape[1] > context:
        raise UsageError(
            f"inputs must be at most context={context} tokens long, {_describe(inputs)}; "
            "give shorter inputs or build the model with a larger context"
        )


def require_images(inputs: Tensor, channels: int, image_size: int | None = None) -> None:
    """Raise UsageError unless `inputs` are float images [B, channels, H, W]; given `image_size`, H = W = that."""
    fits = inputs.ndim == 4 and inputs.shape[1] == channels
    if fits and image_size is not None:
        fits = inputs.shape[2] == inputs.shape[3] == image_size
    if not fits or not inputs.is_floating_point():
        sides = "height, width" if image_size is None else f"{image_size}, {image_size}"
        raise UsageError(
            f"inputs must be floating-point images of shape [batch, {channels}, {sides}], {_describe(inputs)}"
        )


def require_features(inputs: Tensor, features: int) -> None:
    """Raise UsageError unless each of the float `inputs` [B, ...] holds `features` numbers."""
    if inputs.shape[1:].numel() != features or inputs.ndim < 2 or not inputs.is_floating_point():
        raise UsageError(
            f"inputs must be floating-point with features={features} numbers per example, {_describe(inputs)}"
        )


def _describe(inputs: Tensor) -> str:
    return f"got shape {list(inputs.shape)} and dtype {str(inputs.dtype).removeprefix('torch.')}"
