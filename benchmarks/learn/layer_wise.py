"""Layer-wise training beside backpropagation: peak memory, accuracy at equal steps, and what a feature cache saves.

    python -m benchmarks.learn.layer_wise                     all of it: about 20 minutes
    python -m benchmarks.learn.layer_wise memory cache        some of it: "memory", "accuracy", "cache"

memory: bytes as the ledger sees them at the peak of a training step, of layer-wise training the largest of all blocks.
accuracy: the digits of scikit-learn, and Fashion-MNIST from the folder `fashion-mnist` in $LEANTRAIN_DATA, by
leantrain's own loop. All runs of a task take equally many steps, which layer-wise training shares out among blocks and
laps. Learning rates are chosen from three for each run on another seed, by the accuracy of the last block.
cache: a training step of the last of eight blocks, with inputs computed for every batch, or kept. The runs take turns.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.result import write_result
from leantrain.data import Batch
from leantrain.learn import Backprop
from leantrain.learn.layer_wise import LayerWise
from leantrain.ledger.ledger import Ledger
from leantrain.ledger.memory import KINDS
from leantrain.nn import MLP, Llama, ResNetCifar
from leantrain.recipe import Component, Recipe
from leantrain.train import train

ROOT = Path(__file__).parent.parent.parent
DATA = Path(os.environ.get("LEANTRAIN_DATA", ROOT.parent / "shared" / "data"))
SEEDS, TUNING_SEED = (0, 1, 2), 100


def main() -> None:
    torch.set_num_threads(1)
    parts = {"memory": memory, "accuracy": accuracy, "cache": cache}
    chosen = sys.argv[1:] or list(parts)
    if unknown := set(chosen) - set(parts):
        raise SystemExit(f"no such part: {', '.join(sorted(unknown))} (allowed: {', '.join(parts)})")
    for name in chosen:
        parts[name]()


# Memory.


def memory() -> None:
    """Peaks by kind, for MLPs of growing depth, a ResNet and a language model."""
    images, tokens = torch.randn(64, 3, 32, 32), torch.randint(256, (8, 128))
    cases: list[tuple[str, nn.Module, Any, Batch]] = [
        *(
            (f"MLP, {depth} x 256", MLP(features=256, classes=10, hidden=[256] * depth), "classification",
             labelled(torch.randn(512, 256)))
            for depth in (2, 4, 8, 16)
        ),
        ("ResNet-20", ResNetCifar(20), "classification", labelled(images)),
        ("LLaMA, 8 x 128", Llama(vocab_size=256, context=128, hidden=128, layers=8, heads=4), "next_token",
         Batch(tokens, tokens, torch.arange(len(tokens)))),
    ]  # fmt: skip
    rows = []
    for name, model, task, batch in cases:
        whole = peaks(Backprop(model, task), batch, stages=1)
        learner = LayerWise(model, task, sample=batch.inputs[:2])
        layer_wise = peaks(learner, batch, stages=len(learner.cut))
        for method, found in (("backpropagation", whole), (f"layer-wise, {len(learner.cut)} blocks", layer_wise)):
            share = sum(found.values()) / sum(whole.values())
            rows.append([
                name, method, *(f"{found[kind] / 1e6:.2f}" for kind in found),
                f"{found['activations'] / whole['activations']:.2f}", f"{share:.2f}",
            ])  # fmt: skip
    write_result(
        "learn/layer_wise_memory",
        title="Peak memory of a training step with AdamW, in MB",
        columns=[
            "model", "trained by", "weights", "gradients", "optimizer state", "activations", "activations, x", "all, x",
        ],
        rows=rows,
        notes=["Layer-wise: of every kind the largest over all blocks; weights include the heads."],
    )  # fmt: skip


def labelled(images: Tensor) -> Batch:
    return Batch(images, torch.randint(10, (len(images),)), torch.arange(len(images)))


def peaks(learner: Any, batch: Batch, stages: int) -> dict[str, int]:
    """Bytes by kind, the largest over all stages."""
    found: dict[str, int] = {}
    for stage in range(stages):
        learner.enter(stage / stages)
        optimizer = torch.optim.AdamW([param for part in learner.parts for param in part.params])
        ledger = Ledger(learner.module, optimizer, memory_every=1, flops=False)
        with ledger:
            for _ in range(2):
                learner.step(batch)
                with ledger.phase("update"):
                    optimizer.step()
                    optimizer.zero_grad()
                ledger.step_done(len(batch))
        measured = ledger.summary()["peak_bytes"]
        for kind in KINDS:
            found[kind] = max(found.get(kind, 0), measured[kind])
    return found


# Accuracy.


@dataclass(frozen=True)
class Task:
    """Data, a model and how long it is trained."""

    name: str
    data: Component
    hidden: list[int]
    steps: int
    batch_size: int
    rates: tuple[float, ...] = (0.0005, 0.001, 0.003)


RUNS: dict[str, Component] = {
    "backpropagation": Component("leantrain.learn.Backprop"),
    **{
        f"layer-wise, {laps} lap{'s' if laps > 1 else ''}, {local}": Component(
            "leantrain.learn.layer_wise.LayerWise", {"laps": laps, "local": local}
        )
        for local in ("prediction", "both")
        for laps in (1, 3)
    },
}


def accuracy() -> None:
    """Held-out accuracy at equal steps."""
    tasks = [Task("digits, 3 x 128", Component("leantrain.data.Sklearn", {"name": "digits"}), [128] * 3, 1800, 50)]
    folder = DATA / "fashion-mnist"
    if folder.is_dir():
        data = Component("leantrain.data.Idx", {"path": str(folder)})
        tasks.append(Task("Fashion-MNIST, 4 x 512", data, [512] * 4, 2400, 100))
    rows = []
    for task in tasks:
        for name, learn in RUNS.items():
            tried = {rate: final_accuracies(task, learn, rate, TUNING_SEED, tuning=True)[-1] for rate in task.rates}
            rate = max(tried, key=lambda each: tried[each])
            found = [final_accuracies(task, learn, rate, seed) for seed in SEEDS]
            last, best = [each[-1] for each in found], [max(each) for each in found]
            rows.append([task.name, name, f"{rate:g}", spread(last), spread(best)])
            print(*rows[-1], flush=True)
    write_result(
        "learn/layer_wise",
        title="Held-out accuracy in percent, at equal numbers of steps",
        columns=["task", "trained by", "lr", "last block", "best block"],
        rows=rows,
        notes=[
            "Mean ± standard deviation over seeds 0, 1, 2; AdamW, cosine schedules, learning rates chosen from 3 "
            "values for each run on another seed. "
            + "; ".join(f"{task.name}: {task.steps} steps of {task.batch_size}" for task in tasks)
            + "."
        ],
    )


def final_accuracies(task: Task, learn: Component, rate: float, seed: int, tuning: bool = False) -> list[float]:
    """Of every block's head and, last, of the model's output. Tuning leaves the test images alone."""
    data = task.data
    if tuning and data.class_path.endswith(".Idx"):
        data = replace(data, init_args=data.init_args | {"held_out": 0.1})
    recipe = Recipe(
        name="layer-wise", model=Component("leantrain.nn.MLP", {"hidden": task.hidden}), data=data, learn=learn,
        optim=Component("leantrain.optim.AdamW", {"lr": rate, "weight_decay": 0.01}), steps=task.steps,
        batch_size=task.batch_size, seed=seed, log_every=task.steps, trackers=[], device="cpu",
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        train(recipe, folder)
        lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if "val_accuracy" in line]
    blocks = sorted(key for key in line if key.endswith("/val_accuracy"))
    return [line[key] for key in (*blocks, "val_accuracy")]


def spread(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.2f} ± {100 * statistics.stdev(values):.2f}"


# Caches.

EXAMPLES, BATCH, EPOCHS = 2048, 64, 4


@dataclass
class Timed:
    """One way to come by a block's inputs, with its times."""

    name: str
    learner: LayerWise
    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)


