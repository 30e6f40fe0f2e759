"""Which parameters a method touches: matrices by name, kind or rule, and groups that hold every parameter once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from leantrain.errors import UsageError
from leantrain.layers import WITH_MATRIX, is_transposed, output_layer

Choice = str | Callable[[str, nn.Module, nn.Parameter], bool]
"""Some of a model's parameters: "hidden", "all-linear", a regular expression searched for in their names, or a rule
that is called with a parameter's name, the module that owns it and the parameter itself."""


def hidden_matrices(model: nn.Module) -> list[str]:
    """Names of the weights of linear and convolutional layers, without the model's output layer.

    These are the matrices that low-rank and orthogonalised updates are made for. Left out are embeddings, norms and
    biases, any weight that is tied to an embedding, what is frozen, and the output layer
    (`leantrain.layers.output_layer`).
    """
    return _matrices(model, WITH_MATRIX)


def all_linear(model: nn.Module) -> list[str]:
    """Names of the weights of linear layers, without the model's output layer: PEFT's "all-linear".

    It is `hidden_matrices` without the convolutions. The two agree on language models; on a network with a
    convolutional front-end only "hidden" takes that. Hugging Face's GPT-2 keeps its linear layers in a `Conv1D` of its
    own, which counts as linear. (`Trainer(optim="galore_adamw")` means another thing by the same word: with the output
    layer, and without GPT-2's.)
    """
    return _matrices(model, (nn.Linear,))


def parameter_groups(
    model: nn.Module, groups: Sequence[dict[str, Any]], *, no_decay: bool | Choice = False
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, described instead of listed.

    Args:
        model: whose trainable parameters are divided. Frozen ones are left out.
        groups: each a dictionary with `"params"` and the options of that group. `"params"` is "hidden" (see
            `hidden_matrices`), "all-linear" (see `all_linear`), a regular expression searched for in the parameters'
            names, or a rule `(name, module, parameter) -> bool`, where `module` is what the parameter belongs to.
        no_decay: what gets `weight_decay=0.0`, whatever its group says. True is the usual choice, Hugging Face's:
            biases and the parameters of normalisation layers. A choice as in `"params"` is another.

    Returns:
        The groups with their parameters as `(name, parameter)` pairs, then a group without options for the parameters
        that no group matched, if there are any. Every trainable parameter is in exactly one. With `no_decay` each is
        followed by its parameters without decay, where it has both kinds.

    Raises:
        UsageError: a group without "params", an invalid expression, one that matches no trainable parameter, or a
            parameter that two groups match.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> [len(group["params"]) for group in parameter_groups(model, [{"params": "hidden", "rank": 2}])]
        [2, 6]
        >>> for group in parameter_groups(model, [{"params": "hidden", "rank": 2}], no_decay=True):
        ...     print([name for name, _ in group["params"]], group.get("weight_decay"))
        ['0.weight', '2.weight'] None
        ['3.weight'] None
        ['0.bias', '1.weight', '1.bias', '2.bias', '3.bias'] 0.0
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    left = dict(trainable)
    taken_by: dict[str, Choice] = {}
    result = []
    for group in groups:
        choice = group.get("params")
        if not isinstance(choice, str) and not callable(choice):
            raise UsageError(
                f"a group needs params: 'hidden', 'all-linear', a regular expression or a rule, got {group!r}"
            )
        names = _chosen(model, choice, list(trainable))
        if not names:
            raise UsageError(
                f"the group params={_shown(choice)} matches no trainable parameter; there are "
                f"{', '.join(trainable) or 'none'}"
            )
        for name in names:
            if name in taken_by:
                raise UsageError(
                    f"parameter {name} is in two groups, params={_shown(taken_by[name])} and "
                    f"params={_shown(choice)}; a parameter may be in one"
                )
            taken_by[name] = choice
        result.append({**group, "params": [(name, left.pop(name)) for name in names]})
    if left:
        result.append({"params": list(left.items())})
    if no_decay is False:
        return result
    spared = set(_chosen(model, _bias_or_norm if no_decay is True else no_decay, list(trainable)))
    return [part for group in result for part in _divided(group, spared)]


def parameters_chosen(model: nn.Module, choice: Choice) -> list[str]:
    """Names of the trainable parameters that `choice`, as in a group's "params", means; perhaps none.

    Raises:
        UsageError: an invalid expression.
    """
    return _chosen(model, choice, [name for name, parameter in model.named_parameters() if parameter.requires_grad])


def _matrices(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    layers = [m for m in model.modules() if isinstance(m, kinds) or is_transposed(m)]
    output = output_layer(model)
    matrices = [id(layer.weight) for layer in layers if layer is not output]
    # A dictionary, because two layers may share one weight.
    return list(dict.fromkeys(names[key] for key in matrices if key in names and key not in embeddings))


_NAMED: dict[str, Callable[[nn.Module], list[str]]] = {"hidden": hidden_matrices, "all-linear": all_linear}


def _chosen(model: nn.Module, choice: Choice, names: list[str]) -> list[str]:
    if callable(choice):
        rule = choice
        return [name for name in names if rule(name, *_owner_and_parameter(model, name))]
    if choice in _NAMED:
        chosen = set(_NAMED[choice](model))
        return [name for name in names if name in chosen]
    try:
        expression = re.compile(choice)
    except re.error as error:
        raise UsageError(f"params={choice!r} is not a regular expression: {error}") from None
    return [name for name in names if expression.search(name)]


def _divided(group: dict[str, Any], spared: set[str]) -> list[dict[str, Any]]:
    """A group as one with decay and one without, empty ones left out."""
    decayed = [(name, parameter) for name, parameter in group["params"] if name not in spared]
    others = [(name, parameter) for name, parameter in group["params"] if name in spared]
    parts = [{**group, "params": decayed}, {**group, "params": others, "weight_decay": 0.0}]
    return [part for part in parts if part["params"]]


def _bias_or_norm(name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
    return "bias" in name.lower() or "norm" in type(module).__name__.lower()


def _owner_and_parameter(model: nn.Module, name: str) -> tuple[nn.Module, nn.Parameter]:
    module = model.get_submodule(name.rpartition(".")[0])
    return module, model.get_parameter(name)


def _shown(choice: Choice) -> str:
    return repr(choice) if isinstance(choice, str) else getattr(choice, "__qualname__", repr(choice))
