"""Seconds to a fixed validation loss on four hosts at 100 Mbit/s: exchanges that send less beside whole gradients.

    python -m benchmarks.exchange.time_to_loss              all of it: half an hour, as root
    python -m benchmarks.exchange.time_to_loss text         one task: "text" or "images"

text: a small LLaMA on the source of Python's standard library. images: an MLP on Fashion-MNIST, from the folder
`fashion-mnist` in $LEANTRAIN_DATA. The same four processes train either way, by leantrain's own loop:

1. Links without limit. Learning rates are chosen from three, Dense's from four, by the steps to the loss on another
   seed (the bf16 hook and PowerSGD, which approximate Dense, have its rates); then three seeds train to the end, which
   gives the steps to the loss and the final quality.
2. Links of 100 Mbit/s. One run trains until the loss is reached, which gives the seconds of its steps, with which those
   of the other seeds are reckoned. Where that would take longer than three minutes, 20 steps stand for the rest.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.exchange.break_even import HOSTS
from benchmarks.netlab import Lab, Unavailable
from benchmarks.result import write_result

import torch  # isort: skip  # after netlab, which quietens it

from leantrain.evaluation import evaluate
from leantrain.journal import Journal
from leantrain.processes import World
from leantrain.recipe import Component, Recipe, build_data
from leantrain.train import Run

ROOT = Path(__file__).parent.parent.parent
DATA = Path(os.environ.get("LEANTRAIN_DATA", ROOT.parent / "shared" / "data"))
RATE, SEEDS, TUNING_SEED = "100mbit", (0, 1, 2), 100
LONGEST_S = 180.0
FEWEST_STEPS = 20
"""Steps that a run is cut down to that would take longer."""
WARM_UP, STAGES = 60, [0.0625, 0.015625, 0.004]
"""Steps in which DGC keeps more, and the shares. A few hundred steps at 0.1 % alone would move few weights at all."""
SGD, ADAMW = "Dense, SGD", "Dense, AdamW"


@dataclass(frozen=True)
class Method:
    """An exchange, the class of optimizer behind it, and the learning rates to choose from, or whose to take."""

    exchange: Component
    optim: Component
    rates: tuple[float, ...] | str
    clip: float | None = 1.0


@dataclass(frozen=True)
class Task:
    """A model and data, and the validation loss that is to be reached."""

    title: str
    model: Component
    data: Component
    steps: int
    batch_size: int
    eval_every: int
    eval_batches: int | None
    target: float
    quality: str
    """What a run is judged by at its end: "val_loss" or "val_accuracy"."""
    methods: Mapping[str, Method]


@dataclass(frozen=True)
class Trained:
    """One run: [step, validation loss] at each evaluation, the last quality, and what every step took."""

    curve: list[list[float]]
    quality: float
    step_seconds: list[float]

    @property
    def seconds_per_step(self) -> float:
        return statistics.median(self.step_seconds)

    def seconds_of(self, steps: float) -> float:
        """Seconds of the first so many steps; those that were not taken would have taken the median."""
        if steps == float("inf"):
            return steps
        return sum(self.step_seconds[: round(steps)]) + max(0.0, steps - len(self.step_seconds)) * self.seconds_per_step

    def steps_to(self, target: float) -> float:
        """Steps until the loss is reached, on the line between two evaluations; infinite if it never is."""
        for (before, above), (after, below) in zip(self.curve, self.curve[1:], strict=False):
            if below <= target:
                return after if above <= target else before + (after - before) * (above - target) / (above - below)
        return float("inf")


def _exchange(name: str, **arguments: Any) -> Component:
    return Component(f"leantrain.exchange.{name}", arguments)


def _methods(
    sgd: tuple[float, ...], adamw: tuple[float, ...], vote: tuple[float, ...], dgc: tuple[float, ...]
) -> dict[str, Method]:
    momentum = Component("torch.optim.SGD", {"momentum": 0.9})
    plain, adam = Component("torch.optim.SGD"), Component("leantrain.optim.AdamW", {"weight_decay": 0.0})
    return {
        SGD: Method(_exchange("Dense"), momentum, sgd),
        ADAMW: Method(_exchange("Dense"), adam, adamw),
        "bf16 hook, AdamW": Method(_exchange("HalfPrecision", dtype="bfloat16"), adam, ADAMW),
        "PowerSGD, rank 4, SGD": Method(_exchange("PowerSGD", rank=4), momentum, SGD),
        "MajorityVote": Method(_exchange("MajorityVote"), plain, vote, clip=None),
        "DGC, 0.1 %": Method(
            _exchange("DeepGradientCompression", keep=0.001, clip=1.0, warmup_steps=WARM_UP, warmup=STAGES),
            plain, dgc, clip=None,
        ),
    }  # fmt: skip


TASKS = {
    "text": Task(
        title="a LLaMA on the standard library's source",
        model=Component("leantrain.nn.Llama", {"hidden": 192, "mlp_hidden": 512, "layers": 3, "heads": 4}),
        data=Component("leantrain.data.Text", {"context": 64, "max_bytes": 4_000_000}),
        steps=240, batch_size=2 * HOSTS, eval_every=20, eval_batches=10, target=2.7, quality="val_loss",
        methods=_methods(
            (0.03, 0.1, 0.3, 1.0), (0.0003, 0.001, 0.003, 0.01), (0.00025, 0.0005, 0.001), (0.1, 0.3, 1.0)
        ),
    ),
    "images": Task(
        title="an MLP on Fashion-MNIST",
        model=Component("leantrain.nn.MLP", {"hidden": [1024, 512]}),
        data=Component("leantrain.data.Idx", {"path": str(DATA / "fashion-mnist"), "held_out": 0.1}),
        steps=320, batch_size=32 * HOSTS, eval_every=20, eval_batches=None, target=0.45, quality="val_accuracy",
        methods=_methods(
            (0.025, 0.05, 0.1, 0.2), (0.0003, 0.001, 0.003, 0.01), (0.0001, 0.0002, 0.0004), (0.1, 0.2, 0.4)
        ),
    ),
}  # fmt: skip


def recipe(task: Task, method: Method, rate: float, seed: int) -> Recipe:
    """One run of a task."""
    optim = Component(method.optim.class_path, {**method.optim.init_args, "lr": rate})
    return Recipe(
        name="time-to-loss", model=task.model, data=task.data, optim=optim, exchange=method.exchange, steps=task.steps,
        batch_size=task.batch_size, clip=method.clip, warmup=0.1, trackers=[], device="cpu", seed=seed,
    )  # fmt: skip


def train(lab: Lab, task: Task, method: Method, rate: float, seed: int, target: float = 0.0, steps: int = 0) -> Trained:
    """Train on the hosts of a lab: to the end, until a loss is reached, or for so many steps."""
    with TemporaryDirectory() as folder:
        return Trained(**lab.workers(_train, recipe(task, method, rate, seed), task, target, steps, folder)[0])


def _train(rank: int, recipe: Recipe, task: Task, target: float, steps: int, folder: str) -> dict[str, Any]:
    """On each host. Evaluation is not counted, as it is not in leantrain's own clock."""
    world = World(rank, HOSTS, torch.device("cpu"))
    run = Run(recipe, world, Journal(Path(folder), lambda event: None, writes=False))
    curve, seconds, found = [], [], {}
    while not run.progress.finished and not (steps and run.progress.step >= steps):
        if run.progress.step % task.eval_every == 0:
            found = _evaluated(run, task)
            curve.append([float(run.progress.step), found["val_loss"]])
            if found["val_loss"] <= target:
                break
        started = time.perf_counter()
        run.step(lambda: False)
        seconds.append(time.perf_counter() - started)
    else:
        found = _evaluated(run, task)
        curve.append([float(run.progress.step), found["val_loss"]])
    return {"curve": curve, "quality": found[task.quality], "step_seconds": seconds}


