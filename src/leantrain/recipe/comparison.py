"""Several runs on equal terms: what they share, where they differ, and what each of them is given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from leantrain.errors import UsageError, nearest
from leantrain.recipe.merge import normalised, with_overrides
from leantrain.recipe.schema import Recipe, check_choices, check_name

BUDGETS = ("steps", "tokens", "seconds", "memory")


@dataclass(frozen=True)
class Comparison:
    """Runs that differ from one base in named keys, trained on the same seeds under the same budget.

    Raises:
        UsageError: a field is out of its range, or names a run that does not exist.
    """

    name: str
    """What the comparison is called; also its folder under `runs/`."""
    base: Mapping[str, Any]
    """The recipe keys that all runs share, as plain data. It need not be a whole recipe."""
    runs: Mapping[str, Mapping[str, Any]]
    """For each run the keys in which it differs, dotted if they name an argument (`optim.lr`), and its own `tune`."""
    baseline: str
    """The run that the others are measured against; one of `runs`."""
    tune: Mapping[str, list[Any]] = field(default_factory=dict)
    """The one key that is chosen for every run beforehand, and the values to try: `{"optim.lr": [1e-4, 1e-3]}`."""
    tune_steps: int | None = None
    """Steps of a tuning run, at least 1; null: as many as the run itself."""
    tune_seed: int = 1234
    """Seed of all tuning runs; not one of `seeds`, so that no run is judged on what it was tuned on."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Every run is trained once with each."""
    budget: Literal["steps", "tokens", "seconds", "memory"] = "steps"
    """What every run gets the same amount of."""
    budget_value: float | None = None
    """How much of it: a number of steps or tokens, seconds (`120s`), or bytes (`24GB`). null: what the recipes say."""
    allow: tuple[str, ...] = ()
    """Packages that the user allowed beside the trusted ones. Comes from the command line, never from the file."""

    def __post_init__(self) -> None:
        check_name("name", self.name)
        check_choices("budget", [self.budget], BUDGETS)
        if not self.runs:
            raise UsageError("runs must name at least one run")
        if self.baseline not in self.runs:
            raise UsageError(f"baseline: there is no run {self.baseline!r}{nearest(str(self.baseline), self.runs)}")
        for run, overrides in self.runs.items():
            check_name("a run's name", run)
            if not isinstance(overrides, Mapping):
                raise UsageError(f"runs.{run} must be a mapping of recipe keys to values, got {overrides!r}")
        _check_seeds(self)
        if self.tune_steps is not None and self.tune_steps < 1:
            raise UsageError(f"tune_steps must be at least 1, got {self.tune_steps}")
        for run in self.runs:
            _check_tune(run, self.tune_for(run))

    def recipe_for(self, run: str, seed: int, **overrides: Any) -> Recipe:
        """The recipe of one run with one seed.

        Args:
            run: a key of `runs`; also becomes the recipe's name.
            seed: the recipe's seed.
            overrides: recipe keys on top of the run's own, for instance `**{"optim.lr": 0.003}`.

        Raises:
            UsageError: the run does not exist or its recipe is not allowed; the message names the run.
        """
        from leantrain.recipe.read import recipe_from_dict

        if run not in self.runs:
            raise UsageError(f"there is no run {run!r}{nearest(run, self.runs)}")
        own = {key: value for key, value in self.runs[run].items() if key != "tune"}
        try:
            keys = with_overrides(with_overrides(normalised(self.base), own), self._budget_keys())
            return recipe_from_dict(with_overrides(keys, {**overrides, "name": run, "seed": seed}), self.allow)
        except UsageError as error:
            raise UsageError(f"run {run}: {error}") from error

    def tune_for(self, run: str) -> Mapping[str, list[Any]]:
        """What is tuned for this run: `{}`, or one key with its values. A run's own `tune` replaces the common one."""
        own = self.runs[run].get("tune", self.tune)
        return {} if own is None else own

    def check_runs(self) -> None:
        """Make every recipe that this comparison will ask for, and see that the runs get the same budget.

        Raises:
            UsageError: the first that is not allowed.
        """
        recipes = {run: self.recipe_for(run, self.seeds[0]) for run in self.runs}
        for run in self.runs:
            for key, values in self.tune_for(run).items():
                for value in values:
                    self.recipe_for(run, self.tune_seed, **{key: value})
        for key in {"steps": ("steps", "batch_size"), "tokens": ("max_tokens",), "seconds": ("max_seconds",)}.get(
            self.budget, ()
        ):
            values_by_run = {run: getattr(recipe, key) for run, recipe in recipes.items()}
            if len(set(values_by_run.values())) > 1:
                raise UsageError(f"under budget: {self.budget} all runs need the same {key}, got {values_by_run}")
            if None in values_by_run.values():
                raise UsageError(f"budget: {self.budget} needs a budget_value (or {key} in base)")

    def _budget_keys(self) -> dict[str, Any]:
        """The recipe keys that hold the budget."""
        if self.budget_value is None or self.budget == "memory":
            return {}
        key = {"steps": "steps", "tokens": "max_tokens", "seconds": "max_seconds"}[self.budget]
        return {key: self.budget_value if self.budget == "seconds" else int(self.budget_value)}


_UNITS: dict[str, dict[str, float]] = {
    "seconds": {"s": 1, "min": 60, "h": 3600},
    "memory": {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30},
    "steps": {}, "tokens": {"K": 1e3, "M": 1e6, "B": 1e9},
}  # fmt: skip


def parse_budget(budget: str, value: Any) -> float | None:
    """`budget_value` as a number in steps, tokens, seconds or bytes: "24GB" is 24e9, "2min" is 120.

    Raises:
        UsageError: not a number above 0, or a unit that `budget` does not have.
    """
    check_choices("budget", [budget], BUDGETS)
    if value is None:
        return None
    units = {unit.upper(): factor for unit, factor in _UNITS[budget].items()}
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", str(value), re.IGNORECASE)
    unit = match[2].upper() if match else ""
    try:
        number = float(match[1]) * {"": 1, **units}[unit] if match else 0.0
    except (KeyError, ValueError):
        number = 0.0
    if number <= 0 or isinstance(value, bool):
        allowed = f", with one of {', '.join(_UNITS[budget])} or without unit" if units else ""
        raise UsageError(f"budget_value for budget: {budget} must be a number above 0{allowed}, got {value!r}")
    return number


def _check_seeds(comparison: Comparison) -> None:
    seeds = comparison.seeds
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UsageError(f"seeds must be different whole numbers, 0 or more, got {seeds}")
    if comparison.tune_seed in seeds and any(comparison.tune_for(run) for run in comparison.runs):
        raise UsageError(f"tune_seed must not be one of seeds={seeds}, got {comparison.tune_seed}")


def _check_tune(run: str, tune: Any) -> None:
    if not isinstance(tune, Mapping) or not all(isinstance(values, list) and values for values in tune.values()):
        raise UsageError(f"tune of run {run} must be one key with a list of values, got {tune!r}")
    if len(tune) > 1:
        raise UsageError(f"tune of run {run} must be one key, got {', '.join(tune)}")
    for key, values in tune.items():
        if any(values.count(value) > 1 for value in values):
            raise UsageError(f"tune of run {run}: {key} has a value twice in {values}")
