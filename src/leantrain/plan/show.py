"""A plan for people, for programs, and as a picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from leantrain.display import size, table
from leantrain.errors import UsageError
from leantrain.plan.check import Measured
from leantrain.plan.plan import KINDS, Combination, Plan, Prediction

SCHEMA = 1
"""Version of the JSON; docs/planner.md describes it. Keys are added to a version, never taken away or changed."""
_LABELS = {
    "parameters": "weights",
    "gradients": "gradients",
    "optimizer_state": "state",
    "activations": "activations",
    "temporary": "temporary",
}
# Okabe and Ito (2008): distinguishable with any of the common colour-vision deficiencies; hatches say the same.
_LOOKS = {
    "parameters": ("#0072B2", ""),
    "gradients": ("#E69F00", "//"),
    "optimizer_state": ("#009E73", ".."),
    "activations": ("#CC79A7", "\\\\"),
    "temporary": ("#999999", "xx"),
}
_WIDTH = 140
_PICTURES = (".png", ".svg", ".pdf")


def show(plan: Plan, *, everything: bool = False) -> None:
    """Print the plan: of each method the form that changes least among those that fit, or all of them."""
    shown = plan.predictions if everything else plan.best_of_each()
    _say(f"{_title(plan)}, on {plan.device}, in {size(plan.memory)}: {plan.parameters:,} parameters")
    rows = []
    for prediction in shown:
        over = prediction.peak - plan.memory
        rows.append([
            _in_two_lines(prediction.combination),
            *(size(prediction.at_peak[kind]) for kind in KINDS),
            size(prediction.peak) + (f" (+{size(over)})" if over > 0 else ""),
            f"{prediction.flops_share:.1%}",
        ])  # fmt: skip
    head = ["at the worst moment", *(_LABELS[kind] for kind in KINDS), "together", "step FLOPs"]
    console = Console(highlight=False)
    # Where there is not enough room, lines are broken by the terminal; rich would cut figures off.
    table(head, rows, Console(highlight=False, width=max(console.width, _WIDTH)), numbers=True)
    costs = [f"{p.combination.method}: {p.costs[0]}" for p in shown if p.costs]
    costs += [cost for p in shown for cost in p.costs[1:]]
    _say("", *(f"- {cost}" for cost in dict.fromkeys(costs)), *(f"* {line}" for line in plan.advice[1:]))


def show_check(prediction: Prediction, measured: Measured) -> None:
    """Print predicted beside measured, kind by kind."""
    _say("", f"two real steps of {prediction.combination}")
    kinds = [kind for kind in KINDS if kind in prediction.peaks]
    rows = [[_LABELS[kind], *_against(prediction.peaks[kind], measured.by_kind[kind])] for kind in kinds]
    rows.append(["together", *_against(prediction.peak, measured.peak)])
    table(["most bytes of", "predicted", "measured", "off by"], rows, numbers=True)


def to_json(plan: Plan, check: tuple[Prediction, Measured] | None = None) -> dict[str, Any]:
    """The plan as plain data, stable within a `schema`."""
    described: dict[str, Any] = {
        "schema": SCHEMA,
        "model": plan.subject,
        **plan.shape,
        "parameters": plan.parameters,
        "device": plan.device,
        "memory_bytes": plan.memory,
        "fits": bool(plan.fitting),
        "combinations": [_described(prediction, plan.memory) for prediction in plan.predictions],
        "advice": list(plan.advice),
    }
    if check is not None:
        prediction, measured = check
        described["check"] = {
            "combination": str(prediction.combination),
            "predicted": {**prediction.peaks, "peak": prediction.peak},
            "measured": {**measured.by_kind, "peak": measured.peak},
        }
    return described


def picture(plan: Plan, file: Path) -> None:
    """Draw the plan's bars, one per method, with the memory as a line.

    Raises:
        UsageError: the file's name does not end in .png, .svg or .pdf, or it cannot be written.
    """
    check_picture(file)
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = plan.best_of_each()
    figure = Figure(figsize=(9, 1.3 + 0.42 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    for kind in KINDS:
        colour, hatch = _LOOKS[kind]
        widths = [prediction.at_peak[kind] for prediction in shown]
        lefts = [sum(p.at_peak[before] for before in KINDS[: KINDS.index(kind)]) for p in shown]
        axes.barh(range(len(shown)), widths, left=lefts, height=0.66, color=colour, hatch=hatch, edgecolor="white",
                  linewidth=0.4, label=_LABELS[kind])  # fmt: skip
    largest = max(plan.memory, *(prediction.peak for prediction in shown))
    for y, prediction in enumerate(shown):
        beside = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the line of the memory
        axes.text(prediction.peak + 0.008 * largest, y, size(prediction.peak), va="center", fontsize=9, bbox=beside)
    axes.axvline(plan.memory, color="black", linestyle="--", linewidth=1.2, label=f"memory, {size(plan.memory)}")
    axes.set_yticks(range(len(shown)), [_in_two_lines(p.combination) for p in shown], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.13 * largest)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(lambda value, _: size(value))
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{_title(plan)}: what a step holds at its worst moment", x=0.01, ha="left", fontsize=11)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error}") from error


def check_picture(file: Path) -> None:
    """Refuse a name that no picture can have, before any work."""
    if file.suffix not in _PICTURES:
        raise UsageError(f"picture must end in {', '.join(_PICTURES)}, got {str(file)!r}")


def _described(prediction: Prediction, memory: int) -> dict[str, Any]:
    combination = prediction.combination
    return {
        "method": combination.method,
        "dtype": combination.dtype,
        "step_in_backward": combination.in_backward,
        "activation_checkpointing": combination.checkpointing,
        "own": combination.own,
        "deviation": combination.deviation,
        "fits": prediction.peak <= memory,
        "peak_bytes": prediction.peak,
        "at_peak": dict(prediction.at_peak),
        "peaks": dict(prediction.peaks),
        "optimizer_flops_share": round(prediction.flops_share, 6),
        "optimizer_moved_share": round(prediction.moved_share, 6),
        "costs": list(prediction.costs),
    }


def _in_two_lines(combination: Combination) -> str:
    method, _, rest = str(combination).partition(", ")
    return f"{method}\n  {rest}"


def _title(plan: Plan) -> str:
    return ", ".join([plan.subject, *(f"{name} {value}" for name, value in plan.shape.items())])


def _say(*lines: str) -> None:
    """Print lines as they are, however long: rich would break them where a terminal is narrow."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _against(predicted: int, measured: int | None) -> Sequence[str]:
    if not measured:
        return (f"{predicted:,}", "none" if measured == 0 else "not measured", "")
    return (f"{predicted:,}", f"{measured:,}", f"{predicted / measured - 1:+.2%}")
