"""What the hidden layers of a network do: six measures of the features, layer by layer (Alain and Bengio).

Costs one forward pass over the examples that are looked at, and for each place the eigenvectors of a matrix as wide as
the features, at most as wide as half the examples. Saves nothing by itself: it shows which layers do the work, from
where on nothing is gained (see `leantrain.analysis.EarlyExit`) and what a local loss does to the layers above it.

    linear_probe      held-out accuracy of a ridge regression onto the classes (see `leantrain.analysis.read_out`)
    nearest_mean      held-out accuracy of taking the class whose mean is nearest
    scatter           sum ||h - mean of its class||^2 / sum ||mean of its class - mean||^2
    effective_rank    exp(-sum p log p), p = s / sum s; s: singular values of the centred features
    alignment         <K, L> / (||K|| ||L||); K: cosines of examples, L: 1 for those of one class; centred
    dead              share of units that never change

Sources: Alain & Bengio 2016 (arXiv 1610.01644); Roy & Vetterli 2007 (EUSIPCO), effective rank; Cortes, Mohri &
Rostamizadeh 2012 (JMLR), centred alignment; Nøkland & Eidnes 2019 (ICML, arXiv 1901.06656), similarity of examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leantrain.analysis.hidden import Hidden, look
from leantrain.analysis.read_out import Ridge, fit_ridge
from leantrain.atomic import whole_file
from leantrain.errors import UsageError

MEASURES: Mapping[str, str] = {
    "linear_probe": "linear probe, accuracy",
    "nearest_mean": "nearest class mean, accuracy",
    "scatter": "scatter within / between classes",
    "effective_rank": "effective rank",
    "alignment": "alignment with the classes",
    "dead": "dead units, share",
}


@dataclass(frozen=True)
class Place:
    """What the features are like that go into one module."""

    name: str
    """The module's; "input" for what the model itself is given."""
    width: int
    """Numbers per example, after pooling."""
    linear_probe: float
    nearest_mean: float
    scatter: float
    """Infinite where all class means are the same."""
    effective_rank: float
    """From 1 to the width or one less than the examples fitted with; 0 where all features are constant."""
    alignment: float
    """From 0 to 1."""
    dead: float


@dataclass(frozen=True)
class Probed:
    """A network seen layer by layer."""

    places: tuple[Place, ...]
    """In the order of a forward pass."""
    accuracy: float
    """Of the model's own output, on the examples that the probes are judged by."""
    examples: int
    """That many were seen; of texts, positions. Half of them serve to fit, half to judge."""
    classes: int
    """Different labels among them."""

    @property
    def best(self) -> Place:
        """The first of those with the highest linear probe."""
        return max(self.places, key=lambda place: place.linear_probe)

    def to_dict(self) -> dict[str, Any]:
        """As plain data; an infinite scatter stays infinite."""
        return asdict(self)

    def scalars(self) -> dict[str, float]:
        """For a log: `probe/PLACE/MEASURE`, in the order of the places, and the model's own `probe/accuracy`."""
        measures = {
            f"probe/{place.name}/{name}": float(getattr(place, name)) for place in self.places for name in MEASURES
        }
        return {**measures, "probe/accuracy": self.accuracy}

    def table(self) -> str:
        """One line per place, aligned for a terminal."""
        head = ["into", *(each.name for each in fields(Place)[1:])]
        rows = [[p.name, str(p.width), *(f"{getattr(p, name):.4g}" for name in MEASURES)] for p in self.places]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in (head, *rows)
        ]
        own = f"the model's own accuracy: {self.accuracy:.4g} ({self.examples} examples, {self.classes} classes)"
        return "\n".join([*lines, own])

    def plot(self, path: str | Path) -> None:
        """Draw the six measures by depth and write them to `path` as PNG."""
        draw_probes({"": self}, path)


def probe(
    model: nn.Module, loader: Iterable[Any], *, names: Sequence[str] | None = None, examples: int = 2048,
    shuffle: bool = False,
) -> Probed:  # fmt: skip
    """Look at a network's hidden layers; it is run in evaluation mode and left as it was.

    Args:
        model: any module that classifies: inputs [B, ...] to logits [B, classes], or [B, T] tokens to [B, T, classes].
        loader: gives `(inputs, targets)` or objects with these names. Held-out examples tell what the layers know of
            the task, training examples also what they learned by heart.
        names: modules into which to look: their inputs, in the order given. None: all places between computations
            with weights around which no other way leads, and the model's input where it is real numbers.
        examples: how many to see, >= 4; of texts, how many positions, at most 16 of a sequence.
        shuffle: whether to draw them from all that `loader` gives, the same ones each time. Otherwise its first ones
            are taken, which should then be in random order.

    Features are pooled first: tokens to their mean, unless each has its own target; maps to at most 1,024 numbers.

    Raises:
        UsageError: `examples` is out of range; targets that are no classes; an unknown name, or a module without a
            single input of features; half of the examples has fewer than two classes.
        RunError: features that are not finite.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> inputs = torch.randn(200, 8)
        >>> found = probe(model, [(inputs, (inputs[:, 0] > 0).long())])
        >>> [place.name for place in found.places]
        ['input', '2']
    """
    return measured(look(model, loader, names, examples, shuffle))[0]


