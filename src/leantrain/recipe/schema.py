"""What a run is: plain, typed data that YAML, JSON and the command line can all write down.

A recipe holds no objects and needs no torch: classes are named by their dotted path and built later (see `build`).
Every field is followed by its meaning; that sentence is also what `leantrain train --help` prints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from leantrain.errors import UsageError, nearest

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
DEFAULT_CLASSES = {"learn": "leantrain.learn.Backprop", "exchange": "leantrain.exchange.Dense"}
"""What stands in a field that a recipe leaves out."""


@dataclass(frozen=True)
class Component:
    """A class to be built later: its dotted path and the arguments it is given. Plain data, nothing imported."""

    class_path: str
    """Where the class is, for instance `torch.optim.AdamW`."""
    init_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of its constructor: numbers, strings, booleans, None, and lists and mappings of them."""


@dataclass(frozen=True)
class Recipe:
    """One training run, described completely: the same recipe on the same machine gives the same numbers.

    Raises:
        UsageError: a field is out of its range, or two fields do not fit together.
    """

    name: str
    """What the run is called; also its folder under `runs/`. Letters, digits, `.`, `_` and `-`."""
    model: Component
    """The network: a `torch.nn.Module` class, or a `transformers` configuration class."""
    data: Component
    """Where examples come from: a class of `leantrain.data`, or one with the same methods."""
    optim: Component
    """The optimizer: any `torch.optim.Optimizer` class."""
    steps: int
    """Optimizer steps to take, at least 1."""
    batch_size: int
    """Examples per optimizer step, summed over all processes and micro-batches; at least 1."""
    loss: Component | None = None
    """What outputs are trained and judged by: a `torch.nn.Module` of outputs and targets that returns the batch's mean
    loss; null: the loss of the data's task."""
    rest: Component | None = None
    """A second optimizer for the parameters that `groups` leaves over; without an `lr` it takes that of `optim`."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Parameter groups: mappings with `params` ("hidden", "all-linear" or a regular expression on names) and optimizer
    options."""
    learn: Component = field(default_factory=lambda: Component(DEFAULT_CLASSES["learn"]))
    """How gradients are found: a class of `leantrain.learn`."""
    exchange: Component = field(default_factory=lambda: Component(DEFAULT_CLASSES["exchange"]))
    """How processes combine gradients: a class of `leantrain.exchange`."""
    accumulate: int = 1
    """Micro-batches per step, one after another to save memory; must divide `batch_size`."""
    clip: float | None = 1.0
    """Largest allowed norm of the whole gradient, above 0; null: no clipping."""
    activation_checkpointing: bool = False
    """Whether repeated blocks keep only their inputs for the backward pass and compute the rest again."""
    step_in_backward: bool = False
    """Whether each weight is updated, and its gradient freed, during the backward pass; clips by the step before."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the forward and backward pass; weights stay as the model made them."""
    compile: bool = False
    """Whether to run the model through `torch.compile`."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup: float = 0.1
    """Part of the steps over which the learning rate rises from 0, from 0 up to (not including) 1."""
    min_lr: float = 0.1
    """The learning rate at the end of the schedule, as a part of the highest one, from 0 to 1."""
    eval_every: int = 0
    """Steps between evaluations on the held-out data; 0: only at the end."""
    eval_batches: int | None = None
    """Most batches per evaluation, at least 1; null: all held-out data."""
    probe_every: int = 0
    """Steps between looks at what the hidden layers do (classes and texts only); 0: never."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: only at the end or when interrupted."""
    keep: int = 2
    """How many of the newest checkpoints stay on the disk, at least 1."""
    log_every: int = 10
    """Steps between lines in the log, at least 1."""
    max_seconds: float | None = None
    """Stop after this many seconds of training (evaluation not counted), above 0; null: no limit."""
    max_tokens: int | None = None
    """Stop after this many training tokens, at least 1; null: no limit."""
    seed: int = 0
    """Decides the initial weights and the order of the examples; 0 or more."""
    threads: int | None = 1
    """CPU threads of torch, at least 1; null: as many as torch chooses."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: on CUDA if there is one."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Who else is told about progress: any of tensorboard, wandb, mlflow, trackio."""
    ledger: bool = False
    """Whether to measure memory by kind, time by phase, bytes sent, FLOPs and energy."""

    def __post_init__(self) -> None:
        check_name("name", self.name)
        _check_ranges(self)
        _check_combinations(self)


COMPONENTS = ("model", "data", "optim", "loss", "rest", "learn", "exchange")
"""The fields of a recipe that name a class."""
OPTIONAL = ("loss", "rest")
"""Those that may be null."""

_AT_LEAST = {
    "steps": 1, "batch_size": 1, "accumulate": 1, "eval_batches": 1, "keep": 1, "log_every": 1, "max_tokens": 1,
    "threads": 1, "eval_every": 0, "probe_every": 0, "checkpoint_every": 0, "seed": 0,
}  # fmt: skip
_CHOICES = {
    "precision": ("fp32", "bf16"),
    "schedule": ("cosine", "linear", "constant"),
    "device": ("auto", "cpu", "cuda"),
}


def field_names() -> list[str]:
    """The keys of a recipe, in the order in which a person would write them."""
    return [each.name for each in fields(Recipe)]


def check_name(key: str, name: object) -> None:
    """Refuse a name that cannot be a folder's, or that would lead out of the folder it is meant for."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        raise UsageError(
            f"{key} must be 1 to 100 letters, digits, '.', '_' or '-', not starting with '.' or '-', got {name!r}"
        )


def check_choices(key: str, chosen: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuse a word of `chosen` that is not among `allowed`."""
    for word in chosen:
        if word not in allowed:
            raise UsageError(f"{key} has no choice {word!r}{nearest(str(word), allowed)}")


def _check_ranges(recipe: Recipe) -> None:
    """Each field by itself."""
    for key, least in _AT_LEAST.items():
        value = getattr(recipe, key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise UsageError(f"{key} must be a whole number, at least {least}, got {value!r}")
    for key, choices in _CHOICES.items():
        check_choices(key, [getattr(recipe, key)], choices)
    check_choices("trackers", recipe.trackers, TRACKERS)
    if not 0 <= recipe.warmup < 1:
        raise UsageError(f"warmup is a part of the steps and must be in [0, 1), got {recipe.warmup!r}")
    if not 0 <= recipe.min_lr <= 1:
        raise UsageError(f"min_lr is a part of the learning rate and must be in [0, 1], got {recipe.min_lr!r}")
    for key in ("clip", "max_seconds"):
        value = getattr(recipe, key)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"{key} must be a number above 0, or null, got {value!r}")


def _check_combinations(recipe: Recipe) -> None:
    """Fields against one another."""
    if recipe.batch_size % recipe.accumulate:
        raise UsageError(f"accumulate must divide batch_size={recipe.batch_size}, got accumulate={recipe.accumulate}")
    for index, group in enumerate(recipe.groups):
        if not isinstance(group, dict) or not isinstance(group.get("params"), str):
            raise UsageError(
                f'groups[{index}] must be a mapping with params: "hidden", "all-linear" or a regular expression, '
                f"got {group!r}"
            )
    if recipe.step_in_backward and recipe.rest is not None:
        raise UsageError("step_in_backward takes one optimizer for all weights; use groups with an lr of their own")
    if recipe.rest is not None and not recipe.groups:
        raise UsageError("rest needs groups: without them nothing is left over for a second optimizer")
