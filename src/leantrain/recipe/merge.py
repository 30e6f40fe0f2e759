"""Laying overrides over a recipe's keys, while both are still plain data."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from leantrain.errors import UsageError, nearest
from leantrain.recipe.schema import COMPONENTS, DEFAULT_CLASSES, field_names

_CLASS_WORDS = ("class_path", "class")


def normalised(given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's keys as a person wrote them, in the one form used from here on: every component in its long form."""
    return with_overrides({}, given)


def with_overrides(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base`, which is `normalised`, with `overrides` laid over it; neither is changed.

    A key of a component that names a class (`optim`) replaces the component with all its arguments, so that none is
    left over from another class. A dotted key (`optim.lr`), or a mapping without a class, changes single arguments;
    these come after the classes, whatever their order.
    """
    result = copy.deepcopy(dict(base))
    changes: list[tuple[str, dict[str, Any]]] = []
    for key, value in copy.deepcopy(dict(overrides)).items():
        root, dot, argument = str(key).partition(".")
        if root in COMPONENTS and dot:
            changes.append((root, {argument.removeprefix("init_args."): value}))
        elif root in COMPONENTS and isinstance(value, Mapping) and not _names_class(value):
            changes.append((root, _arguments(root, value)))
        elif key not in field_names():
            raise UsageError(f"a recipe has no key {key!r}{nearest(str(key), field_names())}")
        else:
            result[key] = _long_form(key, value) if key in COMPONENTS else value
    for root, change in changes:
        if root not in result and root in DEFAULT_CLASSES:
            result[root] = _long_form(root, DEFAULT_CLASSES[root])
        if not result.get(root):
            raise UsageError(f"{root} is given arguments ({', '.join(change)}) but no class; add {root}: package.Class")
        result[root]["init_args"].update(change)
    return result


def _long_form(key: str, value: Any) -> dict[str, Any] | None:
    """`{class_path, init_args}` from that, from a class path alone, or from `{class: ..., lr: ...}`."""
    if value is None:
        return None
    if isinstance(value, str):
        return {"class_path": value, "init_args": {}}
    if not isinstance(value, Mapping):
        raise UsageError(f"{key} must name a class, such as {{class: package.Class}}, got {value!r}")
    paths = [value[word] for word in _CLASS_WORDS if word in value]
    if len(paths) != 1 or not isinstance(paths[0], str):
        raise UsageError(f"{key} must name one class, got {value!r}")
    return {"class_path": paths[0], "init_args": _arguments(key, value)}


def _arguments(key: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in a component's mapping, whether they stand in `init_args` or beside the class."""
    inner = value.get("init_args", None) or {}
    beside = {name: item for name, item in value.items() if name not in (*_CLASS_WORDS, "init_args")}
    if not isinstance(inner, Mapping):
        raise UsageError(f"{key}.init_args must be a mapping of arguments, got {inner!r}")
    if twice := set(inner) & set(beside):
        raise UsageError(f"{key}.{min(twice)} is given twice, once in init_args")
    return {**inner, **beside}


def _names_class(value: Mapping[str, Any]) -> bool:
    return any(word in value for word in _CLASS_WORDS)
