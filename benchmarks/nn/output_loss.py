"""Linear and boosted outputs against softmax and cross entropy: epochs to an accuracy, saturation, calibration.

    python -m benchmarks.nn.output_loss             all of it: a quarter of an hour
    python -m benchmarks.nn.output_loss speed       one table: "speed", "saturation" or "calibration"

The folder $LEANTRAIN_DATA has `mnist` and `fashion-mnist` with their idx files. The networks are MLPs of 3, 6 or 12
layers, the hidden ones 256 wide, trained on 10,000 examples in batches of 100 by SGD with momentum 0.9 at a constant
learning rate. Every loss has the same five rates to choose from, by the epochs to the accuracy on 5,000 other training
examples, on another seed; the figures are then of the test set.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn

from benchmarks.result import write_result
from leantrain.data.idx import FILES, read_idx
from leantrain.nn import MLP
from leantrain.nn.calibration import Calibration, calibration_error
from leantrain.nn.output_loss import OutputLoss

ROOT = Path(__file__).parent.parent.parent
DATA = Path(os.environ.get("LEANTRAIN_DATA", ROOT.parent / "shared" / "data"))
TRAINED, TUNED_ON, TESTED_ON, WIDTH, BATCH = 10_000, 5_000, 5_000, 256, 100
RATES, SEEDS, TUNING_SEED = (0.003, 0.01, 0.03, 0.1, 0.3), (0, 1, 2), 100
EPOCHS, TUNING_EPOCHS = 8, 3
STEPS = TRAINED // BATCH
LOOKS = [25, 50, 75, *range(100, 301, 50), *range(400, EPOCHS * STEPS + 1, 100)]
"""Steps after which accuracy is measured: most of the differences are early."""
CASES = (("mnist", 3), ("mnist", 6), ("mnist", 12), ("fashion-mnist", 3), ("fashion-mnist", 6), ("fashion-mnist", 12))
LARGE_INPUTS = ("mnist", 3)
"""The case that is measured on standardised pixels too, which make the first logits three times as large."""
TARGETS = {"mnist": 0.92, "fashion-mnist": 0.80}
TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}
LOSSES: dict[str, Callable[[], OutputLoss]] = {
    "softmax, cross entropy": lambda: OutputLoss("cross_entropy"),
    "linear": lambda: OutputLoss("linear"),
    "cubic, 0.1": lambda: OutputLoss("cubic", alpha=0.1),
    "exp, 0.1": lambda: OutputLoss("exp", alpha=0.1),
}
REFERENCE = "softmax, cross entropy"


@dataclass(frozen=True)
class Split:
    """Images [N, 784], pixels from 0 to 1, and their classes."""

    images: Tensor
    classes: Tensor

    def part(self, start: int, size: int) -> Split:
        return Split(self.images[start : start + size], self.classes[start : start + size])

    def standardised(self) -> Split:
        return Split((self.images - 0.2) / 0.3, self.classes)


@dataclass(frozen=True)
class Run:
    """Accuracy on the judging split at some steps."""

    accuracy: dict[int, float]

    def epochs_to(self, target: float) -> float:
        """On the line between two looks; infinite if never."""
        before = (0, 0.1)
        for step, accuracy in self.accuracy.items():
            if accuracy >= target:
                return (before[0] + (step - before[0]) * (target - before[1]) / (accuracy - before[1])) / STEPS
            before = step, accuracy
        return math.inf

    def after(self, epochs: int) -> float:
        return 100 * self.accuracy[epochs * STEPS]


def read(name: str) -> tuple[Split, Split]:
    """Training and test images."""
    splits = []
    for part in ("train", "test"):
        images, classes = (torch.from_numpy(read_idx(DATA / name / f"{file}.gz").copy()) for file in FILES[part])
        splits.append(Split(images.flatten(1).float() / 255, classes.long()))
    return splits[0], splits[1]


def network(depth: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return MLP(784, classes=10, hidden=[WIDTH] * (depth - 1))


def batches(data: Split, epochs: int, seed: int) -> Iterable[Split]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.classes), generator=generator).split(BATCH):
            yield Split(data.images[rows], data.classes[rows])


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    return (model(data.images).argmax(1) == data.classes).double().mean().item()


def train(
    model: nn.Module, loss: OutputLoss, rate: float, data: Split, judge: Split, epochs: int, seed: int,
    until: float = 2.0,
) -> Run:  # fmt: skip
    """Train for so many epochs, or until an accuracy is reached or a loss is not finite."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    found: dict[int, float] = {}
    for step, batch in enumerate(batches(data, epochs, seed), start=1):
        optimizer.zero_grad()
        value = loss(model(batch.images), batch.classes)
        value.backward()
        optimizer.step()
        if step in LOOKS:
            found[step] = accuracy(model, judge)
            if found[step] >= until or not value.isfinite():
                break
    return Run(found | {step: found[max(found)] for step in LOOKS if step <= epochs * STEPS and step not in found})


def tuned(target: float, depth: int, loss: OutputLoss, train_split: Split) -> float:
    """The rate that is first at the accuracy; where none is, the one that comes closest."""
    data, judge = train_split.part(0, TRAINED), train_split.part(TRAINED, TUNED_ON)
    runs = {
        rate: train(network(depth, TUNING_SEED), loss, rate, data, judge, TUNING_EPOCHS, TUNING_SEED, target)
        for rate in RATES
    }
    return min(runs, key=lambda rate: (runs[rate].epochs_to(target), -max(runs[rate].accuracy.values())))


