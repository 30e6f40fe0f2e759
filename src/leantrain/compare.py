"""Several runs on equal terms: the same base, seeds, budget and tuning, and one table of what each gave and cost.

    OUT/comparison.yaml                     what was compared
    OUT/RUN/tune/optim.lr=0.001/            one training per value of the tuned key
    OUT/RUN/fit/accumulate=2/               under a memory budget: a few steps to see whether it fits
    OUT/RUN/seed-0/                         one training per seed
    OUT/results.json, results.csv           all of it as numbers (see `leantrain.results`)
    OUT/report.html                         all of it for a person

Every training runs in a process of its own. One that fails leaves the others alone; one that finished is recognised
when the same comparison is started again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from leantrain.atomic import write_text
from leantrain.errors import UsageError
from leantrain.isolate import OnEvent, train_isolated
from leantrain.paired import FEWEST_FOR_TEST
from leantrain.recipe import Comparison, Recipe, comparison_to_dict, recipe_from_dict, recipe_to_dict
from leantrain.recipe.yaml import dump, load_file
from leantrain.results import (
    SCHEMA,
    differing_settings,
    finished,
    summarise,
    versus_baseline,
    write_results,
)
from leantrain.tuning import FIT_STEPS, fit, megabytes, peak_of, tune


def compare(
    comparison: Comparison, out: Path | str, on_event: OnEvent = lambda event: None, allow: Sequence[str] = ()
) -> dict[str, Any]:
    """Train every run of a comparison with every seed and write what came of it into `out`.

    Args:
        comparison: what to compare.
        out: folder of the comparison. What is already finished in it is not done again.
        on_event: called with every event of every training, with "run", "purpose" ("tune", "fit" or "train"), "number"
            and "of" (which of how many trainings) added, and a "name" that says all of it. Every training ends with an
            event of kind "end", also one that failed or was finished before.
        allow: packages beside the trusted ones whose classes the recipes may name.

    Returns:
        What results.json holds. Its "status" is "finished", "failed" (some training did not end well; the others are
        there) or "interrupted" (Ctrl-C or SIGTERM; start again to go on).

    Raises:
        UsageError: the runs cannot be compared on equal terms. Nothing was started.
    """
    comparison = replace(comparison, allow=tuple(dict.fromkeys((*comparison.allow, *allow))))
    _check(comparison)
    out = Path(out)
    write_text(out / "comparison.yaml", dump(comparison_to_dict(comparison)))
    work = _Work(comparison, out, on_event)
    try:
        for run in comparison.runs:
            work.prepare(run)
        # Seed by seed, not run by run: what a busy machine slows down, it slows down for all runs alike.
        for seed in comparison.seeds:
            for run in comparison.runs:
                work.train_seed(run, seed)
    except _Interrupted:
        work.interrupted = True
    results = work.results()
    write_results(results, out)
    from leantrain.report import write_report  # matplotlib takes a second to load

    write_report(results, out / "report.html")
    return results


class _Interrupted(Exception):
    """Somebody asked to stop; what is done is saved."""


class _Work:
    """The trainings of one comparison as they are done one after another, and what is known so far."""

    def __init__(self, comparison: Comparison, out: Path, on_event: OnEvent) -> None:
        self.comparison, self.out, self.on_event = comparison, out, on_event
        self.settings: dict[str, dict[str, Any]] = {run: {"ledger": True} for run in comparison.runs}
        self.trained: dict[str, list[dict[str, Any]]] = {run: [] for run in comparison.runs}
        self.tuned: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, list[str]] = {run: [] for run in comparison.runs}
        self.left_out: dict[str, str] = {}
        """Runs that cannot be trained at all, and what their status is instead."""
        self.costs: dict[str, list[float]] = {"tune": [], "fit": [], "train": []}
        self.interrupted = False
        self._number = 0
        self._of = sum(
            sum(map(len, comparison.tune_for(run).values())) + len(comparison.seeds) for run in comparison.runs
        )

    def prepare(self, run: str) -> None:
        """Settle the micro-batch that fits the memory budget, and the best value of the tuned key."""
        if self.comparison.budget == "memory" and self.comparison.budget_value is not None:
            self._fit(run, self.comparison.budget_value)
        for key, values in self.comparison.tune_for(run).items():
            if run not in self.left_out:
                self._tune(run, key, values)

    def train_seed(self, run: str, seed: int) -> None:
        """Train a run with one seed, unless it was found that it cannot be trained."""
        if run in self.left_out:
            return
        comparison = self.comparison
        recipe = comparison.recipe_for(run, seed, **self.settings[run])
        result = self._train(run, f"seed-{seed}", recipe, "train")
        self.trained[run].append(result)
        limit, peak = comparison.budget_value, peak_of(result)
        if comparison.budget == "memory" and limit is not None and peak is not None and peak > limit:
            self.notes[run].append(
                f"over the budget with seed {seed}: the whole training peaked at {megabytes(peak)}, more than its "
                f"first {FIT_STEPS} steps; the budget is {megabytes(limit)}"
            )

    def _fit(self, run: str, limit: float) -> None:
        found = fit(partial(self._train, run), self.comparison, run, limit)
        if found.note:
            self.notes[run].append(found.note)
        if found.failed is not None:
            self.trained[run].append(found.failed)
        if found.accumulate is None:
            self.left_out[run] = "failed" if found.failed else "does not fit"
        else:
            self.settings[run]["accumulate"] = found.accumulate

    def _tune(self, run: str, key: str, values: Sequence[Any]) -> None:
        found = tune(partial(self._train, run), self.comparison, run, self.settings[run], key, values)
        self.tuned[run] = found
        if found["best"] is None:
            self.left_out[run] = "failed"
            self.notes[run].append(f"no value of {key} gave a validation loss: {found['grid'][0]['status']}")
            return
        self.settings[run][key] = found["best"]
        if found["at_edge"]:
            self.notes[run].append(
                f"the best {key}, {found['best']}, is at the edge of what was tried; a value outside may be better"
            )

    def _train(self, run: str, folder: str, recipe: Recipe, purpose: str) -> dict[str, Any]:
        """One training, unless its result is already there."""
        if purpose != "fit":  # nobody knows beforehand how many of those there will be
            self._number += 1
        labels = {
            "run": run, "purpose": purpose, "number": self._number, "of": self._of,
            "name": f"[{self._number}/{self._of}] {run}/{unquote(folder)}",
        }  # fmt: skip
        ended = False

        def tell(event: dict[str, Any]) -> None:
            nonlocal ended
            ended = ended or event["kind"] == "end"
            self.on_event({**event, **labels})

        path = self.out / run / folder
        result = self._already(path, recipe, run)
        if result is not None:
            tell({**_ending(result), "status": "was finished before"})
        else:
            result = train_isolated(recipe, path, on_event=tell, allow=self.comparison.allow)
        if not ended:
            tell(_ending(result))
        if result["status"] == "interrupted":
            raise _Interrupted
        self.costs[purpose].append(result.get("seconds", 0.0))
        if purpose != "train":  # only its figures are wanted; a big model's weights once per value would fill the disk
            shutil.rmtree(path / "checkpoints", ignore_errors=True)
        return {**result, "folder": f"{run}/{folder}"}

    def _already(self, path: Path, recipe: Recipe, run: str) -> dict[str, Any] | None:
        """The finished result of the same recipe in `path`. A run of another recipe there is set aside, not deleted."""
        if not (path / "recipe.yaml").exists():
            return None
        if not self._same(path / "recipe.yaml", recipe):
            aside = next(p for i in range(1, 10**6) if not (p := path.with_name(f"{path.name}.old-{i}")).exists())
            path.rename(aside)
            self.notes[run].append(f"{path.name} held a run with another recipe; it is now in {aside.name}")
            return None
        try:
            result: dict[str, Any] = json.loads((path / "result.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return result if result.get("status") == "finished" else None

    def _same(self, written: Path, recipe: Recipe) -> bool:
        try:
            return recipe_from_dict(load_file(written), self.comparison.allow) == recipe
        except UsageError:  # damaged, or of a class that is gone
            return False

    def results(self) -> dict[str, Any]:
        """Everything known so far, in the form of results.json."""
        comparison = self.comparison
        baseline = self.trained[comparison.baseline]
        runs = {run: self._run_results(run, baseline) for run in comparison.runs}
        statuses = {entry["status"] for entry in runs.values()}
        seeds = list(comparison.seeds)
        recipes = {run: comparison.recipe_for(run, seeds[0], **self.settings[run]) for run in comparison.runs}
        done = [result for run in runs.values() for result in finished(run["results"])]
        return {
            "schema": SCHEMA,
            "name": comparison.name,
            "status": "interrupted" if self.interrupted else "finished" if statuses == {"finished"} else "failed",
            "created": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "baseline": comparison.baseline,
            "budget": {"kind": comparison.budget, "value": _budget_value(comparison)},
            "seeds": seeds,
            "tune": self.tuned,
            "runs": runs,
            "settings": differing_settings({run: recipe_to_dict(recipe) for run, recipe in recipes.items()}),
            "environment": done[-1]["environment"] if done else {},
            "cost": self._cost(),
            "notes": self._common_notes(),
            "command": " ".join(["leantrain compare comparison.yaml", *(f"--allow {p}" for p in comparison.allow)]),
            "comparison": dump(comparison_to_dict(comparison)),
        }

    def _run_results(self, run: str, baseline: list[dict[str, Any]]) -> dict[str, Any]:
        trained = self.trained[run]
        statuses = {result["status"] for result in trained}
        whole = len(trained) == len(self.comparison.seeds) and statuses == {"finished"}
        status = self.left_out.get(run) or (
            "finished" if whole else "failed" if "failed" in statuses else "interrupted"
        )
        against = {} if run == self.comparison.baseline else versus_baseline(trained, baseline)
        return {
            "status": self.left_out.get(run, status), "seeds": [result["seed"] for result in trained],
            "results": trained, "summary": summarise(trained), "versus_baseline": against, "notes": self.notes[run],
        }  # fmt: skip

    def _cost(self) -> dict[str, Any]:
        return {
            "tuning_seconds": sum(self.costs["tune"]),
            "total_seconds": sum(map(sum, self.costs.values())),
            "trainings": sum(map(len, self.costs.values())),
        }

    def _common_notes(self) -> list[str]:
        comparison = self.comparison
        notes = ["Step times are not tested: they also depend on what else the machine was doing."]
        if len(comparison.seeds) < FEWEST_FOR_TEST:
            notes.append(f"A test over seeds needs at least {FEWEST_FOR_TEST} of them; there is no p-value here.")
        elif len(comparison.runs) > 2:
            notes.append("p-values are not corrected for the number of runs that are compared with the baseline.")
        if self.tuned and comparison.tune_steps is not None:
            notes.append(f"Tuned on {comparison.tune_steps} steps, which favours values that learn fast at first.")
        return notes


def _check(comparison: Comparison) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        world = os.environ["WORLD_SIZE"]
        raise UsageError(
            f"a comparison trains in one process at a time; start it without torchrun (WORLD_SIZE={world})"
        )
    comparison.check_runs()
    if comparison.budget == "memory" and comparison.budget_value is None:
        raise UsageError("budget: memory needs a budget_value, such as 24GB")
    sizes = {run: sum(map(len, comparison.tune_for(run).values())) for run in comparison.runs}
    if len(set(sizes.values())) > 1:
        raise UsageError(f"equal terms mean that every run may try as many values: tune has {sizes}")


def _budget_value(comparison: Comparison) -> float | None:
    """What every run got; for steps also where only the recipes say it."""
    if comparison.budget == "memory" or comparison.budget_value is not None:
        return comparison.budget_value
    recipe = comparison.recipe_for(comparison.baseline, comparison.seeds[0])
    value: float | None = {"steps": recipe.steps, "tokens": recipe.max_tokens, "seconds": recipe.max_seconds}[
        comparison.budget
    ]
    return value


def _ending(result: Mapping[str, Any]) -> dict[str, Any]:
    """The event of a training that did not tell of its end itself."""
    status = f"failed: {result['error']}" if result["status"] == "failed" else result["status"]
    return {"kind": "end", "status": status, "seconds": result.get("seconds"), "final": result.get("final")}
