"""What a plan is about: a model and the batches it is to be trained on, from a name, a recipe or a configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leantrain.data import Batch
from leantrain.errors import UsageError, nearest
from leantrain.learn import Backprop
from leantrain.learn.protocol import Learner
from leantrain.nn import PRESETS, Llama, from_config
from leantrain.recipe import (
    Recipe,
    build_data,
    build_learner,
    build_model,
    build_optimizers,
    read_comparison,
    read_recipe,
)
from leantrain.recipe.locate import check_path, is_huggingface_config, locate
from leantrain.recipe.yaml import load_file

VOCABULARY = 32_000
"""Tokens of the named sizes, as in the GaLore authors' configurations."""
NAMED = {f"llama-{name.lower()}": name for name in PRESETS}
CONTEXT = 256
"""Tokens per example unless told otherwise."""


@dataclass(frozen=True)
class Own:
    """How a recipe itself trains."""

    make: Callable[[nn.Module], list[Optimizer]]
    checkpointing: bool = False
    in_backward: bool = False


@dataclass(frozen=True)
class Subject:
    """What is trained, ready to be built. Nothing is allocated before one of the functions is called."""

    name: str
    build_model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    """One micro-batch on the CPU."""
    build_learner: Callable[[nn.Module, Tensor], Learner]
    """Of the model, and inputs on its device."""
    shape: Mapping[str, int]
    """The sizes that a user may change: batch, and context where there is one."""
    resized: Callable[..., Subject]
    """The same with another `shape`, given as keywords."""
    accumulate: int = 1
    clip: float | None = 1.0
    own: Mapping[str, Own] | None = None
    """What came with the subject, by name: the ways of a recipe or of a comparison's runs."""


def named(name: str, batch: int = 1, context: int = CONTEXT) -> Subject:
    """A model by the name of its size (`llama-7b`), a folder or file with a Hugging Face config, or the dotted path of
    a configuration class.

    Raises:
        UsageError: there is no such name, or the folder holds no configuration.
    """
    _check_size("batch", batch)
    _check_size("context", context)
    if name in NAMED:
        return language_model(name, partial(Llama, VOCABULARY, preset=NAMED[name]), VOCABULARY, batch, context)
    path = Path(name)
    if path.exists():
        return _configured(str(path), _local_config(path), batch, context)
    if "." in name and "/" not in name:
        check_path("model", name, ())
        cls = locate("model", name)
        if not is_huggingface_config(cls):
            raise UsageError(
                f"model {name} is not a transformers configuration; other classes need a recipe (--recipe)"
            )
        return _configured(name, cls(), batch, context)
    raise UsageError(
        f"model {name!r} is no size known here, no folder or file with a config.json, and no class"
        f"{nearest(name, NAMED)}; nothing is downloaded"
    )


def from_recipe(path: Path, flags: Sequence[str] = (), allow: Sequence[str] = ()) -> Subject:
    """What the recipe trains; of a comparison, what its base trains, with the optimizers of all its runs.

    Raises:
        UsageError: as for a recipe; or a comparison whose runs differ in more than their optimizers.
    """

    def resized(batch: int, context: int | None = None) -> Subject:
        sizes = ["--batch_size", str(batch)] + (["--data.context", str(context)] if context else [])
        return from_recipe(path, [*flags, *sizes], allow)

    if "runs" not in load_file(path):
        recipe = read_recipe(path, flags, allow)
        return _of(recipe.name, recipe, {recipe.name: recipe}, resized)
    comparison = read_comparison(path, flags, allow)
    runs = {name: comparison.recipe_for(name, comparison.seeds[0]) for name in comparison.runs}
    return _of(comparison.name, runs[comparison.baseline], runs, resized)


def language_model(name: str, build: Callable[[int], nn.Module], vocabulary: int, batch: int, context: int) -> Subject:
    """A language model on made-up tokens; `build` is told the longest input."""

    def tokens() -> Batch:
        drawn = torch.randint(vocabulary, (batch, context + 1))
        return Batch(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous(), torch.arange(batch))

    return Subject(
        name=name,
        build_model=lambda: build(context),
        batch=tokens,
        build_learner=lambda model, sample: Backprop(model, "next_token"),
        shape={"batch": batch, "context": context},
        resized=lambda batch, context: language_model(name, build, vocabulary, batch, context),
    )


def _of(name: str, recipe: Recipe, runs: Mapping[str, Recipe], resized: Callable[..., Subject]) -> Subject:
    for each, run in runs.items():
        for key in ("model", "data", "batch_size", "accumulate", "precision", "clip", "learn", "loss"):
            if getattr(run, key) != getattr(recipe, key):
                raise UsageError(
                    f"run {each} has another {key} than the others; give it a recipe of its own to plan it"
                )
        if run.step_in_backward and run.accumulate > 1:
            raise UsageError(f"run {each}: step_in_backward is planned for accumulate=1 only, got {run.accumulate}")
    data = build_data(recipe)
    size = recipe.batch_size // recipe.accumulate
    sample = data.train_batch(recipe.seed, 0, size)
    shape = {"batch": recipe.batch_size}
    if sample.tokens:
        shape["context"] = sample.inputs.shape[1]
    return Subject(
        name=name,
        build_model=lambda: build_model(recipe, data),
        batch=lambda: sample,
        build_learner=lambda model, sample: build_learner(recipe, model, data, sample),
        shape=shape,
        resized=resized,
        accumulate=recipe.accumulate,
        clip=recipe.clip,
        own={
            each: Own(partial(build_optimizers, run), run.activation_checkpointing, run.step_in_backward)
            for each, run in runs.items()
        },
    )


def _configured(name: str, config: Any, batch: int, context: int) -> Subject:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise UsageError(f"context must be at most {longest}, the positions of {name}, got context={context}")
    return language_model(name, lambda _: from_config(config), config.vocab_size, batch, context)


def _local_config(path: Path) -> Any:
    file = path / "config.json" if path.is_dir() else path
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        kind = given["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"model: {file} is no Hugging Face configuration ({type(error).__name__}: {error})") from error
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise UsageError("a Hugging Face model needs the package transformers: pip install transformers") from error
    try:
        return AutoConfig.for_model(**given)
    except ValueError as error:
        raise UsageError(f"model: transformers knows no model_type {kind!r}, which {file} asks for") from error


def _check_size(name: str, size: object) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UsageError(f"{name} must be a whole number, at least 1, got {name}={size!r}")
