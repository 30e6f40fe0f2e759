"""The figures of the report, as SVG text that inherits the page's font and colours.

A run keeps its colour, dash and marker in every figure. Colours are those of Okabe and Ito (2008), which people with
any of the common colour-vision deficiencies can tell apart; dashes and markers say the same without colour.
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from leantrain.results import finished

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
_DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2), (6, 2, 1.5, 2), (1.5, 2))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
_GREY = "#8A8F98"
"""For everything that is not data: it reads on a white page and on a dark one."""

# 5.2 inches are 374 SVG units: on a phone, where a figure is about as wide, 10 point type stays 10 pixels.
_SIZE = (5.2, 3.4)

KINDS: Mapping[str, tuple[str, str]] = {
    "parameters": ("#0072B2", ""),
    "gradients": ("#56B4E9", "///"),
    "optimizer_state": ("#D55E00", ""),
    "activations": ("#E69F00", "\\\\\\"),
    "other": ("#B8BCC4", "..."),
}
PHASES: Mapping[str, tuple[str, str]] = {
    "data": ("#CC79A7", ""),
    "forward": ("#0072B2", ""),
    "backward": ("#56B4E9", "///"),
    "exchange": ("#009E73", ""),
    "update": ("#D55E00", "\\\\\\"),
    "other": ("#B8BCC4", "..."),
}

MEASURES: Mapping[str, str] = {
    "linear_probe": "Accuracy of a linear probe",
    "nearest_mean": "Accuracy of the nearest class mean",
    "scatter": "Scatter within classes / between them",
    "effective_rank": "Effective rank",
    "alignment": "Alignment with the classes",
    "dead": "Share of dead units",
}
"""What a look at hidden layers measures, as `leantrain.analysis.probe` names it, and a figure's title."""
_EARLIER = 3
"""Most earlier looks that are drawn behind the last one."""


