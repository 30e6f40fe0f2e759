"""What is settled for a run before its seeds are trained: the micro-batch that fits, and the best learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from leantrain.recipe import Comparison, Recipe
from leantrain.results import BY_KEY

Train = Callable[[str, Recipe, str], dict[str, Any]]
"""Trains in a folder (relative to the run's), by a recipe, for a purpose ("tune" or "fit"); returns the run result."""

FIT_STEPS = 3
"""Steps of a training that only shows how much memory is needed: the optimizer's state is there after the first."""


def tune(
    train: Train, comparison: Comparison, run: str, settings: Mapping[str, Any], key: str, values: Sequence[Any]
) -> dict[str, Any]:
    """Train once with every value of `key`; the lowest validation loss wins, and what diverged counts as infinite.

    Args:
        settings: recipe keys that are settled already and go into every training.

    Returns:
        {"key", "grid": [{"value", "val_loss", "status", "seconds"}], "best", "at_edge", "seed", "steps", "seconds"};
        "best" is None if no training ended with a loss.
    """
    short = {} if comparison.tune_steps is None else {"steps": comparison.tune_steps}
    # Only the loss at the end counts here; measuring or telling more would only take time.
    quiet = {"ledger": False, "eval_every": 0, "trackers": []}
    grid = []
    for value in values:
        recipe = comparison.recipe_for(run, comparison.tune_seed, **{**settings, **short, **quiet, key: value})
        # Quoted, because a value may be any text, and a folder's name may not.
        result = train(f"tune/{key}={quote(str(value), safe='')}", recipe, "tune")
        grid.append({
            "value": value, "val_loss": BY_KEY["val_loss"].of(result), "status": _status(result),
            "seconds": result.get("seconds", 0.0),
        })  # fmt: skip
    tried = [point for point in grid if point["val_loss"] is not None]
    best = min(tried, key=lambda point: point["val_loss"])["value"] if tried else None
    return {
        "key": key, "grid": grid, "best": best, "at_edge": at_edge(best, values),
        "seed": comparison.tune_seed, "steps": comparison.tune_steps, "seconds": math.fsum(p["seconds"] for p in grid),
    }  # fmt: skip


def at_edge(best: Any, values: Sequence[Any]) -> bool:
    """Whether `best` is the lowest or highest of several numbers, so that the search may have ended too early."""
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return numbers and len(values) > 1 and best in (min(values), max(values))


def _status(result: Mapping[str, Any]) -> str:
    """finished, diverged, or why it failed."""
    if result["status"] != "finished":
        error = str(result.get("error", ""))
        return "diverged" if _NOT_FINITE.search(error) else f"failed: {error}"
    return "diverged" if BY_KEY["val_loss"].of(result) is None else "finished"


_NOT_FINITE = re.compile(r"\b(nan|inf|not finite|non-?finite)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Fit:
    """How a run keeps to its memory budget: with `accumulate` micro-batches a step, or (None) not at all.

    Attributes:
        note: what to tell about it; empty where the run fits as it was given.
        failed: the result of a training that failed for another reason than memory.
    """

    accumulate: int | None
    note: str = ""
    failed: dict[str, Any] | None = None


def fit(train: Train, comparison: Comparison, run: str, limit: float) -> Fit:
    """Cut the batch into ever smaller micro-batches until the measured peak of a few steps is at most `limit` bytes."""
    seed = comparison.seeds[0]
    asked = comparison.recipe_for(run, seed)
    accumulate = asked.accumulate
    while True:
        probe = comparison.recipe_for(
            run, seed, accumulate=accumulate, steps=min(FIT_STEPS, asked.steps),
            ledger=True, trackers=[], eval_every=0, eval_batches=1,
        )  # fmt: skip
        result = train(f"fit/accumulate={accumulate}", probe, "fit")
        peak = peak_of(result)
        size = asked.batch_size // accumulate
        if peak is None and not _ran_out_of_memory(result):
            return Fit(None, failed=result)
        if peak is not None and peak <= limit:
            note = f"micro-batches made smaller to fit: {size} of {asked.batch_size} examples each"
            return Fit(accumulate, "" if accumulate == asked.accumulate else note)
        if size == 1:
            needs = "memory runs out" if peak is None else f"it needs {megabytes(peak)}"
            return Fit(None, f"with micro-batches of 1 example {needs}; the budget is {megabytes(limit)}")
        accumulate = next_split(asked.batch_size, accumulate)


def next_split(batch_size: int, accumulate: int) -> int:
    """The number of micro-batches after `accumulate`: twice as many, or the next number that divides the batch."""
    return next(n for n in range(min(2 * accumulate, batch_size), batch_size + 1) if batch_size % n == 0)


def peak_of(result: Mapping[str, Any]) -> float | None:
    """The measured peak memory of a training in bytes; None where it was not measured."""
    return BY_KEY["peak_bytes"].of(result)


def megabytes(count: float) -> str:
    """A number of bytes for a note."""
    return f"{count / 1e6:,.1f} MB"


def _ran_out_of_memory(result: Mapping[str, Any]) -> bool:
    words = str(result.get("error", "")).lower()
    return any(sign in words for sign in ("out of memory", "memoryerror", "can't allocate memory", "sigkill"))
