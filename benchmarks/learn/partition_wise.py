"""Accuracy and memory of partition-wise training beside backpropagation and layer-wise training, at the same epochs.

    python -m benchmarks.learn.partition_wise              about a quarter of an hour on one thread
    python -m benchmarks.learn.partition_wise "K = 4"      only the methods whose names contain this; nothing is saved

An MLP of 8 layers on 10,000 images of Fashion-MNIST, from the folder `fashion-mnist` in $LEANTRAIN_DATA. Every method's
learning rate is chosen from the same grid on a seed of its own, by images held out of the 10,000. Bytes are counted
with saved-tensor hooks while a step is taken; no timing is reported.
"""

from __future__ import annotations

import importlib
import math
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.exchange.entropy_coded import fashion_mnist
from benchmarks.result import write_result
from leantrain.learn import Learner
from leantrain.learn.fitting import Pair
from leantrain.ledger.activations import Activations
from leantrain.ledger.storages import storage_keys

DEPTH, WIDTH, EPOCHS, BATCH, HELD_OUT = 8, 256, 12, 64, 1000
RATES = (0.01, 0.03, 0.1)
SEEDS, TUNING_SEED = (0, 1, 2), 100
WARM_UP = 0.1


@dataclass(frozen=True)
class Method:
    """A learner by its class path, and its arguments."""

    name: str
    path: str
    how: dict[str, Any] = field(default_factory=dict)

    def learner(self, model: nn.Module, sample: Tensor) -> Any:
        module, _, name = self.path.rpartition(".")
        given = self.how if self.path.endswith("Backprop") else {"sample": sample, **self.how}
        return getattr(importlib.import_module(module), name)(model, "classification", **given)


def _partitions(name: str, blocks: int, **how: Any) -> Method:
    return Method(f"PartitionWise, {name}", "leantrain.learn.partition_wise.PartitionWise", {"blocks": blocks, **how})


METHODS = [
    Method("Backprop", "leantrain.learn.backprop.Backprop"),
    _partitions("K = 2", 2),
    _partitions("K = 4", 4),
    _partitions("K = 4, mlp heads", 4, head="mlp"),
    _partitions("K = 4, similarity too", 4, local="both"),
    _partitions("K = 4, larger batches", 4, batch_factors="auto"),
    _partitions("K = 4, replay of 4", 4, schedule="replay", replay=4),
    Method("LayerWise, every layer", "leantrain.learn.layer_wise.LayerWise", {"blocks": DEPTH}),
]


@dataclass(frozen=True)
class Trained:
    """Accuracies in percent, of the model and of its best read-out, and the most bytes held at once."""

    last: float
    best: float
    kept: int
    queued: int
    staleness: float


def main(wanted: str = "") -> None:
    torch.set_num_threads(1)
    images, labels, test_images, test_labels = fashion_mnist()
    tuning = [images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT]]
    rows, whole = [], 0
    for method in METHODS:
        if wanted not in method.name:
            continue
        found = {rate: train(method, rate, TUNING_SEED, tuning).last for rate in RATES}
        rate = max(found, key=lambda each: found[each])
        runs = [train(method, rate, seed, [images, labels, test_images, test_labels]) for seed in SEEDS]
        kept, queued = max(run.kept for run in runs), max(run.queued for run in runs)
        whole = whole or kept
        row = [
            method.name, f"{rate:g}", factors(method), spread(run.last for run in runs),
            spread(run.best for run in runs), f"{kept / 1e6:.2f}", f"{queued / 1e6:.2f}",
            f"{(kept + queued) / whole:.2f}", f"{statistics.mean(run.staleness for run in runs):.1f}",
        ]  # fmt: skip
        print(" | ".join(row), flush=True)
        rows.append(row)
    if wanted:
        return
    write_result(
        "learn/partition_wise",
        title="Partition-wise training at equal epochs",
        columns=["learner", "lr", "batch, times 64", "test accuracy, %", "best read-out, %", "kept for backward, MB",
                 "waiting, MB", "together / backpropagation", "staleness, batches"],
        rows=rows,
        notes=[
            f"Mean ± standard deviation of seeds {', '.join(map(str, SEEDS))}. MLP 784-{WIDTH} x {DEPTH}-10 with batch "
            f"normalisation, 10,000 images of Fashion-MNIST, {EPOCHS} epochs, batches of {BATCH}, SGD with momentum "
            f"0.9, cosine to 0 after a warm-up of {WARM_UP:.0%}; learning rates the best of "
            f"{', '.join(map(str, RATES))} on {HELD_OUT:,} held-out images and another seed. Best read-out: the head, "
            "or the output, that is best on the test set. Kept: the most that autograd holds at a time, with the "
            "batch itself. Waiting: the most in the queues between two steps. Staleness: how many batches before it "
            "was used the last partition's input was made, in the mean.",
        ],
    )  # fmt: skip


