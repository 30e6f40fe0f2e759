"""From the description to the objects: data, model, optimizers, learner, exchange.

Classes are imported here without asking again whether they may be: a recipe that came from a file was checked when it
was read, and one made in Python is the user's own code. torch is imported when something is built and not before, so
that printing help does not wait for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from leantrain.errors import LeantrainError, UsageError, nearest
from leantrain.recipe.arguments import arguments_of, check_arguments, check_plain, convert
from leantrain.recipe.locate import TRUSTED, is_huggingface_config, locate
from leantrain.recipe.schema import Component, Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from leantrain.data.protocol import Data
    from leantrain.exchange.protocol import Exchange
    from leantrain.learn.losses import Loss
    from leantrain.learn.protocol import Learner, Part

_OTHER_NAMES = {"max_position_embeddings": "context"}
"""What arguments of transformers' configurations are called in `data.spec`."""
_SAMPLE = 2
"""Examples that a learner looks at a model with."""
_AT_LEAST = ("vocab_size", "context", "classes")
"""Sizes of which a model may have more than the data use, but not fewer."""


def build_data(recipe: Recipe) -> Data:
    """The data of a recipe."""
    return construct("data", *_checked("data", recipe.data))


def build_model(recipe: Recipe, data: Data) -> nn.Module:
    """The model of a recipe, on the CPU, its initial weights decided by `recipe.seed` alone.

    Constructor arguments that the recipe leaves out are taken from `data.spec` where it has their name, for instance
    `vocab_size`. The caller's random state is left as it was.
    """
    import torch

    cls = locate("model", recipe.model.class_path)
    args = check_arguments(cls, "model", _filled(cls, recipe.model.init_args, data.spec), complete=True)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = construct("model", cls, args)
        if is_huggingface_config(cls):
            from leantrain.nn.huggingface import from_config

            model = from_config(model)
    return model


def build_optimizers(
    recipe: Recipe, model: nn.Module, parts: Sequence[Part] = (), *, staged: bool = False
) -> list[Optimizer]:
    """The optimizer of a recipe, and after it `rest` if there is one. Every trainable parameter is in one group.

    Parameters of a part that has a learning rate of its own are in groups of their own.

    Args:
        model: those of its parameters count that require gradients.
        parts: what has a learning rate of its own.
        staged: whether other parameters are trained at other times, so that a group may have none of these.

    Options that an optimizer declares as `hidden_only` (such as `rank`) go to the hidden matrices alone, unless the
    recipe divides the parameters itself.
    """
    from leantrain.optim.groups import parameter_groups, parameters_chosen

    cls, args, groups = _optimizer(recipe)
    if staged:
        groups = [group for group in groups if parameters_chosen(model, group["params"])]
    described = parameter_groups(model, groups)
    if recipe.rest is None:
        return [_at_rates(construct("optim", cls, args, _by_rate(described, parts)), parts)]
    chosen, left = _by_rate(described[: len(groups)], parts), _by_rate(described[len(groups) :], parts)
    if not left and not staged:
        raise UsageError(f"rest ({recipe.rest.class_path}) has nothing to do: groups take every parameter")
    optimizers = [construct("optim", cls, args, chosen)] if chosen else []
    if left:
        optimizers.append(_rest(recipe.rest, construct("optim", cls, args, chosen or left), left))
    return [_at_rates(optimizer, parts) for optimizer in optimizers]


def build_learner(recipe: Recipe, model: nn.Module, data: Data, sample: Tensor | None = None) -> Learner:
    """What fills `.grad`: the recipe's learner on `model`, for its loss or that of the task that the data name.

    Args:
        sample: inputs on the model's device for a learner that has to look at it; None: two examples of the data.
    """
    import torch

    cls, args = _checked("learn", recipe.learn)
    known, _ = arguments_of(cls)
    if "precision" in known:
        args["precision"] = recipe.precision
    elif recipe.precision != "fp32":
        raise UsageError(f"precision={recipe.precision!r} is not available with learn={recipe.learn.class_path}")
    if "sample" in known:
        if sample is None:
            device = next(model.parameters()).device
            sample = data.train_batch(recipe.seed, 0, _SAMPLE).inputs.to(device)
        args["sample"] = sample
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return construct("learn", cls, args, model, build_loss(recipe, model, data))


def build_loss(recipe: Recipe, model: nn.Module, data: Data) -> Loss:
    """The recipe's loss on the model's device, for outputs and targets of the data's task; without one the task."""
    if recipe.loss is None:
        return data.task
    from leantrain.learn.losses import aligned

    loss = _loss(recipe.loss).to(next(model.parameters()).device)

    def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = loss(*aligned(data.task, outputs, targets))
        if found.dim():
            raise UsageError(f"loss must return the batch's mean, one number; {loss} returns {list(found.shape)}")
        return found

    return mean_loss


def build_exchange(recipe: Recipe) -> Exchange:
    """What joins the gradients of several processes."""
    return construct("exchange", *_checked("exchange", recipe.exchange))