def speed() -> None:
    rows = []
    for name, depth in CASES:
        train_split, test = read(name)
        rows += case(TITLES[name], TARGETS[name], depth, train_split, test)
        if (name, depth) == LARGE_INPUTS:
            title = f"{TITLES[name]}, standardised"
            rows += case(title, TARGETS[name], depth, train_split.standardised(), test.standardised())
    write_result(
        "nn/output_loss",
        title="Epochs to an accuracy: linear and boosted outputs against softmax and cross entropy",
        columns=["data", "layers", "loss", "lr", "epochs to the accuracy", "cross entropy's / these",
                 "% after 1 epoch", "% after 2", f"% after {EPOCHS}"],
        rows=rows,
        notes=[
            f"The accuracy: {', '.join(f'{TITLES[name]} {100 * goal:.0f} %' for name, goal in TARGETS.items())}; "
            f"measured on {TESTED_ON:,} test images every quarter to whole epoch, on the line in between. "
            f"{TRAINED:,} training examples, batches of {BATCH}, hidden layers of {WIDTH}, SGD with momentum 0.9; "
            "pixels from 0 to 1 unless standardised.",
            f"Mean ± standard deviation over seeds {', '.join(map(str, SEEDS))}; learning rates chosen from "
            f"{', '.join(f'{rate:g}' for rate in RATES)} for each row, on other examples and another seed.",
        ],
    )  # fmt: skip


def case(title: str, target: float, depth: int, train_split: Split, test: Split) -> list[list[object]]:
    """A row for each loss on one set of images."""
    data, judge = train_split.part(0, TRAINED), test.part(0, TESTED_ON)
    rows: list[list[object]] = []
    reference = math.inf
    for label, make in LOSSES.items():
        rate = tuned(target, depth, make(), train_split)
        runs = [train(network(depth, seed), make(), rate, data, judge, EPOCHS, seed) for seed in SEEDS]
        epochs = [run.epochs_to(target) for run in runs]
        if label == REFERENCE:
            reference = mean(epochs)
        reached = max(epochs) < math.inf
        rows.append([
            title, depth, label, f"{rate:g}", _spread(epochs) if reached else "not with all seeds",
            f"{reference / mean(epochs):.2f}" if reached and reference < math.inf else "",
            *(_spread([run.after(each) for run in runs]) for each in (1, 2, EPOCHS)),
        ])  # fmt: skip
        print(*rows[-1], sep=" | ", flush=True)
    return rows


def saturation() -> None:
    """The untrained network, its logits made large: which mistakes send back no error any more?"""
    test = read("mnist")[1].part(0, TESTED_ON).standardised()
    losses = {"softmax, squared error": OutputLoss("softmax_squared"), **{k: make() for k, make in LOSSES.items()}}
    rows = []
    for factor in (1, 20, 100, 300):
        with torch.no_grad():
            logits = factor * _default_network(0)(test.images)
        wrong = logits.argmax(1) != test.classes
        shares = []
        for loss in losses.values():
            z = logits[wrong].clone().requires_grad_()
            loss.reduction = "sum"
            loss(z, test.classes[wrong]).backward()
            assert z.grad is not None
            shares.append(f"{100 * (z.grad.norm(dim=1) < 1e-3).double().mean():.1f}")
        rows.append([factor, *shares])
    write_result(
        "nn/output_loss_saturation",
        title="Misclassified examples that send back next to no error, %",
        columns=["logits times", *losses],
        rows=rows,
        notes=[
            f"{TESTED_ON:,} test images of MNIST, standardised, and an untrained MLP of 784-256-256-10 in PyTorch's "
            "default initialisation. Next to no error: its norm at the logits is below 0.001.",
        ],
    )


def _default_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )  # fmt: skip


def calibration() -> None:
    """What softmax makes of the scores, before and after a fit on held-out examples."""
    train_split, test = read("fashion-mnist")
    data, held_out = train_split.part(0, TRAINED), train_split.part(TRAINED, TUNED_ON)
    rows = []
    for label, make in LOSSES.items():
        model = network(3, 0)
        train(model, make(), 0.02, data, test.part(0, TESTED_ON), EPOCHS, 0)
        with torch.no_grad():
            scores, judged = model(held_out.images), model(test.images)
        cells = [_judged(judged, test.classes)]
        for kind in ("temperature", "vector"):
            cells.append(_judged(Calibration(10, kind).fit(scores, held_out.classes)(judged), test.classes))
        rows.append([label, *cells])
    write_result(
        "nn/calibration",
        title="Scores as probabilities: negative log-likelihood and calibration error on Fashion-MNIST",
        columns=["loss", "softmax of the scores", "with a temperature", "with vector scaling"],
        rows=rows,
        notes=[
            "Nats per example, and in brackets the expected calibration error in 15 bins, on 10,000 test images, one "
            f"seed. MLP of 784-256-256-10, {EPOCHS} epochs at a learning rate of 0.02 on {TRAINED:,} examples; fitted "
            f"on {TUNED_ON:,} others.",
        ],
    )


def _judged(logits: Tensor, classes: Tensor) -> str:
    return f"{nn.functional.cross_entropy(logits, classes):.3f} ({100 * calibration_error(logits, classes):.1f} %)"


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


TABLES = {"speed": speed, "saturation": saturation, "calibration": calibration}


def main(wanted: list[str]) -> None:
    for name in TARGETS:
        if not (DATA / name).is_dir():
            sys.exit(f"skipped: there is no folder {DATA / name}; set LEANTRAIN_DATA")
    for name in wanted or TABLES:
        if name not in TABLES:
            sys.exit(f"there is no table {name!r} (allowed: {', '.join(TABLES)})")
        TABLES[name]()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