def cache() -> None:
    """Milliseconds of a training step of a ResNet's last block, in the first epoch and after it."""
    generator = torch.Generator().manual_seed(0)
    data = Batch(
        torch.randn(EXAMPLES, 3, 32, 32, generator=generator),
        torch.randint(10, (EXAMPLES,), generator=generator), torch.arange(EXAMPLES),
    )  # fmt: skip
    rows = []
    with TemporaryDirectory() as folder:
        runs = []
        for name in ("recompute", "memory", "disk"):
            torch.manual_seed(0)
            where = {"cache_folder": str(Path(folder) / "features")} if name == "disk" else {}
            how: Any = {"cache": name, **where}
            learner = LayerWise(ResNetCifar(20), "classification", sample=data.inputs[:2], blocks=8, **how)
            learner.enter(7 / 8)
            runs.append(Timed(name, learner))
        for epoch in range(EPOCHS):
            order = torch.randperm(EXAMPLES, generator=generator)
            for ids in order.split(BATCH):
                batch = Batch(data.inputs[ids], data.targets[ids], data.ids[ids])
                for run in runs:
                    started = time.perf_counter()
                    run.learner.step(batch)
                    (run.later if epoch else run.first).append(1e3 * (time.perf_counter() - started))
        kept = runs[1].learner.kept_bytes
        for run in runs:
            first, later = statistics.median(run.first), statistics.median(run.later)
            speed = statistics.median(runs[0].later) / later
            rows.append([run.name, f"{first:.1f}", f"{later:.1f}", f"{speed:.1f}"])
    write_result(
        "learn/layer_wise_cache",
        title="A training step of the last of eight blocks of ResNet-20",
        columns=["inputs of the block", "first epoch, ms", "later epochs, ms", "times as fast as recomputing"],
        rows=rows,
        notes=[
            f"Medians over the steps of 1 and {EPOCHS - 1} epochs, {EXAMPLES} examples in batches of {BATCH}. The kept "
            f"features are {kept / 1e6:.1f} MB, {kept // EXAMPLES} bytes for an example; its pixels are "
            f"{data.inputs[0].nbytes} bytes as float32."
        ],
    )


if __name__ == "__main__":
    main()