def try_recipe(recipe: Recipe) -> None:
    """Import every class of a recipe and check its arguments; build its optimizers on a 2 x 2 matrix.

    What can be refused is refused here, before data are read and a model is made.
    """
    import torch

    _checked("data", recipe.data)
    _checked("learn", recipe.learn)
    if recipe.loss is not None:
        _loss(recipe.loss)
    # What the recipe leaves out may come from the data.
    _checked("model", recipe.model, complete=False)
    cls, args, groups = _optimizer(recipe)
    construct("exchange", *_checked("exchange", recipe.exchange)).check_optimizer(cls)
    stand_in = torch.nn.Parameter(torch.zeros(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is too large for a 2 x 2 matrix
        _try_optimizers(recipe, cls, args, groups, stand_in)


def _try_optimizers(
    recipe: Recipe, cls: type, args: dict[str, Any], groups: list[dict[str, Any]], stand_in: Tensor
) -> None:
    optimizer = construct("optim", cls, args, [stand_in])
    known, _ = arguments_of(cls)
    for group in groups:
        # As arguments and as options: some constructors only look at their arguments.
        options = {name: value for name, value in group.items() if name != "params"}
        as_arguments = {name: value for name, value in options.items() if name in known}
        construct("optim", cls, args | as_arguments, [{**options, "params": [stand_in]}])
    if recipe.rest is not None:
        _rest(recipe.rest, optimizer, [{"params": [stand_in]}])


def construct(key: str, cls: type, args: Mapping[str, Any], *positional: Any) -> Any:
    """`cls(*positional, **args)`; what the constructor refuses becomes a UsageError with its name and arguments."""
    try:
        return cls(*positional, **args)
    except LeantrainError as error:
        raise type(error)(f"{key}: {error}") from error
    except Exception as error:
        # Any kind: this may be anybody's class. `--debug` shows the cause.
        shown = ", ".join(f"{name}={value!r}" for name, value in args.items())
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{key}: {cls.__qualname__}({shown}) is refused: {reason}") from error


def _by_rate(groups: list[dict[str, Any]], parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Groups divided so that all parameters of a group are at one rate."""
    rates = {id(param): part.rate for part in parts for param in part.params}
    if len(set(rates.values())) < 2:
        return groups
    divided = []
    for group in groups:
        by_rate: dict[float, list[Any]] = {}
        for name, param in group["params"]:
            by_rate.setdefault(rates.get(id(param), 1.0), []).append((name, param))
        divided += [{**group, "params": params} for params in by_rate.values()]
    return divided


def _at_rates(optimizer: Optimizer, parts: Sequence[Part]) -> Optimizer:
    """`optimizer` with the learning rates of its groups multiplied as their parts say."""
    rates = {id(param): part.rate for part in parts for param in part.params}
    for group in optimizer.param_groups:
        rate = rates.get(id(group["params"][0]), 1.0) if group["params"] else 1.0
        if rate != 1.0:
            group["lr"] = group["lr"] * rate
    return optimizer


def _checked(key: str, component: Component, complete: bool = True) -> tuple[type, dict[str, Any]]:
    cls = locate(key, component.class_path)
    return cls, check_arguments(cls, key, component.init_args, complete=complete)


def _filled(cls: type, args: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """`args`, completed by what `spec` says under the names of the constructor's arguments.

    Raises:
        UsageError: `args` gives the model fewer classes, tokens or positions than the data have.
    """
    known, _ = arguments_of(cls)
    offered = {name: spec[word] for name in known if (word := _OTHER_NAMES.get(name, name)) in spec}
    for name, least in offered.items():
        if _OTHER_NAMES.get(name, name) in _AT_LEAST and isinstance(args.get(name), int) and args[name] < least:
            raise UsageError(f"model.{name}={args[name]} is too small: the data need {least}")
    return {**offered, **args}


def _loss(component: Component) -> nn.Module:
    """The module that a recipe's `loss` describes, on the CPU.

    Raises:
        UsageError: it has parameters of its own, which no optimizer would be given.
    """
    loss: nn.Module = construct("loss", *_checked("loss", component))
    if any(True for _ in loss.parameters()):
        raise UsageError(f"loss cannot have parameters to train, {component.class_path} has")
    return loss


def _optimizer(recipe: Recipe) -> tuple[type, dict[str, Any], list[dict[str, Any]]]:
    """The class of `optim`, its arguments, and the parameter groups as it is to be given them."""
    cls, args = _checked("optim", recipe.optim)
    groups = [_checked_group(cls, f"groups[{index}]", group) for index, group in enumerate(recipe.groups)]
    if not groups:
        hidden = {name: args.pop(name) for name in getattr(cls, "hidden_only", ()) if name in args}
        groups = [{"params": "hidden", **hidden}] if hidden else []
    return cls, args, groups


def _checked_group(cls: type, key: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with its options in the types of the constructor's arguments of the same name."""
    known, _ = arguments_of(cls)
    result = {}
    for name, value in group.items():
        check_plain(f"{key}.{name}", value)
        if name in known and name != "params":
            value = convert(f"{key}.{name}", value, known[name].hint, known[name].default)
        # Other packages have options of groups that are not arguments of the constructor.
        elif name != "params" and cls.__module__.split(".")[0] in TRUSTED:
            options = [each for each in known if each != "params"]
            raise UsageError(f"{key}: {cls.__qualname__} has no option {name!r}{nearest(name, options)}")
        result[name] = value
    return result


def _rest(component: Component, optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    cls, args = _checked("rest", component)
    if "lr" not in args:
        if "lr" not in optimizer.defaults:
            raise UsageError(f"rest needs rest.lr: {type(optimizer).__qualname__} has no lr to take over")
        args["lr"] = optimizer.defaults["lr"]
    return construct("rest", cls, args, groups)
