"""How many bits the weights of a model carry, and whether they become fewer as it trains (Øland and Raj).

Three quantities answer to "the entropy of the weights", and they do not agree. Each is the entropy of a histogram of
whole numbers, tensor by tensor, in bits a weight; a model's is the mean over its weights.

    range     round((w - min) / (max - min) 255)        a grid stretched over each tensor: falls when a few weights
                                                        grow and the bulk stays, also where nothing was forgotten
    fixed     round(w / step)                           a grid that stays: rises when weights grow
    change    round((w - w_last) / step)                what an exchange of changes has to say: falls with the
                                                        learning rate

    step = s sigma: s = 1/32; sigma is the tensor's standard deviation when training began, 0.05 for vectors

Costs: a pass over the weights for each quantity; `change` a copy of the weights besides.

Sources: Øland & Raj 2015 (ICASSP) and Øland 2024 (CMU-CS-24-147), who report that it falls during training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from leantrain.atomic import whole_file
from leantrain.errors import RunError, UsageError
from leantrain.histogram import integer_entropy, range_entropy

T = TypeVar("T")

_VECTOR_DEVIATION = 0.05
"""Stands for the initial standard deviation of vectors, which mostly begin as zeros or ones."""

_MEANINGS = {
    "range": "a grid from the smallest to the largest weight",
    "fixed": "a grid that stays",
    "change": "what changed since the last point, on that grid",
}


@dataclass(frozen=True)
class EntropyPoint:
    """Bits a weight, at one moment of training."""

    step: int
    range: float
    fixed: float
    change: float | None
    """None at the first measurement: nothing has changed yet."""


@torch.no_grad()
def weight_entropy(
    model: nn.Module,
    last: Mapping[str, Tensor] | None = None,
    deviations: Mapping[str, float] | None = None,
    *,
    bits: int = 8,
    step: float = 1 / 32,
) -> EntropyPoint:
    """The entropy of a model's weights now, as a point of step 0.

    Args:
        model: any; its floating-point parameters are looked at, tied ones once.
        last: earlier weights by name, such as a copy of `dict(model.named_parameters())`, for `change`.
        deviations: standard deviations by name that steps are counted in; by default those of the weights as they are.
        bits: of the range-normalised grid, 1 to 16.
        step: of the other grids, in units of the deviations.

    Raises:
        UsageError: `bits` or `step` is out of range, the model has no floating-point parameters, it is sharded, or
            `last` or `deviations` lack one of them.
        RunError: a weight is NaN or infinite.

    Examples:
        >>> model = nn.Linear(64, 64)
        >>> 6 < weight_entropy(model).range <= 8
        True
    """
    if not 1 <= bits <= 16:
        raise UsageError(f"bits must be in [1, 16], got bits={bits}")
    if not 0 < step < math.inf:
        raise UsageError(f"step must be a positive number, got step={step}")
    found = {"range": 0.0, "fixed": 0.0, "change": 0.0}
    weights = 0
    for name, param in _weights(model):
        unit = step * (_deviation(param) if deviations is None else _of(deviations, name, "deviations"))
        found["range"] += param.numel() * range_entropy(param, bits)
        found["fixed"] += param.numel() * integer_entropy(_steps(param, unit))
        if last is not None:
            before = _of(last, name, "last").to(param.device).float()
            found["change"] += param.numel() * integer_entropy(_steps(param.float() - before, unit))
        weights += param.numel()
    means = {key: total / weights for key, total in found.items()}
    return EntropyPoint(0, means["range"], means["fixed"], None if last is None else means["change"])


class WeightEntropy:
    """Asks for the entropy of a model's weights every `every` steps and keeps the curve.

    Args:
        model: make the meter before training begins: steps are counted in the standard deviations of now.
        every: optimizer steps from one measurement to the next, >= 1.
        bits, step: see `weight_entropy`.

    Raises:
        UsageError: an argument is out of range.

    Examples:
        >>> model = nn.Linear(8, 8)
        >>> meter = WeightEntropy(model, every=10)
        >>> for _ in range(20):
        ...     point = meter.after_step()  # after optimizer.step()
        >>> [point.step for point in meter.curve]
        [0, 10, 20]
    """

    def __init__(self, model: nn.Module, every: int = 100, *, bits: int = 8, step: float = 1 / 32) -> None:
        if every < 1:
            raise UsageError(f"every must be a number of steps from 1 up, got every={every}")
        self.model, self.every, self.bits, self.step = model, every, bits, step
        self.steps = 0
        self.deviations = {name: _deviation(param) for name, param in _weights(model)}
        self.last: dict[str, Tensor] | None = None
        self.curve: list[EntropyPoint] = []
        self._measure()

    def after_step(self) -> EntropyPoint | None:
        """Count an optimizer step; a new point of the curve where it is time for one."""
        self.steps += 1
        return self._measure() if self.steps % self.every == 0 else None

    def _measure(self) -> EntropyPoint:
        now = weight_entropy(self.model, self.last, self.deviations, bits=self.bits, step=self.step)
        point = EntropyPoint(self.steps, now.range, now.fixed, now.change)
        self.curve.append(point)
        self.last = {name: param.clone() for name, param in _weights(self.model)}
        return point

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values: what was measured, and what the next measurement compares with."""
        return {
            "steps": self.steps, "deviations": self.deviations, "last": self.last,
            "curve": [asdict(point) for point in self.curve],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another meter was.

        Raises:
            UsageError: the state is of another model.
        """
        if different := sorted(set(state["deviations"]) ^ set(self.deviations)):
            raise UsageError(f"the state of WeightEntropy is of another model: {different[0]!r} differs")
        self.steps = int(state["steps"])
        self.deviations = dict(state["deviations"])
        self.last = {name: tensor.clone() for name, tensor in state["last"].items()}
        self.curve = [EntropyPoint(**point) for point in state["curve"]]


def draw_entropy(curves: Mapping[str, Sequence[EntropyPoint]], path: str | Path) -> None:
    """Draw curves, two beside each other, each in a panel under its name, and write them to `path` as PNG.

    Raises:
        UsageError: there is no curve, or an empty one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot, which wants a display and keeps figures
    from matplotlib.figure import Figure

    if not curves or not all(curves.values()):
        raise UsageError(f"there is nothing to draw: {dict.fromkeys(curves, 'empty')!r}")
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.5 * columns, 0.6 + 2.8 * rows), dpi=120, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    for panel, (name, curve) in zip(panels, curves.items(), strict=False):
        for quantity, meaning in _MEANINGS.items():
            points = [(point.step, bits) for point in curve if (bits := getattr(point, quantity)) is not None]
            panel.plot([step for step, _ in points], [bits for _, bits in points], label=f"{quantity}: {meaning}")
        panel.set(title=name, xlabel="optimizer steps", ylabel="entropy, bits a weight")
    panels[0].set_ylim(bottom=0)  # of all: only now are their highest points known
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize="small", frameon=False)
    with whole_file(path) as file:
        FigureCanvasAgg(figure).print_png(str(file))


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    some = False
    for name, param in model.named_parameters():
        if not param.is_floating_point() or param.numel() == 0:
            continue
        if hasattr(param, "full_tensor"):
            raise UsageError(f"the entropy of sharded weights is not measured, and {name!r} is sharded (FSDP2)")
        if not bool(torch.isfinite(param).all()):
            raise RunError(f"the entropy of weights that are not finite is not defined: {name!r}")
        some = True
        yield name, param.detach()
    if not some:
        raise UsageError(f"{type(model).__name__} has no floating-point parameters to measure the entropy of")


def _deviation(param: Tensor) -> float:
    found = float(param.float().std()) if param.dim() > 1 and param.numel() > 1 else 0.0
    return found if found > 0 else _VECTOR_DEVIATION


def _steps(values: Tensor, step: float) -> Tensor:
    return (values.float() / step).round_().clamp_(-(2.0**40), 2.0**40).to(torch.int64)


def _of(values: Mapping[str, T], name: str, argument: str) -> T:
    if name not in values:
        raise UsageError(f"{argument} has nothing for parameter {name!r}")
    return values[name]
