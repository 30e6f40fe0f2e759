"""The report's page: what stands in its tables, in which order, and the file it becomes.

The page is one file without scripts and without a single request: styles and figures are inside. Every string that
came from a user (names, settings, error messages) passes through the template's automatic escaping.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import leantrain
from leantrain.atomic import write_text
from leantrain.report import charts
from leantrain.report.words import (
    change,
    duration,
    evidence,
    mean_and_spread,
    quality_metric,
    quantity,
    signed,
    verdict,
)
from leantrain.results import BY_KEY, finished


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows; with `cards` every row becomes a card on a narrow screen."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    cards: bool = False


@dataclass(frozen=True)
class Chart:
    """A figure with its title, and what its colours mean where a run's own colour is not used."""

    title: str
    svg: Markup
    legend: Sequence[tuple[str, str]] = ()


def write_report(results: Mapping[str, Any], path: Path | str) -> None:
    """Write the results of a comparison (as in results.json) as one self-contained HTML page, whole or not at all."""
    folder = resources.files("leantrain.report")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        folder.joinpath("page.html").read_text(encoding="utf-8")
    )
    css = Markup(folder.joinpath("style.css").read_text(encoding="utf-8"))
    write_text(path, template.render(_contents(results), css=css, version=leantrain.__version__) + "\n")


def _contents(results: Mapping[str, Any]) -> dict[str, Any]:
    looks = charts.looks(list(results["runs"]))
    return {
        "title": results["name"],
        "subtitle": _subtitle(results),
        "verdicts": [{"name": n, "look": look, "text": verdict(results, n)} for n, look in looks.items()],
        "runs": _runs_table(results),
        "losses": _loss_charts(results),
        "losses_key": _losses_key(results),
        "depths": _depth_charts(results),
        "depths_key": _depths_key(results),
        "costs_charts": _cost_charts(results),
        "used": _used_table(results),
        "tuning": _tuning_table(results),
        "settings": _settings_table(results),
        "cost": _cost(results["cost"]),
        "environment": Table("Where it ran", ["What", "Value"], list(_flat(results["environment"]))),
        "command": results["command"],
        "comparison": results.get("comparison"),
        "notes": _notes(results),
    }


def _subtitle(results: Mapping[str, Any]) -> str:
    budget = results["budget"]
    amount = "" if budget["value"] is None else f" ({_budget_amount(budget)})"
    parts = [
        f"{len(results['runs'])} runs",
        f"equal {budget['kind']}{amount}",
        f"seed{'s' if len(results['seeds']) > 1 else ''} {', '.join(map(str, results['seeds']))}",
        results["created"],
    ]
    if results["status"] == "interrupted":
        parts.append("interrupted: this is what was done until then")
    return " · ".join(parts)


def _budget_amount(budget: Mapping[str, Any]) -> str:
    units: dict[str, Any] = {"memory": "bytes", "seconds": "seconds"}
    return quantity(budget["value"], units.get(budget["kind"], "count"))


def _runs_table(results: Mapping[str, Any]) -> Table:
    runs = results["runs"]
    summaries = {name: run["summary"] for name, run in runs.items()}
    quality = quality_metric(next((s for s in summaries.values() if s), {}))
    shown = [quality, "step_seconds", "seconds", "peak_bytes", "optimizer_state_bytes"]
    head = ["Run", *(_title(BY_KEY[key].label) for key in shown)]
    head[2:2] = ["Against the baseline", "Seeds"]
    rows = []
    for name, run in runs.items():
        values = [mean_and_spread(summaries[name].get(key), BY_KEY[key].unit) for key in shown]
        values[1:1] = [_against(results, name, quality), _seeds(results, run)]
        rows.append([name, *values])
    return Table("Means over seeds, ± sample standard deviation", head, rows, cards=True)


def _against(results: Mapping[str, Any], name: str, quality: str) -> str:
    against = results["runs"][name]["versus_baseline"]
    if name == results["baseline"]:
        return "is the baseline"
    if quality not in against:
        return quantity(None, "loss")
    tested = "val_loss" if quality == "val_perplexity" and "val_loss" in against else quality
    if quality == "val_accuracy":
        return f"{signed(100 * against[quality]['difference'])} points ({evidence(against[tested])})"
    return f"{change(against[quality], '').strip()} ({evidence(against[tested])})"


