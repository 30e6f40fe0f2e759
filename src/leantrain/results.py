"""From the results of single runs to the one table a comparison ends with: results.json and results.csv.

A *run result* is what training wrote into a run's result.json; a *comparison's results* hold, for every run, its
results over the seeds, mean and spread of every metric, and how each metric stands against the baseline.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from leantrain.atomic import whole_file, write_text
from leantrain.paired import spread, versus

SCHEMA = 1

Unit = Literal["loss", "percent", "bytes", "seconds", "count", "flops", "joules"]


@dataclass(frozen=True)
class Metric:
    """One figure of a run: its key in the tables, the words for it, its unit, and where a run result keeps it."""

    key: str
    label: str
    unit: Unit
    path: tuple[str, ...]
    tested: bool = False
    """Whether differences are a matter of the seed, so that a test over seeds says something."""

    def of(self, result: Mapping[str, Any]) -> float | None:
        """This metric of one run result; None where it was not measured or is not finite."""
        value: Any = result
        for name in self.path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        return value


METRICS: tuple[Metric, ...] = (
    Metric("val_loss", "validation loss", "loss", ("final", "val_loss"), tested=True),
    Metric("val_perplexity", "validation perplexity", "loss", ("final", "val_perplexity"), tested=True),
    Metric("val_accuracy", "validation accuracy", "percent", ("final", "val_accuracy"), tested=True),
    Metric("train_loss", "training loss", "loss", ("final", "train_loss"), tested=True),
    Metric("seconds", "training time", "seconds", ("seconds",)),
    Metric("step_seconds", "step time (median)", "seconds", ("ledger", "step_seconds", "median")),
    Metric("step_seconds_p99", "step time (99th percentile)", "seconds", ("ledger", "step_seconds", "p99")),
    Metric("peak_bytes", "peak memory", "bytes", ("ledger", "peak_bytes", "total")),
    Metric("parameter_bytes", "parameters", "bytes", ("ledger", "peak_bytes", "parameters")),
    Metric("gradient_bytes", "gradients", "bytes", ("ledger", "peak_bytes", "gradients")),
    Metric("optimizer_state_bytes", "optimizer memory", "bytes", ("ledger", "peak_bytes", "optimizer_state")),
    Metric("activation_bytes", "activations", "bytes", ("ledger", "peak_bytes", "activations")),
    Metric("bytes_sent", "bytes sent", "bytes", ("ledger", "bytes_sent")),
    Metric("flops", "FLOPs", "flops", ("ledger", "flops", "total")),
    Metric("energy_joules", "energy", "joules", ("ledger", "energy_joules")),
    Metric("examples", "examples used", "count", ("examples",)),
    Metric("tokens", "tokens", "count", ("tokens",)),
    Metric("steps", "steps", "count", ("steps",)),
    Metric("parameters", "parameters (number)", "count", ("parameters",)),
)
BY_KEY: Mapping[str, Metric] = {metric.key: metric for metric in METRICS}


def finished(results: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The results of runs that came to their end."""
    return [result for result in results if result.get("status") == "finished"]


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{metric: {"mean", "std", "n"}} over the finished ones of one run's results, one per seed."""
    table = {}
    for metric in METRICS:
        found = spread([v for result in finished(results) if (v := metric.of(result)) is not None])
        if found is not None:
            table[metric.key] = found.to_dict()
    return table


def versus_baseline(results: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{metric: {"difference", "ratio", "p_value", "test", "n"}} over the seeds that both finished."""
    table = {}
    for metric in METRICS:
        found = versus(_by_seed(metric, results), _by_seed(metric, baseline), tested=metric.tested)
        if found is not None:
            table[metric.key] = found.to_dict()
    return table


def _by_seed(metric: Metric, results: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    return {int(r["seed"]): v for r in finished(results) if (v := metric.of(r)) is not None}


def differing_settings(recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{key: {run: value}} for every dotted recipe key in which the runs differ; a run without the key is left out."""
    flat = {run: dict(_flatten(recipe)) for run, recipe in recipes.items()}
    keys = sorted({key for settings in flat.values() for key in settings} - {"name", "seed"})
    table = {key: {run: settings[key] for run, settings in flat.items() if key in settings} for key in keys}
    # As JSON text: 1 and True are equal in Python but are different settings.
    return {
        key: values
        for key, values in table.items()
        if len(values) < len(flat) or len({json.dumps(v, sort_keys=True) for v in values.values()}) > 1
    }


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, inner in value.items():
        if key == "init_args" and isinstance(inner, Mapping):
            # `optim.init_args.lr` is written `optim.lr` everywhere a person writes it.
            yield from _flatten(inner, prefix)
        elif key == "class_path":
            yield prefix.rstrip("."), inner
        elif isinstance(inner, Mapping):
            yield from _flatten(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity replaced by None: JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value


def write_results(results: Mapping[str, Any], folder: Path) -> None:
    """Write results.json and results.csv into `folder`, each whole or not at all."""
    text = json.dumps(finite(results), indent=1, allow_nan=False, ensure_ascii=False)
    write_text(folder / "results.json", text + "\n")
    _write_csv(results, folder / "results.csv")


def _write_csv(results: Mapping[str, Any], path: Path) -> None:
    """One line per training: every seed of every run, and every value tried while tuning."""
    columns = ["run", "purpose", "seed", "status", "tuned_key", "tuned_value", *(m.key for m in METRICS)]
    with whole_file(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for name, run in results["runs"].items():
            tuning = results["tune"].get(name)
            for point in tuning["grid"] if tuning else []:
                writer.writerow(
                    {"run": name, "purpose": "tune", "seed": tuning["seed"], "status": point["status"],
                     "tuned_key": tuning["key"], "tuned_value": point["value"], "val_loss": point["val_loss"]}
                )  # fmt: skip
            for result in run["results"]:
                row = {"run": name, "purpose": "final", "seed": result["seed"], "status": result["status"]}
                if tuning:
                    row |= {"tuned_key": tuning["key"], "tuned_value": tuning["best"]}
                writer.writerow(row | {m.key: m.of(result) for m in METRICS})
