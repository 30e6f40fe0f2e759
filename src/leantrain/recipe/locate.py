"""From a dotted path to a class, without trusting whoever wrote the path.

A recipe may come from a stranger. Importing a module runs it, so nothing is imported before its package is known to be
ours, torch, transformers, or one that the person at the keyboard allowed; and what is found must be the kind of class
that its place in the recipe calls for. No other name in a recipe is ever imported.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from leantrain.errors import UsageError

TRUSTED = ("leantrain", "torch", "transformers")
"""Packages whose classes any recipe may name."""


@dataclass(frozen=True)
class Role:
    """What a class must be to stand in one place of a recipe."""

    home: str
    """Package in which a name without dots is looked for."""
    expected: str
    """The requirement, for the error message."""
    accepts: Callable[[type], bool]
    given: tuple[str, ...] = ()
    """Constructor arguments that the program gives; a recipe cannot."""


def _is_optimizer(cls: type) -> bool:
    from torch.optim import Optimizer

    return issubclass(cls, Optimizer)


def _is_model(cls: type) -> bool:
    from torch.nn import Module

    return issubclass(cls, Module) or is_huggingface_config(cls)


def _is_loss(cls: type) -> bool:
    from torch.nn import Module

    if not issubclass(cls, Module):
        return False
    try:
        inspect.signature(cls.forward).bind("self", "outputs", "targets")
    except TypeError:
        return False
    return True


def _has(*methods: str) -> Callable[[type], bool]:
    return lambda cls: all(callable(getattr(cls, method, None)) for method in methods)


_OPTIMIZER = Role("leantrain.optim", "a subclass of torch.optim.Optimizer", _is_optimizer, ("params",))
ROLES = {
    "model": Role("leantrain.nn", "a subclass of torch.nn.Module or of transformers.PretrainedConfig", _is_model),
    "data": Role("leantrain.data", "a class with train_batch and eval_batches", _has("train_batch", "eval_batches")),
    "optim": _OPTIMIZER,
    "rest": _OPTIMIZER,
    "loss": Role("leantrain.nn", "a subclass of torch.nn.Module, called with outputs and targets", _is_loss),
    "learn": Role(
        "leantrain.learn",
        "a class with the methods of leantrain.learn.Learner",
        _has("step", "evaluate", "enter", "hand_over"),
        ("model", "loss", "precision", "sample"),
    ),
    "exchange": Role(
        "leantrain.exchange",
        "a class with attach, gradient_sync and check_optimizer",
        _has("attach", "gradient_sync", "check_optimizer"),
    ),
}


def is_huggingface_config(cls: type) -> bool:
    """Whether `cls` is a configuration of `transformers`. Does not import transformers: such a class already has."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and issubclass(cls, transformers.PretrainedConfig)


def full_path(key: str, name: str) -> str:
    """The dotted path of `name` in the recipe field `key`: names without dots live in that field's own room."""
    return name if "." in name else f"{ROLES[key].home}.{name}"


def check_path(key: str, class_path: str, allow: Sequence[str]) -> None:
    """Refuse a path whose package is neither in `TRUSTED` nor in `allow`. Imports nothing.

    Raises:
        UsageError: the path is malformed or names a private part, or its package is not allowed.
    """
    parts = class_path.split(".")
    # Private parts are refused because `package.__main__` is a program, not a place where classes are.
    if len(parts) < 2 or not all(part.isidentifier() and not part.startswith("_") for part in parts):
        raise UsageError(f"{key}: {class_path!r} is not the path of a public class, such as torch.optim.AdamW")
    if parts[0] not in (*TRUSTED, *allow):
        raise UsageError(
            f"{key}: {class_path} is code of the package {parts[0]!r}; add --allow {parts[0]} if you trust it "
            f"(allowed: {', '.join((*TRUSTED, *allow))})"
        )


def locate(key: str, class_path: str) -> type:
    """Import the class that the recipe field `key` names.

    Args:
        key: one of the component fields, such as "optim"; decides what kind of class is accepted.
        class_path: where the class is. Runs its package's code: whatever comes from a file goes through `check_path`
            before.

    Raises:
        UsageError: the package is not installed, there is no such class, or it is of the wrong kind.
    """
    parts = class_path.split(".")
    found: Any = _import(parts[0], key, class_path)
    for index in range(2, len(parts) + 1):
        found = _member(found, parts[:index], key, class_path)
    if not isinstance(found, type) or not ROLES[key].accepts(found):
        raise UsageError(f"{key} must be {ROLES[key].expected}, got {class_path}")
    return found


def _member(parent: Any, parts: list[str], key: str, class_path: str) -> Any:
    """The attribute or submodule `parts[-1]` of `parent`, which is what `parts[:-1]` names."""
    name = parts[-1]
    if not hasattr(parent, name):
        # The path as written, never `parent.__name__`: `torch.os.evil` must not lead to a module outside torch.
        if isinstance(parent, ModuleType) and hasattr(parent, "__path__") and _is_submodule(parent, name):
            return _import(".".join(parts), key, class_path)
        public = [each for each in dir(parent) if not each.startswith("_")]
        close = difflib.get_close_matches(name, public, n=3)
        hint = f"; nearest: {', '.join(close)}" if close else ""
        raise UsageError(f"{key}: {'.'.join(parts[:-1])} has no {name!r}{hint}")
    return getattr(parent, name)


def _is_submodule(package: ModuleType, name: str) -> bool:
    from importlib.machinery import PathFinder

    return PathFinder.find_spec(f"{package.__name__}.{name}", list(package.__path__)) is not None


def _import(module: str, key: str, class_path: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(f"{key}: {class_path} needs the package {error.name!r}, which is not installed") from error
    except ImportError as error:
        raise UsageError(f"{key}: {class_path} cannot be imported: {error}") from error