def _evaluated(run: Run, task: Task) -> dict[str, float]:
    with run.exchange.consensus():
        size = run.recipe.batch_size // HOSTS
        return evaluate(run.learner, run.data, run.world, size, task.eval_batches and task.eval_batches * HOSTS)


def tuned(lab: Lab, task: Task, method: Method, rates: tuple[float, ...]) -> float:
    """The learning rate that reaches the loss in the fewest steps; the lowest last loss where none reaches it."""
    runs = {rate: train(lab, task, method, rate, TUNING_SEED, target=task.target) for rate in rates}
    for rate, run in runs.items():
        print(f"  lr {rate:g}: {run.steps_to(task.target):.0f} steps, at the end {run.curve[-1][1]:.3f}", flush=True)
    return min(runs, key=lambda rate: (runs[rate].steps_to(task.target), runs[rate].curve[-1][1]))


@dataclass(frozen=True)
class Found:
    """All that is known of a method on a task."""

    rate: float
    runs: list[Trained]
    shaped: Trained
    target: float

    @property
    def steps(self) -> float:
        return statistics.mean(run.steps_to(self.target) for run in self.runs)

    @property
    def seconds(self) -> float:
        return statistics.mean(self.shaped.seconds_of(run.steps_to(self.target)) for run in self.runs)

    @property
    def qualities(self) -> list[float]:
        return [run.quality for run in self.runs]


