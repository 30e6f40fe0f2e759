"""Reading recipes and comparisons: a YAML file, then flags over it, then every check that can be made beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from leantrain.errors import UsageError, nearest
from leantrain.recipe.comparison import Comparison, parse_budget
from leantrain.recipe.locate import check_path, full_path
from leantrain.recipe.merge import normalised, with_overrides
from leantrain.recipe.schema import COMPONENTS, OPTIONAL, Component, Recipe, field_names
from leantrain.recipe.yaml import load_file, load_text

DEFAULT = {
    "name": "default",
    "model": {"class_path": "leantrain.nn.Llama", "init_args": {"preset": "tiny"}},
    "data": {"class_path": "leantrain.data.Text", "init_args": {"context": 64, "max_bytes": 4_000_000}},
    "optim": {"class_path": "leantrain.optim.GaLoreAdamW", "init_args": {"lr": 0.01, "rank": 16, "refresh": 50}},
    "steps": 300,
    "batch_size": 16,
    "eval_every": 100,
    "eval_batches": 8,
}
"""What `leantrain train` does when it is told nothing: a small Llama on text that every Python brings along."""


def read_recipe(path: Path | str | None, argv: Sequence[str] = (), allow: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file with the flags in `argv` over it, checked.

    Args:
        path: the file; None is `DEFAULT`.
        argv: `--KEY VALUE` or `--KEY=VALUE`; keys are dotted where they name an argument, values are YAML.
        allow: packages beside leantrain, torch and transformers whose classes may be imported.

    Raises:
        UsageError: in one line, the key, the value and what is allowed.
    """
    given = DEFAULT if path is None else {"name": Path(path).stem, **load_file(path)}
    return recipe_from_dict(with_overrides(normalised(given), flags(argv)), allow)


def recipe_from_dict(given: Mapping[str, Any], allow: Sequence[str] = ()) -> Recipe:
    """A recipe from plain data, with every class in it imported and every argument checked.

    Raises:
        UsageError: an unknown key, a value that is not allowed, or a class from a package that is not in `allow`.
    """
    from leantrain.recipe.arguments import check_plain, convert
    from leantrain.recipe.build import try_recipe

    hints = get_type_hints(Recipe)
    values: dict[str, Any] = {}
    for key, value in normalised(given).items():
        if key in COMPONENTS:
            values[key] = None if value is None and key in OPTIONAL else _component(key, value, allow)
        else:
            check_plain(key, value)
            values[key] = convert(key, value, hints[key])
    required = [each.name for each in fields(Recipe) if each.default is each.default_factory is MISSING]
    if missing := [key for key in required if key not in values]:
        raise UsageError(f"a recipe needs {', '.join(required)}; missing: {', '.join(missing)}")
    recipe = Recipe(**values)
    try_recipe(recipe)
    return recipe


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, all keys written out; `recipe_from_dict` gives an equal recipe back."""
    result = {}
    for key in field_names():
        value = getattr(recipe, key)
        result[key] = (
            {"class_path": value.class_path, "init_args": _plain(value.init_args)}
            if isinstance(value, Component)
            else _plain(value)
        )
    return result


def read_comparison(path: Path | str, argv: Sequence[str] = (), allow: Sequence[str] = ()) -> Comparison:
    """The comparison in a YAML file with the flags in `argv` over it, every one of its runs checked.

    Flags that are keys of a comparison (`--seeds "[0, 1]"`) change it; all others (`--steps 100`) change its base.
    """
    given = {"name": Path(path).stem, **load_file(path)}
    changes = flags(argv)
    given |= {key: value for key, value in changes.items() if key in _COMPARISON_KEYS}
    base = normalised(_mapping("base", given.get("base", {})))
    given["base"] = with_overrides(base, {k: v for k, v in changes.items() if k not in _COMPARISON_KEYS})
    return comparison_from_dict(given, allow)


def comparison_from_dict(given: Mapping[str, Any], allow: Sequence[str] = ()) -> Comparison:
    """A comparison from plain data, every recipe that it leads to checked.

    Raises:
        UsageError: as for a recipe, with the name of the run.
    """
    from leantrain.recipe.arguments import check_plain, convert

    hints = get_type_hints(Comparison)
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in _COMPARISON_KEYS:
            raise UsageError(f"a comparison has no key {key!r}{nearest(str(key), _COMPARISON_KEYS)}")
        if key in ("base", "runs", "tune"):
            values[key] = _mapping(key, value)
        elif key == "budget_value":
            values[key] = parse_budget(str(given.get("budget", "steps")), value)
        else:
            check_plain(key, value)
            values[key] = convert(key, value, hints[key])
    if missing := [key for key in ("name", "base", "runs", "baseline") if key not in values]:
        raise UsageError(f"a comparison needs name, base, runs, baseline; missing: {', '.join(missing)}")
    comparison = Comparison(**values, allow=tuple(allow))
    comparison.check_runs()
    return comparison


def comparison_to_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data; `comparison_from_dict` gives an equal one back for the same `allow`."""
    return {key: _plain(getattr(comparison, key)) for key in _COMPARISON_KEYS}


def flags(argv: Sequence[str]) -> dict[str, Any]:
    """`["--optim.lr", "1e-3", "--steps=5"]` as `{"optim.lr": 0.001, "steps": 5}`. Values are YAML."""
    found: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise UsageError(f"expected --KEY VALUE, got {word!r}")
        if not equals:
            if not rest:
                raise UsageError(f"--{key} needs a value")
            text = rest.pop(0)
        if key in found:
            raise UsageError(f"--{key} is given twice")
        found[key] = load_text(text, f"--{key}")
    return found


_COMPARISON_KEYS = [each.name for each in fields(Comparison) if each.name != "allow"]


def _component(key: str, value: Any, allow: Sequence[str]) -> Component:
    """The long form as a Component, its arguments in their declared types. Imports the class, if that is allowed."""
    from leantrain.recipe.arguments import check_arguments, check_plain
    from leantrain.recipe.locate import locate

    if value is None:
        raise UsageError(f"{key} must name a class, got null")
    path = full_path(key, value["class_path"])
    check_path(key, path, allow)
    check_plain(key, value["init_args"])
    return Component(path, _plain(check_arguments(locate(key, path), key, value["init_args"], complete=False)))


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(inner, str) for inner in value):
        raise UsageError(f"{key} must be a mapping of names to values, got {value!r}")
    return value


def _plain(value: Any) -> Any:
    """Lists for tuples and sets, so that YAML and JSON give back what they were given."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner) for inner in value]
    return value
