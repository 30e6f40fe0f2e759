"""A comparison gives every run its own recipe from one base, on equal terms, and refuses what would not be equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from leantrain.errors import UsageError
from leantrain.recipe import (
    Comparison,
    Component,
    comparison_from_dict,
    comparison_to_dict,
    read_comparison,
    recipe_to_dict,
)  # fmt: skip
from leantrain.recipe.comparison import parse_budget
from leantrain.recipe.yaml import dump, load_text

GALORE = "leantrain.optim.GaLoreAdamW"
KEYS: dict[str, Any] = {
    "name": "galore-or-adamw",
    "base": {
        "model": {"class": "leantrain.nn.MLP", "hidden": [16, 16]},
        "data": {"class": "leantrain.data.Sklearn", "name": "digits"},
        "optim": {"class": "torch.optim.AdamW", "lr": 0.001, "weight_decay": 0.1},
        "steps": 20,
        "batch_size": 32,
    },
    "runs": {
        "adamw": {},
        "galore": {"optim": GALORE, "optim.rank": 4, "tune": {"optim.lr": [0.01, 0.03]}},
    },
    "baseline": "adamw",
    "tune": {"optim.lr": [1e-4, 1e-3]},
    "seeds": [0, 1],
}


def comparison(**changes: Any) -> Comparison:
    return comparison_from_dict({**KEYS, **changes})


def test_every_run_gets_the_base_with_its_own_keys_and_seed() -> None:
    recipe = comparison().recipe_for("adamw", 7)
    assert recipe.optim == Component("torch.optim.AdamW", {"lr": 0.001, "weight_decay": 0.1})
    assert (recipe.name, recipe.seed, recipe.steps) == ("adamw", 7, 20)


def test_another_optimizer_takes_no_argument_over() -> None:
    assert comparison().recipe_for("galore", 0).optim == Component(GALORE, {"rank": 4})


def test_overrides_come_last() -> None:
    recipe = comparison().recipe_for("galore", 0, **{"optim.lr": 0.5, "steps": 2})
    assert recipe.optim.init_args == {"rank": 4, "lr": 0.5}
    assert recipe.steps == 2


def test_a_runs_own_tuning_replaces_the_common_one() -> None:
    assert comparison().tune_for("adamw") == {"optim.lr": [1e-4, 1e-3]}
    assert comparison().tune_for("galore") == {"optim.lr": [0.01, 0.03]}
    assert comparison(tune={}).tune_for("adamw") == {}
    runs = {**KEYS["runs"], "adamw": {"tune": None}}
    assert comparison(runs=runs).tune_for("adamw") == {}


def test_it_comes_back_from_yaml_as_it_was() -> None:
    first = comparison(budget="seconds", budget_value="2min")
    assert comparison_from_dict(load_text(dump(comparison_to_dict(first)), "here")) == first


def test_flags_change_the_comparison_or_its_base(tmp_path: Path) -> None:
    path = tmp_path / "lr.yaml"
    path.write_text(dump({key: value for key, value in KEYS.items() if key != "name"}), encoding="utf-8")
    read = read_comparison(path, ["--seeds", "[5]", "--steps", "3", "--optim.lr", "0.7"])
    assert (read.name, read.seeds) == ("lr", [5])
    assert read.recipe_for("adamw", 5).steps == 3
    assert read.recipe_for("adamw", 5).optim.init_args == {"lr": 0.7, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"budget": "steps", "budget_value": 9}, "steps", 9),
        ({"budget": "tokens", "budget_value": "1.5M"}, "max_tokens", 1_500_000),
        ({"budget": "seconds", "budget_value": "90s"}, "max_seconds", 90.0),
    ],
)
def test_the_budget_reaches_every_recipe(changes: dict[str, Any], key: str, value: float) -> None:
    for run in KEYS["runs"]:
        assert getattr(comparison(**changes).recipe_for(run, 0), key) == value


def test_the_budget_goes_before_what_a_run_says() -> None:
    equal = comparison(runs={"adamw": {}, "long": {"steps": 500}}, budget="steps", budget_value=9)
    assert equal.recipe_for("long", 0).steps == 9


@pytest.mark.parametrize(
    ("budget", "written", "value"),
    [("memory", "24GB", 24e9), ("memory", "512 MiB", 2**29), ("memory", 1000, 1000), ("seconds", "2min", 120),
     ("seconds", "1.5h", 5400), ("tokens", "2B", 2e9), ("tokens", "3e6", 3e6), ("steps", 10, 10)],
)  # fmt: skip
def test_budgets_are_read_with_their_units(budget: str, written: Any, value: float) -> None:
    assert parse_budget(budget, written) == value


@pytest.mark.parametrize(
    ("budget", "written"),
    [("memory", "24 cows"), ("seconds", "24GB"), ("steps", "3k"), ("tokens", -1), ("tokens", 0), ("steps", True),
     ("seconds", "soon"), ("memory", [1]), ("seconds", "1.2.3")],
)  # fmt: skip
def test_budgets_without_sense_are_refused(budget: str, written: Any) -> None:
    with pytest.raises(UsageError, match=f"budget_value for budget: {budget} must be a number above 0"):
        parse_budget(budget, written)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sees": [1]}, "a comparison has no key 'sees'; did you mean 'seeds'?"),
        ({"baseline": "adam"}, "baseline: there is no run 'adam'; did you mean 'adamw'?"),
        ({"runs": {}}, "runs must name at least one run"),
        ({"runs": {"adamw": 3}}, "runs.adamw must be a mapping"),
        ({"runs": {"adamw": {}, "../x": {}}}, "a run's name must be 1 to 100 letters"),
        ({"runs": {"adamw": {"optim.rank": 3}}}, "run adamw: optim: AdamW has no argument 'rank'"),
        ({"runs": {"adamw": {"stps": 3}}}, "run adamw: a recipe has no key 'stps'; did you mean 'steps'?"),
        ({"tune": {"optim.lr": [1, -1]}}, "run adamw: optim: AdamW(lr=-1.0, weight_decay=0.1) is refused"),
        ({"tune": {"optim.lr": []}}, "tune of run adamw must be one key with a list of values"),
        ({"tune": {"optim.lr": [1], "clip": [2]}}, "tune of run adamw must be one key, got optim.lr, clip"),
        ({"tune": {"optim.lr": [0.1, 0.1]}}, "optim.lr has a value twice"),
        ({"tune": 3}, "tune must be a mapping"),
        ({"tune_steps": 0}, "tune_steps must be at least 1, got 0"),
        ({"tune_seed": 1}, "tune_seed must not be one of seeds=[0, 1], got 1"),
        ({"seeds": []}, "seeds must be different whole numbers"),
        ({"seeds": [1, 1]}, "seeds must be different whole numbers"),
        ({"seeds": ["a"]}, "seeds must be"),
        ({"budget": "money"}, "budget"),
        ({"budget": "tokens"}, "budget: tokens needs a budget_value"),
        ({"runs": {"adamw": {}, "b": {"batch_size": 64}}}, "all runs need the same batch_size"),
        ({"runs": {"adamw": {}, "b": {"steps": 64}}}, "all runs need the same steps"),
        ({"base": {**KEYS["base"], "steps": 0}}, "run adamw: steps must be a whole number"),
        ({"base": [1]}, "base must be a mapping"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_refused_before_anything_runs(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        comparison(**changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_keys_are_named() -> None:
    with pytest.raises(UsageError, match="missing: runs, baseline"):
        comparison_from_dict({"name": "x", "base": {}})


def test_a_run_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="there is no run 'galor'; did you mean 'galore'"):
        comparison().recipe_for("galor", 0)


def test_recipes_of_one_run_differ_only_in_the_seed() -> None:
    first, second = (recipe_to_dict(comparison().recipe_for("galore", seed)) for seed in (0, 1))
    assert {key for key in first if first[key] != second[key]} == {"seed"}
