"""Which ways of training a model fit a memory, what each costs, and what would have to give where none does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.optim import Optimizer

from leantrain.errors import UsageError
from leantrain.learn.activation_checkpointing import repeated_blocks
from leantrain.plan.methods import BF16, CHECKPOINTING, IN_BACKWARD, METHODS, REFRESH
from leantrain.plan.rehearsal import Moment, Pass, Rehearsal, Step, StepInBackward
from leantrain.plan.subject import Subject

KINDS = ("parameters", "gradients", "optimizer_state", "activations", "temporary")
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Combination:
    """One way of training: an optimizer, a number format, and when gradients and activations are let go."""

    method: str
    dtype: str
    """Format of the weights, and with them of gradients and unquantised state."""
    in_backward: bool
    checkpointing: bool
    make: Callable[[nn.Module], Sequence[Optimizer]] = field(compare=False, repr=False)
    deviation: int = 0
    """How far this is from plain AdamW in 32 bits; see docs/planner.md."""
    own: bool = False
    """Whether it came with the recipe."""

    def __str__(self) -> str:
        extras = [self.dtype, "in backward" * self.in_backward, "checkpointing" * self.checkpointing]
        return ", ".join([self.method, *filter(None, extras)])


@dataclass(frozen=True)
class Prediction:
    """What a combination will hold and do in a step. Bytes are predicted exactly, shares are estimates."""

    combination: Combination
    at_peak: dict[str, int]
    """Bytes by kind at the step's worst moment; they add up to `peak`."""
    peaks: dict[str, int]
    """Each kind's own peak, as a ledger measures it; they are at different moments."""
    flops_share: float
    """Part of a step's FLOPs that the optimizer has, its share of the refreshes included."""
    moved_share: float
    """Part of the bytes that a step reads and writes, each operation counted as if it ran by itself."""
    costs: tuple[str, ...]
    """What it costs beside memory, and why one would still do it."""

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())


@dataclass(frozen=True)
class Plan:
    """The answer: predictions from the least deviation to the greatest, those that fit before those that do not."""

    subject: str
    shape: dict[str, int]
    parameters: int
    """Numbers that are learned."""
    device: str
    memory: int
    predictions: tuple[Prediction, ...]
    advice: tuple[str, ...] = ()
    """Where nothing fits: by how much, and what would have to give."""

    @property
    def fitting(self) -> tuple[Prediction, ...]:
        return tuple(p for p in self.predictions if p.peak <= self.memory)

    def best_of_each(self) -> tuple[Prediction, ...]:
        """Of every method the first that fits, or where none of its forms does, the smallest."""
        best: dict[str, Prediction] = {}
        for prediction in (*self.fitting, *sorted(self.predictions, key=lambda p: p.peak)):
            best.setdefault(prediction.combination.method, prediction)
        return tuple(p for p in self.predictions if best[p.combination.method] is p)


def make_plan(subject: Subject, memory: int, dtype: str | None = None, device: str = "cpu") -> Plan:
    """Predict every combination of methods for `subject`, and rank them for `memory` bytes.

    Args:
        subject: what is trained.
        memory: bytes that a step may hold at its worst moment.
        dtype: "float32" or "bfloat16" weights; None tries the model's own format and bfloat16.
        device: "cpu" or "cuda": whose kernels are planned for.
    """
    predictions: list[Prediction] = []
    parameters = 0
    for format_ in [None, "bfloat16"] if dtype is None else [dtype]:
        rehearsal = Rehearsal(subject, FORMATS[format_] if format_ else None, device)
        parameters = sum(param.numel() for param in rehearsal.model.parameters())
        known = {(p.combination.method, p.combination.dtype) for p in predictions}
        own_format = str(next(rehearsal.model.parameters()).dtype).removeprefix("torch.")
        if format_ is not None and any(each == own_format for _, each in known):
            continue  # the model's own format is that one
        predictions += _predict_all(rehearsal, own_format, own=format_ is None or dtype is not None)
    predictions.sort(key=lambda p: (p.peak > memory, not p.combination.own, p.combination.deviation, p.peak))
    plan = Plan(subject.name, dict(subject.shape), parameters, device, memory, tuple(predictions))
    return plan if plan.fitting else replace(plan, advice=tuple(_advice(plan, subject, device)))


def predict(subject: Subject, combination: Combination, device: str = "cpu") -> Prediction:
    """Predict one combination for `subject`; its `dtype` decides the format of the weights."""
    rehearsal = Rehearsal(subject, FORMATS[combination.dtype], device)
    passes = {combination.checkpointing: rehearsal.forward_and_backward(combination.checkpointing)}
    update: Update = rehearsal.clipping() if subject.clip is not None else 0
    if combination.in_backward:
        update = rehearsal.step_in_backward(combination.make, passes[combination.checkpointing])
    return _predict(combination, passes, rehearsal.step(combination.make), update, ())