def train(method: Method, rate: float, seed: int, data: list[Tensor]) -> Trained:
    """One run to the end, at a peak learning rate."""
    images, labels, test_images, test_labels = data
    torch.manual_seed(seed)
    learner: Learner = method.learner(mlp(), images[:2])
    order = torch.Generator().manual_seed(seed)
    steps = len(images) // BATCH * EPOCHS
    optimizers, stage = make(learner, rate), learner.stage
    kept = queued = 0
    ages: list[float] = []
    for number, chosen in enumerate(batches(order, len(images))):
        factor = schedule(learner.enter(number / steps))
        if learner.stage != stage:
            optimizers, stage = make(learner, rate), learner.stage
        batch = Pair(images[chosen], labels[chosen])
        # Now and then eight in a row, among which is one of the largest.
        result, held = watched(learner, batch) if number % (steps // 40) < 8 else (learner.step(batch), 0)
        learner.hand_over()
        kept, queued = max(kept, held), max(queued, getattr(learner, "queued_bytes", 0))
        ages += [value.item() for name, value in result.metrics.items() if name == f"block{blocks(learner)}/staleness"]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            optimizer.zero_grad()
    sums = learner.evaluate(Pair(test_images, test_labels))
    correct = {name: value.item() for name, value in sums.items() if name.endswith("correct")}
    best = max(correct.values())
    percent = 100 / len(test_labels)
    return Trained(correct["correct"] * percent, best * percent, kept, queued, statistics.mean(ages) if ages else 0.0)


def watched(learner: Learner, batch: Pair) -> tuple[Any, int]:
    """A step, and the most bytes that autograd held in it."""
    held = [*learner.module.parameters(), *learner.module.buffers()]
    meter = Activations()
    with meter.recording(storage_keys(held), follow_operations=False):
        result = learner.step(batch)
    return result, meter.peak or 0


def make(learner: Learner, rate: float) -> list[torch.optim.Optimizer]:
    parts = learner.parts
    made = [torch.optim.SGD(part.params, lr=rate * part.rate, momentum=0.9) for part in parts]
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return list(made)


def batches(order: torch.Generator, examples: int) -> Iterator[Tensor]:
    for _ in range(EPOCHS):
        yield from torch.randperm(examples, generator=order)[: examples // BATCH * BATCH].split(BATCH)


def schedule(spent: float) -> float:
    return spent / WARM_UP if spent < WARM_UP else 0.5 * (1 + math.cos(math.pi * (spent - WARM_UP) / (1 - WARM_UP)))


def mlp() -> nn.Sequential:
    layers = [
        nn.Sequential(nn.Linear(WIDTH if number else 784, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())
        for number in range(DEPTH)
    ]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def blocks(learner: Learner) -> int:
    return len(getattr(learner, "cut", [None]))


def factors(method: Method) -> str:
    found = getattr(method.learner(mlp(), torch.zeros(2, 784)), "batch_factors", (1,))
    return ", ".join(map(str, found)) if len(set(found)) > 1 else str(found[0])


def spread(values: Iterable[float]) -> str:
    found = list(values)
    return f"{statistics.mean(found):.2f} ± {statistics.stdev(found):.2f}"


if __name__ == "__main__":
    main(*sys.argv[1:])
