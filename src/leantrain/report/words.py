"""Numbers as people read them, and the one sentence per run that they add up to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from leantrain.results import BY_KEY, Unit, finished

SIGNIFICANT = 0.05
"""The p-value below which a difference is called one; above it, it is called within the noise of the seeds."""

MINUS, TIMES, PLUS_MINUS = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{PLUS-MINUS SIGN}"

# Short for tables and sentences: a space that does not break between a number and its unit.
_GAP = "\N{NO-BREAK SPACE}"


def verdict(results: Mapping[str, Any], name: str) -> str:
    """What came of the run `name`, in one sentence made from its numbers, without judging what nobody measured."""
    run, baseline = results["runs"][name], results["runs"][results["baseline"]]
    done, planned = len(finished(run["results"])), len(results["seeds"])
    if not done:
        return _without_result(run)
    if name == results["baseline"]:
        return _sentence(["baseline", *_absolute(run["summary"])], done, planned)
    if not finished(baseline["results"]):
        return _sentence(["the baseline has no result to compare with", *_absolute(run["summary"])], done, planned)
    against = run["versus_baseline"]
    clauses = [
        change(against.get("optimizer_state_bytes"), "optimizer memory"),
        change(against.get("peak_bytes"), "peak memory"),
        _quality(against),
        _step_time(against.get("step_seconds")),
    ]
    return _sentence([clause for clause in clauses if clause], done, planned)


def quality_metric(table: Mapping[str, Any]) -> str:
    """The key people judge this task by: perplexity of text, accuracy of a classifier, otherwise the loss."""
    return next((key for key in ("val_perplexity", "val_accuracy") if key in table), "val_loss")


def evidence(against: Mapping[str, Any]) -> str:
    """How much the seeds say about a difference: a p-value, noise, or why there is no statement."""
    n, p_value = against["n"], against["p_value"]
    if n == 1:
        return "one seed: no statement about noise"
    if n == 2:
        return "two seeds: too few for a test"
    if p_value is None:
        return str(against["test"])
    words = f"{p_text(p_value)}, {n} seeds"
    return words if p_value < SIGNIFICANT else f"within the noise of the seeds, {words}"


def change(against: Mapping[str, Any] | None, what: str) -> str:
    """`what` with its relative change in percent; empty when it was not measured for both."""
    if against is None or against["ratio"] is None:
        return ""
    if abs(against["ratio"] - 1) < 0.0005:
        return f"{what} unchanged"
    return f"{what} {percent(against['ratio'] - 1)}"


def _quality(against: Mapping[str, Any]) -> str:
    key = quality_metric(against)
    if key not in against:
        return "no validation loss in common with the baseline"
    label = BY_KEY[key].label
    if key == "val_accuracy":
        moved = f"{label} {signed(100 * against[key]['difference'])}{_GAP}points"
    else:
        moved = change(against[key], label) or f"{label} {signed(against[key]['difference'])}"
    # Perplexity is the exponential of the loss: the test is made on the loss, whose noise is closer to normal.
    tested = "val_loss" if key == "val_perplexity" and "val_loss" in against else key
    return f"{moved} ({evidence(against[tested])})"


def _step_time(against: Mapping[str, Any] | None) -> str:
    if against is None or against["ratio"] is None:
        return ""
    return f"step time {TIMES}{against['ratio']:.2f}"


def _absolute(summary: Mapping[str, Any]) -> list[str]:
    keys = [quality_metric(summary), "optimizer_state_bytes", "peak_bytes", "step_seconds"]
    words = [f"{BY_KEY[key].label} {mean_and_spread(summary[key], BY_KEY[key].unit)}" for key in keys if key in summary]
    return [word.replace(" (median)", "") for word in words]


def _without_result(run: Mapping[str, Any]) -> str:
    errors = [result["error"] for result in run["results"] if result.get("error")]
    reason = errors[-1] if errors else next(iter(run["notes"]), "")
    return f"{run['status']}{': ' if reason else ''}{reason}"


def _sentence(clauses: list[str], done: int, planned: int) -> str:
    if done < planned:
        clauses = [*clauses, f"only {done} of {planned} seeds finished"]
    return ", ".join(clauses) + "."


def quantity(value: float | None, unit: Unit) -> str:
    """`value` with three significant digits and the unit that suits its size."""
    if value is None:
        return "\N{EN DASH}"
    if unit == "loss":
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.2e}"
    if unit == "percent":
        return f"{100 * value:.2f}{_GAP}%"
    if unit == "seconds":
        return duration(value)
    if unit == "count":
        return f"{value:,.0f}" if value < 1e6 else _scaled(value, ["", "", "M", "G", "T"])
    prefixes = {"bytes": ["B", "kB", "MB", "GB", "TB", "PB"], "joules": ["J", "kJ", "MJ", "GJ"],
                "flops": ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP"]}  # fmt: skip
    return _scaled(value, prefixes[unit])


def duration(seconds: float) -> str:
    """Seconds as microseconds to hours, three significant digits."""
    if seconds == 0:
        return f"0{_GAP}s"
    if seconds < 1e-3:
        return f"{_three(seconds * 1e6)}{_GAP}µs"
    if seconds < 1:
        return f"{_three(seconds * 1e3)}{_GAP}ms"
    if seconds < 120:
        return f"{_three(seconds)}{_GAP}s"
    if seconds < 7200:
        return f"{_three(seconds / 60)}{_GAP}min"
    return f"{_three(seconds / 3600)}{_GAP}h"


def mean_and_spread(entry: Mapping[str, Any] | None, unit: Unit) -> str:
    """Mean, and the sample standard deviation where there is one that can be seen."""
    if entry is None:
        return quantity(None, unit)
    mean, std = entry["mean"], entry["std"]
    if not std or std < 1e-4 * abs(mean):
        return quantity(mean, unit)
    if unit == "loss" and std < 10:
        # Two digits of the spread say how many digits of the mean mean anything.
        digits = 1 - math.floor(math.log10(std))
        return f"{mean:.{digits}f} {PLUS_MINUS}{_GAP}{std:.{digits}f}"
    return f"{quantity(mean, unit)} {PLUS_MINUS}{_GAP}{quantity(std, unit)}"


def percent(fraction: float) -> str:
    """A relative change as signed percent with two digits, more where they are needed to see it."""
    return f"{signed(100 * fraction)}{_GAP}%"


def signed(value: float) -> str:
    """`value` with its sign, a true minus, and two significant digits (all of them before the point)."""
    if value == 0:
        return "0"
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    text = f"{abs(value):.{digits}f}"
    return f"{MINUS if value < 0 else '+'}{text}"


def p_text(p_value: float) -> str:
    """A p-value as it is written: never 0."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def _scaled(value: float, prefixes: list[str]) -> str:
    power = 0
    while abs(value) >= 1000 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    number = f"{value:.0f}" if power == 0 and value == int(value) else _three(value)
    return f"{number}{_GAP}{prefixes[power]}".rstrip(_GAP)


def _three(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