def _seeds(results: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    done = len(finished(run["results"]))
    words = f"{done} of {len(results['seeds'])}"
    return words if run["status"] == "finished" else f"{words}, {run['status']}"


def _loss_charts(results: Mapping[str, Any]) -> list[Chart]:
    done = [result for run in results["runs"].values() for result in finished(run["results"])]
    if not done:
        return []
    progress: Literal["tokens", "steps"] = "tokens" if any(result["tokens"] for result in done) else "steps"
    return [
        Chart(f"Loss over {progress}", Markup(charts.loss_chart(results, progress))),
        Chart("Loss over time", Markup(charts.loss_chart(results, "seconds"))),
    ]


def _losses_key(results: Mapping[str, Any]) -> str:
    key = "Thin lines: training loss. Strong lines with markers: validation loss"
    return f"{key}, mean over seeds; band: one standard deviation." if len(results["seeds"]) > 1 else f"{key}."


def _depth_charts(results: Mapping[str, Any]) -> list[Chart]:
    if not any(charts.looks_inside(run["results"]) for run in results["runs"].values()):
        return []
    return [Chart(title, Markup(charts.depth_chart(results, key))) for key, title in charts.MEASURES.items()]


def _depths_key(results: Mapping[str, Any]) -> str:
    """What the lines mean, and the places along them where all runs have the same."""
    inside = [charts.looks_inside(run["results"]) for run in results["runs"].values()]
    networks = {tuple(next(reversed(steps.values()))) for steps in inside if steps}
    key = "The features that go into each layer, on held-out data. Strong lines: at the end; faint lines: earlier."
    if len(networks) != 1:
        return key
    return f"{key} Depth: {', '.join(f'{number} {name}' for number, name in enumerate(networks.pop()))}."


def _cost_charts(results: Mapping[str, Any]) -> list[Chart]:
    made = []
    memory = _mean_parts(results, "peak_bytes", charts.KINDS)
    if memory:
        made.append(
            _bars("memory", "Peak memory by kind", memory, _means(results, "peak_bytes"), charts.KINDS,
                  lambda amount: quantity(amount, "bytes"))
        )  # fmt: skip
    phases = _mean_parts(results, "phase_seconds", charts.PHASES)
    if phases:
        made.append(
            _bars("phases", "Time of a step by phase", phases, _means(results, "step_seconds"), charts.PHASES, duration)
        )
    return made


def _means(results: Mapping[str, Any], key: str) -> dict[str, float]:
    return {name: run["summary"][key]["mean"] for name, run in results["runs"].items() if key in run["summary"]}


def _mean_parts(results: Mapping[str, Any], name: str, parts: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """{run: {part: mean over the finished seeds}} of one table of the ledger; runs without a ledger are left out."""
    rows = {}
    for run, entry in results["runs"].items():
        tables = [r["ledger"][name] for r in finished(entry["results"]) if r.get("ledger")]
        if tables:
            rows[run] = {part: statistics.fmean(table.get(part) or 0.0 for table in tables) for part in parts}
    return rows


def _bars(
    name: str,
    title: str,
    rows: dict[str, dict[str, float]],
    totals: dict[str, float],
    parts: Mapping[str, tuple[str, str]],
    show: Callable[[float], str],
) -> Chart:
    used = {part: look for part, look in parts.items() if any(row[part] for row in rows.values())}
    svg = charts.stacked_bars(rows, totals, used, name, title, show)
    return Chart(title, Markup(svg), [(part.replace("_", " "), charts.swatch_css(look)) for part, look in used.items()])


def _used_table(results: Mapping[str, Any]) -> Table:
    shown = ["flops", "bytes_sent", "energy_joules", "examples", "tokens", "steps", "parameters"]
    head = ["Run", *(_title(BY_KEY[key].label) for key in shown)]
    caption, rows = "One training, mean over seeds", []
    for name, run in results["runs"].items():
        cells = {key: mean_and_spread(run["summary"].get(key), BY_KEY[key].unit) for key in shown}
        sources = [r["ledger"]["energy_source"] for r in finished(run["results"]) if r.get("ledger")]
        if sources and "energy_joules" not in run["summary"]:
            cells["energy_joules"] = "not available"
            if sources[0] not in caption:
                caption += f". Energy {sources[0]}"
        rows.append([name, *cells.values()])
    return Table(caption, head, rows)


def _tuning_table(results: Mapping[str, Any]) -> Table | None:
    gap, rows = "\N{NO-BREAK SPACE}", []
    for name, tuning in results["tune"].items():
        for point in tuning["grid"]:
            loss = quantity(point["val_loss"], "loss") if point["val_loss"] is not None else point["status"]
            best = "taken" if point["value"] == tuning["best"] else ""
            if best and tuning["at_edge"]:
                best = "taken (edge)"
            rows.append([name, f"{tuning['key']}{gap}={gap}{_plain(point['value'])}", loss, best])
    if not rows:
        return None
    any_tuning = next(iter(results["tune"].values()))
    steps = f", {any_tuning['steps']:,} steps" if any_tuning["steps"] else ""
    caption = f"Each value trained once with seed {any_tuning['seed']}{steps}; the lowest validation loss is taken"
    return Table(caption, ["Run", "Tried", "Validation loss", "Choice"], rows)


def _settings_table(results: Mapping[str, Any]) -> Table:
    names = list(results["runs"])
    rows = [
        [key, *(_plain(values[name]) if name in values else quantity(None, "count") for name in names)]
        for key, values in results["settings"].items()
    ]
    return Table("Everything else is the same in all runs", ["Setting", *names], rows)


def _cost(cost: Mapping[str, Any]) -> str:
    total, tuning = cost["total_seconds"], cost["tuning_seconds"]
    words = f"{cost['trainings']} trainings took {duration(total)} of training time, evaluation not counted"
    if not tuning:
        return f"{words}. Nothing was tuned."
    return f"{words}; {duration(tuning)} of it ({100 * tuning / total:.0f}\N{NO-BREAK SPACE}%) went into tuning."


def _notes(results: Mapping[str, Any]) -> list[str]:
    notes = list(results["notes"])
    for name, run in results["runs"].items():
        texts = [*run["notes"], *(note for result in run["results"] for note in result.get("notes", []))]
        notes += [f"{name}: {text}" for text in dict.fromkeys(texts)]
    return notes


def _title(words: str) -> str:
    return words[:1].upper() + words[1:]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{key} ")
        elif inner is not None:
            shown = quantity(inner, "bytes") if key.endswith("_bytes") else _plain(inner)
            yield f"{prefix}{key}".removesuffix("_bytes").replace("_", " "), shown


def _plain(value: Any) -> str:
    """A setting as it would be written in YAML on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
