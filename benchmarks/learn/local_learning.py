"""What networks lose that are trained in blocks, by losses of their own, beside backpropagation: images and text.

    python -m benchmarks.learn.local_learning              all of it: forty minutes on two cores
    python -m benchmarks.learn.local_learning mlp text     some tasks: "mlp", "resnet", "text"

mlp: 8 layers on Fashion-MNIST. resnet: a ResNet-20 on CIFAR-10. text: a LLaMA of 4 layers on the source of Python's
standard library. Images are read from the folders `fashion-mnist` and `cifar10` in $LEANTRAIN_DATA.

All rows of a task are trained by leantrain's own loop on the same number of batches, with AdamW. Each learning rate is
the best of the task's three by the quality of the model's output, on a seed of its own; three more seeds are reported.
Two runs are trained at a time, each in one thread.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.result import write_result
from leantrain.errors import RunError
from leantrain.recipe import Component, Recipe, build_data
from leantrain.train import train

ROOT = Path(__file__).parent.parent.parent
DATA = Path(os.environ.get("LEANTRAIN_DATA", ROOT.parent / "shared" / "data"))
SEEDS, TUNING_SEED, AT_A_TIME = (0, 1, 2), 100, 2


@dataclass(frozen=True)
class Task:
    """A model and data to train it on, how long, and the learning rates to choose from."""

    title: str
    recipe: Recipe
    rates: tuple[float, ...]
    quality: str
    """What a run is judged by at its end: "val_accuracy" or "val_perplexity"."""
    folder: str | None = None
    """In $LEANTRAIN_DATA."""

    def score(self, value: float) -> float:
        """The higher the better."""
        return value if self.quality == "val_accuracy" else -value

    def shown(self, value: float) -> str:
        """Accuracy in percent, perplexity as it is."""
        return f"{100 * value:.1f}" if self.quality == "val_accuracy" else f"{value:.2f}"


def _recipe(model: Component, data: Component, **how: Any) -> Recipe:
    optim = Component("leantrain.optim.AdamW", {"weight_decay": 0.0})
    return Recipe(name="local-learning", model=model, data=data, optim=optim, trackers=[], device="cpu", **how)


def _cifar10() -> str:
    """The folder, or the archive of pictures in it."""
    folder = DATA / "cifar10"
    return str(next(iter(sorted(folder.glob("*.tar*"))), folder))


TASKS = {
    "mlp": Task(
        "MLP, 8 layers of 256, Fashion-MNIST",
        _recipe(
            Component("leantrain.nn.MLP", {"hidden": [256] * 8}),
            Component("leantrain.data.Idx", {"path": str(DATA / "fashion-mnist"), "held_out": 0.1}),
            steps=800, batch_size=128,
        ),
        (0.0003, 0.001, 0.003), "val_accuracy", "fashion-mnist",
    ),
    "resnet": Task(
        "ResNet-20, CIFAR-10",
        _recipe(
            Component("leantrain.nn.ResNetCifar", {"depth": 20}),
            Component("leantrain.data.Cifar10", {"path": _cifar10(), "held_out": 0.05}),
            steps=240, batch_size=32,
        ),
        (0.001, 0.003, 0.01), "val_accuracy", "cifar10",
    ),
    "text": Task(
        "LLaMA, 4 layers of 96, the standard library's source",
        _recipe(
            Component("leantrain.nn.Llama", {"hidden": 96, "mlp_hidden": 256, "layers": 4, "heads": 4}),
            Component("leantrain.data.Text", {"context": 64, "max_bytes": 4_000_000}),
            steps=320, batch_size=16, eval_batches=40,
        ),
        (0.001, 0.003, 0.01), "val_perplexity",
    ),
}  # fmt: skip


def _learner(name: str, **arguments: Any) -> Component:
    return Component(f"leantrain.learn.{name}", arguments)


LEARNERS = {
    "Backprop": _learner("Backprop"),
    "LocalUpdates, chunked, 2 blocks": _learner("LocalUpdates", scheme="chunked", head="auto"),
    "LocalUpdates, greedy, 4 blocks": _learner("LocalUpdates", blocks=4, head="auto"),
    "the same, head mlp": _learner("LocalUpdates", blocks=4, head="mlp"),
    "the same, local both": _learner("LocalUpdates", blocks=4, head="auto", local="both"),
    "LocalUpdates, overlapping, 4 blocks": _learner("LocalUpdates", blocks=4, head="auto", scheme="overlapping"),
    # One block after another: the output's matrix, which "auto" would read for text, is not trained before the end.
    "LayerWise, 4 blocks": _learner("LayerWise", blocks=4, head="linear"),
    "PartitionWise, 4 blocks": _learner("PartitionWise", blocks=4, head="auto"),
}


@dataclass(frozen=True)
class Found:
    """A learner's runs on a task, each with the quality after every block; of Backprop, the last one's alone."""

    rate: float
    runs: list[list[float]]

    @property
    def means(self) -> list[float]:
        return [statistics.mean(values) for values in zip(*self.runs, strict=True)]

    def best(self, task: Task) -> int:
        """The block with the best mean, from 0."""
        return max(range(len(self.means)), key=lambda block: task.score(self.means[block]))

    def of(self, block: int, task: Task) -> str:
        """Mean and standard deviation over the seeds."""
        values = [run[block] for run in self.runs]
        return f"{task.shown(statistics.mean(values))} ± {task.shown(statistics.stdev(values))}"


def quality_by_block(recipe: Recipe, quality: str) -> list[float]:
    """Train, and read the last evaluation; empty if the run did not stay finite."""
    events: list[Mapping[str, Any]] = []
    with TemporaryDirectory() as folder:
        try:
            train(recipe, Path(folder) / "run", on_event=events.append)
        except RunError as error:
            print(f"  {recipe.learn.init_args} at {recipe.optim.init_args['lr']:g}: {error}", file=sys.stderr)
            return []
    last = [event for event in events if event["kind"] == "eval"][-1]
    heads = sorted(key for key in last if key.startswith("block") and key.endswith(f"/{quality}"))
    return [last[key] for key in heads] + [last[quality]]


def study(task: Task, pool: ProcessPoolExecutor) -> dict[str, Found]:
    """Everything about one task."""

    def trained(settings: Sequence[tuple[str, float, int]]) -> list[list[float]]:
        recipes = []
        for name, rate, seed in settings:
            optim = replace(task.recipe.optim, init_args={**task.recipe.optim.init_args, "lr": rate})
            recipes.append(replace(task.recipe, learn=LEARNERS[name], optim=optim, seed=seed))
        return list(pool.map(quality_by_block, recipes, [task.quality] * len(recipes)))

    grid = [(name, rate, TUNING_SEED) for name in LEARNERS for rate in task.rates]
    scores: dict[str, dict[float, float]] = {name: {} for name in LEARNERS}
    for (name, rate, _), values in zip(grid, trained(grid), strict=True):
        scores[name][rate] = task.score(values[-1]) if values else -math.inf
    best = {name: max(tried, key=lambda rate: tried[rate]) for name, tried in scores.items()}
    print(f"{task.title}: {best}", file=sys.stderr, flush=True)
    runs = trained([(name, best[name], seed) for name in LEARNERS for seed in SEEDS])
    if not all(runs):
        raise SystemExit(f"{task.title}: a run at its best learning rate did not stay finite; nothing is recorded")
    return {
        name: Found(best[name], runs[number * len(SEEDS) : (number + 1) * len(SEEDS)])
        for number, name in enumerate(LEARNERS)
    }


def row(name: str, task: Task, found: Mapping[str, Found]) -> list[str]:
    this = found[name]
    best, whole = this.best(task), found["Backprop"].means[-1]
    if task.quality == "val_accuracy":
        lost = f"{100 * (whole - this.means[-1]):+.1f}"
    else:
        lost = f"{math.log(this.means[-1] / whole):+.3f}"
    return [
        task.title, name, f"{this.rate:g}", this.of(-1, task), "" if name == "Backprop" else lost,
        this.of(best, task), f"{best + 1} of {len(this.means)}",
    ]  # fmt: skip


def main(wanted: Sequence[str]) -> None:
    tasks = {name: task for name, task in TASKS.items() if name in wanted or not wanted}
    if unknown := set(wanted) - set(TASKS):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    missing = [task.folder for task in tasks.values() if task.folder and not (DATA / task.folder).is_dir()]
    tasks = {name: task for name, task in tasks.items() if task.folder not in missing}
    rows = []
    # Started afresh: a process that was forked may not use what has threads by then.
    with ProcessPoolExecutor(AT_A_TIME, multiprocessing.get_context("spawn")) as pool:
        for task in tasks.values():
            build_data(task.recipe)  # into the cache, before there are several to do it
            found = study(task, pool)
            rows += [row(name, task, found) for name in found]
    write_result(
        "learn/local_learning",
        title="Networks trained in blocks by losses of their own, beside backpropagation",
        columns=["task", "learner", "lr", "output", "lost", "best block", "which"],
        rows=rows,
        notes=[
            *(f"Left out: there is no folder {DATA / folder}." for folder in missing),
            *(
                f"{task.title}: {task.recipe.steps} steps of {task.recipe.batch_size} examples, learning rate of "
                f"{', '.join(f'{rate:g}' for rate in task.rates)}."
                for task in tasks.values()
            ),
            "Held-out accuracy in percent, of text perplexity per byte; mean ± standard deviation of "
            f"{len(SEEDS)} seeds, learning rates chosen on another one by the quality of the output. Lost: beside "
            "Backprop, in points, of text in nats per byte. Best block: the block whose head, or the output, is best "
            "in the mean; it is chosen by the same held-out examples. Heads: linear, of text the model's own output "
            "matrix, unless said otherwise; LayerWise's are linear. All learners are given the same number of batches: "
            "LayerWise trains one block at a time, each on a quarter of them.",
        ],
    )


if __name__ == "__main__":
    main(sys.argv[1:])
