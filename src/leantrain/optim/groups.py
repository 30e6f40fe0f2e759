"""Which parameters a method touches: hidden matrices, name patterns, and groups that hold every parameter once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from leantrain.errors import UsageError

HIDDEN = "hidden"
_WITH_MATRIX = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def hidden_matrices(model: nn.Module) -> list[str]:
    """Names of the weights of linear and convolutional layers, without the model's output layer.

    These are the matrices that low-rank and orthogonalised updates are made for. Left out are embeddings, norms and
    biases, any weight that is tied to an embedding, and the output layer: what `get_output_embeddings()` names where
    the model has that method (Hugging Face), otherwise the last linear layer that stands outside every repeated block
    (`nn.ModuleList`, `nn.Sequential`), or the last one of all where every layer is inside one.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, _WITH_MATRIX) or _is_hf_conv1d(m)]
    output = _output_layer(model, layers)
    return [
        f"{name}.weight" if name else "weight"
        for name, layer in layers
        if layer is not output and id(layer.weight) not in embeddings and layer.weight.requires_grad
    ]


def parameter_groups(model: nn.Module, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, described by names instead of tensors.

    Args:
        model: whose trainable parameters are divided.
        groups: each a dictionary with `"params"`, either "hidden" (see `hidden_matrices`) or a regular expression
            searched for in the parameters' names, and the options of that group. A parameter goes to the first group
            that matches it.

    Returns:
        The groups with their parameters as `(name, parameter)` pairs, then a group without options for the parameters
        that no group matched, if there are any. Every trainable parameter is in exactly one.

    Raises:
        UsageError: a group without "params", an invalid expression, or one that matches no parameter that is left.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> [len(group["params"]) for group in parameter_groups(model, [{"params": "hidden", "rank": 2}])]
        [2, 6]
    """
    left = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    result = []
    for group in groups:
        if not isinstance(group.get("params"), str):
            raise UsageError(f"a group needs params: 'hidden' or a regular expression, got {group!r}")
        names = _matching(model, group["params"], list(left))
        if not names:
            raise UsageError(
                f"the group params={group['params']!r} matches no trainable parameter that is left; "
                f"left are {', '.join(left) or 'none'}"
            )
        result.append({**group, "params": [(name, left.pop(name)) for name in names]})
    if left:
        result.append({"params": list(left.items())})
    return result


def _matching(model: nn.Module, pattern: str, names: list[str]) -> list[str]:
    if pattern == HIDDEN:
        hidden = set(hidden_matrices(model))
        return [name for name in names if name in hidden]
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"params={pattern!r} is not a regular expression: {error}") from None
    return [name for name in names if expression.search(name)]


def _output_layer(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> nn.Module | None:
    if hasattr(model, "get_output_embeddings"):
        named: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
        return named
    linear = [(name, layer) for name, layer in layers if isinstance(layer, nn.Linear)]
    blocks = tuple(
        f"{name}." for name, m in model.named_modules() if name and isinstance(m, (nn.ModuleList, nn.Sequential))
    )
    outside = [layer for name, layer in linear if not name.startswith(blocks or ("\0",))]
    last = outside or [layer for _, layer in linear]
    return last[-1] if last else None


def _is_hf_conv1d(module: nn.Module) -> bool:
    """Hugging Face's GPT-2 keeps its linear layers in a class of its own, with the weight transposed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
