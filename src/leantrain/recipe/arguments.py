"""A component's arguments, checked against the signature of its class and of the classes it extends.

jsonargparse judges the types. It is only ever shown plain types: for an argument that takes a class or a function it
would import whatever name stands there, so such arguments cannot be set from a recipe at all.
"""

from __future__ import annotations

import collections.abc
import inspect
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from leantrain.errors import UsageError, nearest
from leantrain.recipe.locate import ROLES, TRUSTED

_LEAVES = (bool, int, float, str, type(None))
_SEQUENCES = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


@dataclass(frozen=True)
class Argument:
    """One constructor argument as a recipe may see it."""

    name: str
    hint: Any
    """Its type as far as it is plain data; `Any` without annotation; None where it takes only Python objects."""
    default: Any
    """`inspect.Parameter.empty` if it has none."""

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


def arguments_of(cls: type) -> tuple[dict[str, Argument], bool]:
    """The arguments of the constructor of `cls`, and whether other names may be given too.

    `**kwargs` is followed into the classes that `cls` extends. If it is still open there, other names are accepted from
    packages the user allowed and refused from the trusted ones, where they could reach behind the signature.
    """
    found: dict[str, Argument] = {}
    for each in cls.__mro__:
        init = vars(each).get("__init__")
        if init is None:
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        hints = _hints(init)
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                if parameter.name == "defaults" and each is not cls:
                    continue  # what a base class of optimizers is given by the class that extends it
                hint = plain_hint(hints.get(parameter.name, Any))
                found.setdefault(parameter.name, Argument(parameter.name, hint, parameter.default))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return found, False
    return found, cls.__module__.split(".")[0] not in TRUSTED


def check_arguments(cls: type, key: str, args: Mapping[str, Any], *, complete: bool) -> dict[str, Any]:
    """`args` with every value in the type that the constructor of `cls` declares.

    Args:
        cls: the class found for the recipe field `key`.
        key: the field, for messages and for the arguments that the program gives itself.
        args: what the recipe says.
        complete: whether arguments without default must be there.

    Raises:
        UsageError: an unknown name, a value of the wrong type, a missing value, or one that is not plain data.
    """
    known, open_ended = arguments_of(cls)
    known = {name: argument for name, argument in known.items() if name not in ROLES[key].given}
    result = {}
    for name, value in args.items():
        check_plain(f"{key}.{name}", value)
        if name not in known:
            if open_ended:
                result[name] = value
                continue
            raise UsageError(f"{key}: {cls.__qualname__} has no argument {name!r}{nearest(name, known)}")
        result[name] = convert(f"{key}.{name}", value, known[name].hint, known[name].default)
    missing = [name for name, argument in known.items() if argument.required and name not in args]
    if complete and missing:
        raise UsageError(f"{key}: {cls.__qualname__} needs a value for {', '.join(f'{key}.{m}' for m in missing)}")
    return result


def convert(key: str, value: Any, hint: Any, default: Any = inspect.Parameter.empty) -> Any:
    """`value` in the plain type `hint`, or a UsageError that names `key`, the value and the type."""
    if hint is None:
        raise UsageError(f"{key} takes a Python object and cannot be set from a recipe, got {value!r}")
    if hint is Any or (value is None and default is None):
        return value
    if value is None and type(None) not in get_args(hint):
        raise UsageError(f"{key} must be {describe(hint)}, got null")
    parser = ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_argument("--value", type=hint)
    try:
        return parser.parse_object({"value": value}).value
    except Exception as error:
        # jsonargparse's own text spreads over lines and speaks of its parser; the cause is kept for --debug.
        raise UsageError(f"{key} must be {describe(hint)}, got {value!r}") from error


def check_plain(key: str, value: Any) -> None:
    """Refuse anything but numbers, strings, booleans, None, and lists and mappings of them."""
    if isinstance(value, Mapping):
        for inner, item in value.items():
            if not isinstance(inner, str) or inner == "class_path":
                raise UsageError(f"{key} cannot hold the key {inner!r}: only plain values with names are allowed")
            check_plain(f"{key}.{inner}", item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_plain(key, item)
    elif not isinstance(value, _LEAVES):
        raise UsageError(f"{key} must be plain data, got a {type(value).__name__}: {value!r}")


def plain_hint(hint: Any) -> Any:
    """The part of a type that plain data can satisfy; None if there is none: `float | Tensor` gives `float`."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or hint in _LEAVES or origin is Literal or hint in _SEQUENCES or hint in _MAPPINGS:
        return hint
    if hint is os.PathLike or (isinstance(hint, type) and issubclass(hint, os.PathLike)) or origin is os.PathLike:
        return str
    if origin in (Union, types.UnionType):
        members = [plain for arg in args if (plain := plain_hint(arg)) is not None]
        plain_only = [member for member in members if member is not type(None)]
        return reduce(or_, members) if plain_only and Any not in members else Any if plain_only else None
    if origin in _SEQUENCES or origin in _MAPPINGS:
        inner = tuple(arg if arg is Ellipsis else plain_hint(arg) for arg in args)
        return None if None in inner else hint if inner == args else _rebuilt(origin, inner)
    return plain_hint(args[0]) if hasattr(hint, "__metadata__") else None


def describe(hint: Any) -> str:
    """A type in the words of an error message: `float or null`, `one of 'svd', 'subspace'`."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is type(None):
        return "null"
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is tuple and args and Ellipsis not in args:
        return f"a list of {len(args)}: {', '.join(describe(arg) for arg in args)}"
    if origin is None and isinstance(hint, type):
        return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint, hint.__name__)
    return str(hint).replace("typing.", "").replace("collections.abc.", "")


def _rebuilt(origin: Any, inner: tuple[Any, ...]) -> Any:
    return origin[inner if len(inner) != 1 else inner[0]]


def _hints(function: Any) -> dict[str, Any]:
    """The annotations as types; one that cannot be evaluated (imported for type checkers only) counts as absent."""
    function = inspect.unwrap(function)
    result: dict[str, Any] = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        alone = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            result |= get_type_hints(alone, globalns=getattr(function, "__globals__", {}))
        except Exception:
            continue
    return result