def _predict_all(rehearsal: Rehearsal, dtype: str, own: bool) -> Iterator[Prediction]:
    subject, model = rehearsal.subject, rehearsal.model
    passes = {False: rehearsal.forward_and_backward()}
    if repeated_blocks(model):
        passes[True] = rehearsal.forward_and_backward(checkpoint=True)
    clipping = rehearsal.clipping() if subject.clip is not None else 0
    for name, way in (subject.own or {}).items() if own else ():
        combination = Combination(
            name, dtype, way.in_backward, way.checkpointing and True in passes, way.make, own=True
        )
        update = rehearsal.step_in_backward(way.make, passes[False]) if way.in_backward else clipping
        yield _predict(combination, passes, rehearsal.step(way.make, REFRESH), update, ())
    for method in METHODS:
        if not method.applies_to(model):
            continue
        step = rehearsal.step(method.make, method.refresh)
        alone = rehearsal.step_in_backward(method.make, passes[False]) if subject.accumulate == 1 else 0
        for checkpointing in passes:
            for in_backward in (False, True) if subject.accumulate == 1 else (False,):
                narrow = dtype == "bfloat16"
                deviation = method.deviation + sum(
                    part[0] * used
                    for part, used in ((BF16, narrow), (IN_BACKWARD, in_backward), (CHECKPOINTING, checkpointing))
                )
                combination = Combination(
                    method.label(model), dtype, in_backward, checkpointing, method.make, deviation
                )
                extra = passes[checkpointing].flops / max(1, passes[False].flops) - 1
                costs = (
                    method.fact, BF16[1] * narrow, IN_BACKWARD[1] * in_backward,
                    CHECKPOINTING[1].format(extra=extra) * checkpointing,
                )  # fmt: skip
                yield _predict(
                    combination, passes, step, alone if in_backward else clipping, tuple(filter(None, costs))
                )


def _predict(
    combination: Combination, passes: dict[bool, Pass], step: Step, update: Update, costs: tuple[str, ...]
) -> Prediction:
    one = passes[combination.checkpointing]
    worst = max(_moments(one, step, update), key=lambda moment: moment.total)
    at_peak = {
        "parameters": worst.parameters, "gradients": worst.gradients, "optimizer_state": step.state,
        "activations": worst.activations, "temporary": worst.temporary,
    }  # fmt: skip
    peaks = {
        "parameters": one.parameters,
        "gradients": one.largest_gradient if combination.in_backward else one.gradients,
        "optimizer_state": step.state,
        "activations": one.activations,
    }
    return Prediction(
        combination, at_peak, peaks,
        flops_share=step.flops / max(1, step.flops + one.flops),
        moved_share=step.moved / max(1, step.moved + one.moved),
        costs=costs,
    )  # fmt: skip


Update = int | StepInBackward
"""In how many bytes clipping works before the step; or the steps in the backward pass."""


def _moments(one: Pass, step: Step, update: Update) -> Iterator[Moment]:
    """The moments of a step that may be its worst, without the state, which is there all the time."""
    if isinstance(update, int):
        yield one.worst.with_workspace(step.tables)
        yield one.end.with_workspace(step.tables + max(step.workspace, update))
        return
    yield one.worst_if_freed.with_workspace(step.tables)
    for param, moment in one.arrivals:
        yield moment.with_workspace(step.tables + update.workspaces[param])
    # At the first arrival of all there is nothing of the state yet, which is added to every moment.
    yield one.arrivals[0][1].with_workspace(update.first - step.state)


def _advice(plan: Plan, subject: Subject, device: str) -> Iterator[str]:
    """What would have to give, tried out on the combination that misses by least."""
    best = min(plan.predictions, key=lambda p: p.peak)
    yield (
        f"nothing fits: the best, {best.combination}, needs {_size(best.peak)}, {_size(best.peak - plan.memory)} more "
        f"than the {_size(plan.memory)} given"
    )
    lasting = best.at_peak["parameters"] + best.at_peak["optimizer_state"]
    if lasting > plan.memory:
        yield f"its parameters and optimizer state alone take {_size(lasting)}: a smaller batch or context is no help"
    else:
        yield from _smaller(best, plan, subject, device)
    yield f"or a memory of {_size(best.peak)} or more"


def _smaller(best: Prediction, plan: Plan, subject: Subject, device: str) -> Iterator[str]:
    shape = dict(plan.shape)
    for name in ("batch", "context"):
        while shape.get(name, 1) > 1:
            shape[name] = max(1, shape[name] // 2)
            try:
                peak = predict(subject.resized(**shape), best.combination, device).peak
            except UsageError:
                break  # a recipe may not allow it, for instance with `accumulate`
            if peak <= plan.memory:
                less = {key: value for key, value in shape.items() if value != plan.shape[key]}
                changed = [f"{key} {value} instead of {plan.shape[key]}" for key, value in less.items()]
                yield f"with {' and '.join(changed)} it needs {_size(peak)} and fits"
                return
    yield "no smaller batch or context is enough"


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.1f} MB"
