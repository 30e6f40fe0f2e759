"""Which layers of a model a method touches: the linear and convolutional ones between its input and its output."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from torch import nn

from leantrain.errors import UsageError

HIDDEN = "hidden"
WITH_MATRIX = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CLASSIFIERS = ("score", "classifier")
Choice = str | Callable[[str, nn.Module], bool]
"""How a user names layers: "hidden", a regular expression searched for in their names, or a test of name and layer."""


def hidden_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear and convolutional layers by name, without the model's output layer and any that is tied to another one.

    These are the layers that low-rank and low-precision methods are made for.
    """
    layers, output = layers_with_matrix(model), output_layer(model)
    users = Counter(id(m.weight) for m in model.modules() if isinstance(getattr(m, "weight", None), nn.Parameter))
    return {name: m for name, m in layers.items() if m is not output and users[id(m.weight)] == 1}


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that makes the model's output, or None.

    It is what `get_output_embeddings()` names where the model has that method (Hugging Face; its classifiers name none,
    and call theirs `score` or `classifier`), otherwise the last linear layer that stands outside every repeated block
    (`nn.ModuleList`, `nn.Sequential`), or the last one of all where every layer is inside one.
    """
    if hasattr(model, "get_output_embeddings"):
        named: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
        classifiers = (getattr(model, name, None) for name in _CLASSIFIERS)
        return named if named is not None else next(filter(None, classifiers), None)
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    blocks = tuple(
        f"{name}." for name, m in model.named_modules() if name and isinstance(m, (nn.ModuleList, nn.Sequential))
    )
    outside = [layer for name, layer in linear.items() if not name.startswith(blocks or ("\0",))]
    last = outside or list(linear.values())
    return last[-1] if last else None


def chosen_linears(model: nn.Module, layers: Choice = HIDDEN) -> dict[str, nn.Module]:
    """The linear layers (Hugging Face's transposed Conv1D counts as one) that `layers` chooses, by name.

    Raises:
        UsageError: `layers` is no regular expression, or chooses no linear layer of the model.
    """
    linears = {name: m for name, m in layers_with_matrix(model).items() if name and is_linear(m)}
    if layers == HIDDEN:
        hidden = hidden_layers(model)
        chosen = {name: m for name, m in linears.items() if name in hidden}
    elif callable(layers):
        chosen = {name: m for name, m in linears.items() if layers(name, m)}
    else:
        try:
            expression = re.compile(layers)
        except re.error as error:
            raise UsageError(f"layers={layers!r} is not a regular expression: {error}") from None
        chosen = {name: m for name, m in linears.items() if expression.search(name)}
    if not chosen:
        raise UsageError(f"layers={layers!r} chooses no linear layer; the model has {', '.join(linears) or 'none'}")
    return chosen


def replace_layer(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `model` has `old` as a part, under every name it goes by."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children would give a shared child once
            if child is old:
                setattr(parent, name, new)


def layers_with_matrix(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear and convolutional layer by name, a shared one under its first."""
    return {name: m for name, m in model.named_modules() if isinstance(m, WITH_MATRIX) or is_transposed(m)}


def is_linear(layer: nn.Module) -> bool:
    """Whether the layer multiplies by one matrix."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def is_transposed(layer: nn.Module) -> bool:
    """Hugging Face's GPT-2 keeps its linear layers in a class of its own, with the weight transposed."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