def study(task: Task) -> dict[str, Found]:
    """Everything about one task."""
    found: dict[str, Found] = {}
    for name, method in task.methods.items():
        print(f"{task.title}: {name}", flush=True)
        with Lab(HOSTS) as lab:
            rates = method.rates
            rate = found[rates].rate if isinstance(rates, str) else tuned(lab, task, method, rates)
            runs = [train(lab, task, method, rate, seed) for seed in SEEDS]
        with Lab(HOSTS, RATE) as lab:
            shaped = train(lab, task, method, rate, SEEDS[0], steps=FEWEST_STEPS)
            expected = runs[0].steps_to(task.target) * shaped.seconds_per_step
            if expected <= LONGEST_S:
                shaped = train(lab, task, method, rate, SEEDS[0], target=task.target)
        found[name] = Found(rate, runs, shaped, task.target)
        print(f"  lr {rate:g}: {found[name].steps:.0f} steps of {shaped.seconds_per_step:.3f} s", flush=True)
    return found


def row(name: str, task: Task, found: Mapping[str, Found]) -> list[str]:
    this, dense = found[name], min((found[each] for each in found if each.startswith("Dense")), key=lambda f: f.seconds)
    spread = statistics.stdev(this.qualities)
    whole = this.shaped.curve[-1][1] <= task.target
    return [
        task.title,
        name,
        f"{this.rate:g}",
        _or_never(this.steps),
        f"{1e3 * this.shaped.seconds_per_step:.0f}",
        _or_never(this.seconds),
        f"{sum(this.shaped.step_seconds):.0f}" if whole else "",
        _ratio(dense.seconds, this.seconds),
        _ratio(found[SGD].seconds, this.seconds),
        f"{statistics.mean(this.qualities):.3f} ± {spread:.3f}",
    ]


def _or_never(number: float) -> str:
    return "not in all seeds" if number == float("inf") else f"{number:.0f}"


def _ratio(dense: float, seconds: float) -> str:
    return "" if float("inf") in (dense, seconds) else f"{dense / seconds:.1f}"


def described(task: Task) -> str:
    return (
        f"{task.title[0].upper()}{task.title[1:]}: until a validation loss of {task.target:g}, at most {task.steps} "
        f"steps of {task.batch_size} examples; quality is {task.quality}."
    )


def main(wanted: list[str]) -> None:
    tasks = {name: task for name, task in TASKS.items() if name in wanted or not wanted}
    left_out = ""
    if "images" in tasks and not (DATA / "fashion-mnist").is_dir():
        left_out = f"Fashion-MNIST left out: there is no folder {DATA / 'fashion-mnist'}. "
        del tasks["images"]
    rows = []
    for task in tasks.values():
        build_data(recipe(task, task.methods[SGD], 0.1, 0))  # into the cache, before there are several to do it
        found = study(task)
        rows += [row(name, task, found) for name in found]
    write_result(
        "exchange/time_to_loss",
        title=f"Seconds to a validation loss, {HOSTS} hosts at 100 Mbit/s",
        columns=["task", "exchange", "lr", "steps to the loss", "ms per step", "seconds to the loss",
                 "in one whole run", "x faster than the better Dense", f"x faster than {SGD}", "quality"],
        rows=rows,
        notes=[
            left_out + " ".join(map(described, tasks.values())),
            f"Mean ± standard deviation over seeds {', '.join(map(str, SEEDS))}; learning rates chosen from three, "
            "Dense's from four, on another seed. Seconds: what these steps take at 100 Mbit/s, evaluation apart, by "
            "the steps of one run there; in one whole run: what a run of seed 0 really took to the loss. DGC keeps "
            f"6 %, 1.6 % and 0.4 % in its first {WARM_UP} steps.",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(sys.argv[1:])
    except Unavailable as reason:
        print(f"skipped: {reason}", file=sys.stderr)
