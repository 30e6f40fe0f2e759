"""What the keys of a recipe mean, for help: read from the docstrings of the fields, so that it is written once."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from docstring_parser import parse_from_object

from leantrain.errors import UsageError, nearest
from leantrain.recipe.comparison import Comparison
from leantrain.recipe.locate import ROLES, check_path, full_path, locate
from leantrain.recipe.schema import COMPONENTS, Component, Recipe, field_names


def flag_roots(command: str) -> list[str]:
    """The keys that `leantrain train` or `leantrain compare` takes as flags, without what may follow a dot."""
    more = [each.name for each in fields(Comparison) if each.name not in ("base", "runs", "allow", "name")]
    return field_names() + (more if command == "compare" else [])


def recipe_help(width: int = 100) -> str:
    """Every key of a recipe as a flag, with its type, its meaning and its default."""
    lines = [
        "recipe keys, in the file as `KEY: VALUE` and here as `--KEY VALUE`, which goes before the file:",
        *(_entry(f"--{name} {kind}", meaning, width) for name, kind, meaning in rows(Recipe)),
        "",
        "arguments of a class follow its key and a dot: --optim leantrain.optim.GaLoreAdamW --optim.rank 128",
        "and --optim.help CLASS lists them. A name without dots is one of leantrain's: --optim GaLoreAdamW",
    ]
    return "\n".join(lines)


def class_help(key: str, name: str, allow: Sequence[str] = (), width: int = 100) -> str:
    """The arguments that the class `name` takes in the recipe field `key`, with their types, meanings and defaults.

    Raises:
        UsageError: as for a recipe that names this class.
    """
    from leantrain.recipe.arguments import arguments_of, describe

    if key not in COMPONENTS:
        raise UsageError(f"--{key}.help: {key} is not a key that names a class{nearest(key, COMPONENTS)}")
    path = full_path(key, name)
    check_path(key, path, allow)
    cls = locate(key, path)
    known, _ = arguments_of(cls)
    documented = {each.arg_name: each.description or "" for each in parse_from_object(cls).params}
    first = (inspect.getdoc(cls) or "").strip().split("\n\n")[0]
    lines = [f"{path}: {' '.join(first.split())}", ""]
    for argument in known.values():
        if argument.name in ROLES[key].given:
            continue
        kind = "a Python object, not from a recipe" if argument.hint is None else describe(argument.hint)
        default = "required" if argument.required else f"default: {argument.default!r}"
        meaning = f"{documented.get(argument.name, '')} ({kind}; {default})".strip()
        lines.append(_entry(f"--{key}.{argument.name}", meaning, width))
    return "\n".join(lines)


def rows(described: type) -> list[tuple[str, str, str]]:
    """(name, type, meaning with default) of every field of a dataclass whose fields have docstrings."""
    meanings = {each.arg_name: each.description or "" for each in parse_from_object(described).params}
    return [(each.name, _kind(each), meanings[each.name] + _default(each)) for each in fields(described)]


def _kind(each: Field[Any]) -> str:
    text = str(each.type)
    if each.name in COMPONENTS:
        return "CLASS"
    if text.startswith("Literal["):
        return "{" + text.removeprefix("Literal[").removesuffix("]").replace('"', "").replace(" ", "") + "}"
    return text.split(" ")[0].split("[")[0].upper()


def _default(each: Field[Any]) -> str:
    value = each.default if each.default_factory is MISSING else each.default_factory()
    if value is MISSING:
        return " (required)"
    shown = value.class_path if isinstance(value, Component) else json.dumps(value).strip('"')
    return f" (default: {shown})"


def _entry(flag: str, meaning: str, width: int) -> str:
    body = textwrap.wrap(" ".join(meaning.split()), width - 24)
    first = [f"  {flag}"] if len(flag) > 20 else [f"  {flag:<22}{body.pop(0)}"]
    return "\n".join(first + [f"{'':24}{line}" for line in body])
