"""A multilayer perceptron: linear layers with an activation between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from leantrain.errors import UsageError, nearest
from leantrain.nn.sizes import require_features, require_sizes

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class MLP(nn.Module):
    """A multilayer perceptron: [B, features] (or images, flattened) in, logits or predictions [B, outputs]
    out.

    Args:
        features: Numbers per example; may be left out when `channels` and `image_size` are given.
        classes: Number of classes, for classification; give this or `outputs`.
        outputs: Number of predicted values, for regression.
        channels: Of square images, of which there are channels * image_size^2 features.
        image_size: Height and width of those images, in pixels.
        hidden: Widths of the hidden layers, first to last; empty for a linear model.
        activation: "relu" or "gelu".

    Weights start normal with variance 2 / fan-in (He et al. 2015, arXiv 1502.01852), those of the head, which
    no activation follows, with 1 / fan-in; biases start at 0.

    Raises:
        UsageError: a size is missing, contradicted or not an integer >= 1; the activation is unknown; in
            `forward`, inputs with another number of features.

    Examples:
        >>> import torch
        >>> MLP(features=64, classes=10)(torch.zeros(5, 64)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        features: int | None = None,
        classes: int | None = None,
        outputs: int | None = None,
        channels: int | None = None,
        image_size: int | None = None,
        *,
        hidden: Sequence[int] = (128, 128),
        activation: Literal["relu", "gelu"] = "relu",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UsageError(f"activation {activation!r} is unknown{nearest(activation, ACTIVATIONS)}")
        self.features = _features(features, channels, image_size)
        self.activation = activation
        require_sizes(**{f"hidden[{i}]": width for i, width in enumerate(hidden)})
        widths = [self.features, *hidden]
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(widths))
        self.head = nn.Linear(widths[-1], _one_of(classes, outputs))
        self.reset_parameters()

    def forward(self, inputs: Tensor) -> Tensor:
        require_features(inputs, self.features)
        h = inputs.flatten(1)
        for layer in self.layers:
            h = ACTIVATIONS[self.activation](layer(h))
        return self.head(h)

    def reset_parameters(self) -> None:
        """Draw the weights again, from torch's global generator."""
        for layer in (*self.layers, self.head):
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if layer is self.head else "relu")
            nn.init.zeros_(layer.bias)


def _features(features: int | None, channels: int | None, image_size: int | None) -> int:
    """What was given, or the size of the images that were described."""
    given = {"features": features, "channels": channels, "image_size": image_size}
    require_sizes(**{name: size for name, size in given.items() if size is not None})
    in_image = None if channels is None or image_size is None else channels * image_size**2
    if features is None and in_image is None:
        raise UsageError("MLP needs features=..., or channels=... and image_size=... for images")
    if features is not None and in_image is not None and features != in_image:
        raise UsageError(f"features must be channels * image_size^2 = {in_image} for these images, got {given}")
    return features or in_image or 0


def _one_of(classes: int | None, outputs: int | None) -> int:
    """The width of the head, whichever of its two names it was given by."""
    if (classes is None) == (outputs is None):
        raise UsageError(
            "MLP needs classes (classification) or outputs (regression), one of the two; "
            f"got classes={classes} and outputs={outputs}"
        )
    if classes is not None:
        require_sizes(classes=classes)
        return classes
    require_sizes(outputs=outputs)
    assert outputs is not None
    return outputs