def measured(hidden: Hidden) -> tuple[Probed, dict[str, Ridge]]:
    """What was seen, measured; and the read-outs, for labels numbered by their order among those that were seen."""
    present, labels = torch.unique(hidden.labels, return_inverse=True)
    classes, fitting = len(present), hidden.fitting
    ridges = {name: fit_ridge(each[fitting], labels[fitting], classes) for name, each in hidden.features.items()}
    places = []
    for name, features in hidden.features.items():
        x = features.double()
        right = {
            "linear_probe": ridges[name].predicted(x[~fitting]),
            "nearest_mean": _nearest_mean(x[fitting], labels[fitting], x[~fitting], classes),
        }
        places.append(
            Place(
                name, features.shape[1],
                **{key: float((guess == labels[~fitting]).double().mean()) for key, guess in right.items()},
                scatter=_scatter(x, labels, classes),
                effective_rank=_effective_rank(ridges[name].singular_values),
                alignment=_alignment(x, labels, classes),
                dead=hidden.dead[name],
            )
        )  # fmt: skip
    own = float((hidden.predicted == hidden.labels)[~fitting].double().mean())
    return Probed(tuple(places), own, len(labels), classes), ridges


def draw_probes(probes: Mapping[str, Probed], path: str | Path) -> None:
    """Draw the six measures by depth, a line for each of `probes`, and write them to `path` as PNG.

    Args:
        probes: by what to call them, such as a moment of training or another network.

    Raises:
        UsageError: there are none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot, which wants a display and keeps figures
    from matplotlib.figure import Figure

    if not probes:
        raise UsageError("there are no probes to draw")
    figure = Figure(figsize=(10, 5.6), dpi=120, layout="constrained")
    panels = figure.subplots(2, 3, sharex=True).flatten()
    longest = max((found.places for found in probes.values()), key=len)
    for panel, (name, meaning) in zip(panels, MEASURES.items(), strict=True):
        for label, found in probes.items():
            values = [getattr(place, name) for place in found.places]
            (line,) = panel.plot(range(len(values)), values, marker="o", markersize=3.5, label=label)
            if name == "linear_probe":
                panel.axhline(found.accuracy, color=line.get_color(), linestyle=":", linewidth=1)
        if name == "scatter":
            panel.set_yscale("log")
        panel.set_title(meaning, fontsize="medium")
        panel.set_xticks(range(len(longest)), [place.name for place in longest], rotation=60, fontsize="x-small")
    if len(probes) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    with whole_file(path) as file:
        FigureCanvasAgg(figure).print_png(str(file))


def _means(x: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """[classes, width] each class's mean, and [classes] how many it has."""
    counts = torch.bincount(labels, minlength=classes).to(x.dtype)
    sums = x.new_zeros(classes, x.shape[1]).index_add_(0, labels, x)
    return sums / counts.clamp_min(1)[:, None], counts


def _nearest_mean(x: Tensor, labels: Tensor, others: Tensor, classes: int) -> Tensor:
    """[m] the class of each of `others` [m, width] whose mean over `x` is nearest."""
    means, counts = _means(x, labels, classes)
    distances = torch.cdist(others, means, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.masked_fill(counts == 0, math.inf).argmin(1)


def _scatter(x: Tensor, labels: Tensor, classes: int) -> float:
    means, counts = _means(x, labels, classes)
    within = (x - means[labels]).square().sum()
    between = ((means - x.mean(0)).square().sum(1) * counts).sum()
    nothing = torch.finfo(x.dtype).eps ** 2 * x.square().sum()  # of means that differ by rounding
    return float(within / between) if between > nothing else math.inf


def _effective_rank(singular_values: Tensor) -> float:
    if not len(singular_values):
        return 0.0
    p = singular_values / singular_values.sum()
    return float(torch.special.entr(p).sum().exp())


def _alignment(x: Tensor, labels: Tensor, classes: int) -> float:
    """Without either matrix of all pairs where the features are fewer than the examples."""
    x = F.normalize(x - x.mean(1, keepdim=True), eps=1e-30)  # cosines are products of such rows
    y = F.one_hot(labels, classes).to(x.dtype)
    x, y = x - x.mean(0), y - y.mean(0)
    norms = [torch.linalg.matrix_norm(each @ each.T if each.shape[1] > len(x) else each.T @ each) for each in (x, y)]
    product = float(norms[0] * norms[1])
    return float((x.T @ y).square().sum()) / product if product > 0 else 0.0