# Text as text (searchable, in the page's font) and never as formulas: a run may well be called "$5".
_drawing = matplotlib.rc_context(
    {"svg.fonttype": "none", "svg.hashsalt": "leantrain", "text.parse_math": False, "font.size": 10,
     "hatch.linewidth": 0.5}
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How a run is drawn, in every figure of a report."""

    colour: str
    dash: tuple[float, ...]
    marker: str

    @property
    def dash_css(self) -> str:
        """The dash as SVG's stroke-dasharray."""
        return " ".join(str(2 * length) for length in self.dash) or "none"


def swatch_css(part: tuple[str, str]) -> str:
    """A (colour, hatch) of KINDS or PHASES as a CSS background."""
    colour, hatch = part
    angle = {"///": "-45deg", "\\\\\\": "45deg", "...": "90deg"}.get(hatch)
    if angle is None:
        return colour
    return f"repeating-linear-gradient({angle}, {colour} 0 3px, #fff 3px 4px)"


def looks(names: Sequence[str]) -> dict[str, Look]:
    """One Look per run. The three cycles have coprime lengths: 252 runs go by before one comes back."""
    return {
        name: Look(_COLOURS[i % len(_COLOURS)], _DASHES[i % len(_DASHES)], _MARKERS[i % len(_MARKERS)])
        for i, name in enumerate(names)
    }


@_drawing
def loss_chart(results: Mapping[str, Any], over: Literal["tokens", "steps", "seconds"]) -> str:
    """Training loss per seed (thin), mean validation loss (strong) and its standard deviation (band)."""
    column = {"steps": 0, "tokens": 1, "seconds": 2}[over]
    figure, axes = _figure(_SIZE)
    for name, look in looks(list(results["runs"])).items():
        done = finished(results["runs"][name]["results"])
        for result in done:
            points = _points(result["curve"]["train"])
            axes.plot([p[column] for p in points], [p[3] for p in points],
                      color=look.colour, alpha=0.45, linewidth=0.8)  # fmt: skip
        _validation(axes, [_points(result["curve"]["val"]) for result in done], column, look)
    _crop_the_start(axes, results)
    axes.set_xlabel({"steps": "steps", "tokens": "tokens", "seconds": "training time (seconds)"}[over])
    axes.set_ylabel("loss")
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    return _svg(figure, f"loss-{over}", f"Loss over {over}: thin lines training, strong lines validation")


def _points(curve: Sequence[Sequence[float | None]]) -> list[list[float]]:
    # A loss that was not finite is stored as null: the line ends there.
    return [[float(x) for x in point if x is not None] for point in curve if None not in point]


def _validation(axes: Axes, curves: list[list[list[float]]], column: int, look: Look) -> None:
    """The mean over seeds, at the steps where every seed was evaluated."""
    by_step = [{int(point[0]): point for point in curve} for curve in curves]
    steps = sorted(set.intersection(*(set(points) for points in by_step))) if by_step else []
    if not steps:
        return
    x = [statistics.fmean(points[s][column] for points in by_step) for s in steps]
    losses = [[points[s][3] for points in by_step] for s in steps]
    mean = [statistics.fmean(values) for values in losses]
    axes.plot(x, mean, color=look.colour, dashes=look.dash or (None, None), marker=look.marker,
              markersize=5, linewidth=2.2)  # fmt: skip
    if len(curves) > 1:
        std = [statistics.stdev(values) for values in losses]
        low, high = [m - s for m, s in zip(mean, std, strict=True)], [m + s for m, s in zip(mean, std, strict=True)]
        axes.fill_between(x, low, high, color=look.colour, alpha=0.2, linewidth=0)


def _crop_the_start(axes: Axes, results: Mapping[str, Any]) -> None:
    """Leave the first steep drop outside: every later difference would be a hair's breadth beside it."""
    done = [result["curve"] for run in results["runs"].values() for result in finished(run["results"])]
    late = [p[3] for curve in done for p in _points(curve["train"])[len(curve["train"]) // 10 :]]
    losses = late + [p[3] for curve in done for p in _points(curve["val"])]
    if losses and max(losses) > min(losses):
        margin = 0.06 * (max(losses) - min(losses))
        axes.set_ylim(min(losses) - margin, max(losses) + margin)


def looks_inside(results: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, dict[str, float]]]:
    """Of one run's results, one per seed: {step: {place: {measure: mean over seeds}}}, at the steps that all of them
    have. A measure that was not finite for one of them is left out."""
    by_step = [{int(line["step"]): line for line in result.get("probes") or []} for result in finished(results)]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    found: dict[int, dict[str, dict[str, float]]] = {}
    for step in steps:
        lines = [seed[step] for seed in by_step]
        for key in lines[0]:
            prefix, _, rest = key.partition("/")
            place, _, measure = rest.rpartition("/")
            values = [line.get(key) for line in lines]
            if prefix == "probe" and place and None not in values:
                found.setdefault(step, {}).setdefault(place, {})[measure] = statistics.fmean(values)
    return found


@_drawing
def depth_chart(results: Mapping[str, Any], measure: str) -> str:
    """A measure of MEASURES from the first place of each network to its last: strong at the last look, faint at some
    earlier ones."""
    figure, axes = _figure(_SIZE)
    for name, look in looks(list(results["runs"])).items():
        inside = list(looks_inside(results["runs"][name]["results"]).values())
        *earlier, last = inside or [{}]
        for number, places in enumerate(evenly(earlier, _EARLIER), start=1):
            values = [place.get(measure, math.nan) for place in places.values()]
            axes.plot(range(len(values)), values, color=look.colour, alpha=0.18 + 0.1 * number, linewidth=0.9)
        values = [place.get(measure, math.nan) for place in last.values()]
        axes.plot(range(len(values)), values, color=look.colour, dashes=look.dash or (None, None), marker=look.marker,
                  markersize=5, linewidth=2.2)  # fmt: skip
    if measure == "scatter":  # a network at its start and one at its end are decades apart
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # by default they would be formulas
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlabel("depth")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    return _svg(
        figure, f"depth-{measure}", f"{MEASURES[measure]} by depth: faint lines earlier, strong lines at the end"
    )


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of `items`, from the first one on in equal strides."""
    return list(items[:: -(-len(items) // most) or 1])


@_drawing
def stacked_bars(
    rows: Mapping[str, Mapping[str, float]],
    totals: Mapping[str, float],
    parts: Mapping[str, tuple[str, str]],
    name: str,
    label: str,
    show: Callable[[float], str],
) -> str:
    """One horizontal bar per run, cut into parts, and behind it the run's total.

    Args:
        rows: {run: {part: amount}}.
        totals: {run: amount}; not always the sum, for parts may have their peaks at different times.
        parts: {part: (colour, hatch)} in their order from left to right.
        name: of the figure, unique in its page.
        label: what the figure shows, for those who do not see it.
        show: writes an amount with its unit.
    """
    figure, axes = _figure((_SIZE[0], 0.9 + 0.42 * len(rows)))
    names = list(rows)
    longest = max((sum(row.values()) for row in rows.values()), default=0.0)
    for y, run in enumerate(names):
        left = 0.0
        for part, (colour, hatch) in parts.items():
            width = rows[run].get(part, 0.0)
            axes.barh(y, width, left=left, height=0.66, color=colour, hatch=hatch, edgecolor="#FFFFFF", linewidth=0.4)
            left += width
        axes.text(left + 0.01 * longest, y, show(totals.get(run, left)), va="center", ha="left", fontsize=10)
    axes.set_yticks(range(len(names)), [_shortened(run) for run in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * longest or 1.0)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes.xaxis.set_major_formatter(lambda value, _: show(value))
    return _svg(figure, name, label)


def _shortened(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(_GREY)
    axes.tick_params(color=_GREY)
    axes.grid(color=_GREY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an <svg> element that scales with the page, with `label` for those who do not see it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
                  rf'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                  rf'viewBox="\1" role="img" aria-label="{label}">', text, count=1)  # fmt: skip
    # Several figures share one page: their ids must not meet.
    return re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", text)
