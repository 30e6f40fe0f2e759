"""What the hidden layers of a network do, trained as a whole and block by block, and what leaving it early saves.

    python -m benchmarks.analysis.probe         2 minutes

An MLP of 8 hidden layers on 10,000 images of Fashion-MNIST, with true labels and with 30 % of them drawn anew. Draws
docs/images/probe.png. Data is looked for in the folder LEANTRAIN_DATA, by default ../shared/data.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.exchange.entropy_coded import ROOT, fashion_mnist
from benchmarks.result import write_result
from leantrain.analysis.early_exit import EarlyExit, early_exit
from leantrain.analysis.probe import MEASURES, Probed, draw_probes, probe
from leantrain.learn import Backprop, LocalUpdates
from leantrain.learn.fitting import Pair

PICTURE = ROOT / "docs" / "images" / "probe.png"
SEEDS = (0, 1)
HIDDEN, WIDTH, CLASSES = 8, 256, 10
LAYERS = [str(layer) for layer in range(1, HIDDEN + 1)]
"""The second and later ones, with the output layer."""
EPOCHS, BATCH, PEAK_LR = 6, 100, 1e-3
WRONG = 0.3
TOLERANCES = (0.0, 0.01)
UNTRAINED, WHOLE, BLOCKS = "not trained", "Backprop", "LocalUpdates, 8 blocks"
Trained = tuple[nn.Module, Backprop | LocalUpdates]


def main() -> None:
    inputs, labels, test_inputs, test_labels = fashion_mnist()
    half = len(test_labels) // 2  # to choose by, and to report on
    choosing = [(test_inputs[:half], test_labels[:half])]
    trained: dict[tuple[str, bool, int], Trained] = {}
    for seed in SEEDS:
        for wrong in (False, True):
            given = redrawn(labels, seed) if wrong else labels
            for name in (WHOLE, BLOCKS):
                trained[name, wrong, seed] = train(name, seed, inputs, given)
    by_depth(trained, choosing)
    rows = []
    for wrong in (False, True):
        for name in (WHOLE, BLOCKS):
            for tolerance in TOLERANCES:
                runs = [trained[name, wrong, seed] for seed in SEEDS]
                exits = [
                    early_exit(model, learner if name == BLOCKS else LAYERS, choosing, tolerance=tolerance)
                    for model, learner in runs
                ]
                own = [accuracy(model, test_inputs[half:], test_labels[half:]) for model, _ in runs]
                early = [accuracy(each, test_inputs[half:], test_labels[half:]) for each in exits]
                rows.append([
                    name, "30 % drawn anew" if wrong else "true", f"{100 * tolerance:g}",
                    ", ".join(each.name for each in exits), f"{100 * statistics.mean(own):.2f}",
                    f"{100 * statistics.mean(early):.2f}",
                    f"{statistics.mean(each.flops_share(test_inputs[:1]) for each in exits):.2f}",
                    f"{statistics.mean(seconds_share(each, test_inputs[:256]) for each in exits):.2f}",
                ])  # fmt: skip
    write_result(
        "analysis/early_exit",
        title="Leaving a network early",
        columns=["trained by", "labels", "tolerance, points", "left before, by seed", "whole model, %", "early exit, %",
                 "FLOPs left", "seconds left"],
        rows=rows,
        notes=[
            f"Means of {len(SEEDS)} seeds. {SET_UP} The exit is chosen by 5,000 of the test images, accuracy is that "
            "on the other 5,000. Exits of Backprop are linear read-outs in closed form, of 2,048 images half to fit "
            "with and half to choose by; those of LocalUpdates are the heads that it was trained with. Seconds: of a "
            "batch of 256 images, the least of 200 passes.",
        ],
    )  # fmt: skip


SET_UP = (
    f"MLP with {HIDDEN} hidden layers of {WIDTH} and batch normalisation on 10,000 images of Fashion-MNIST, AdamW, one "
    f"cycle up to {PEAK_LR:g}, {EPOCHS} epochs, batch {BATCH}."
)


def by_depth(trained: dict[tuple[str, bool, int], Trained], batches: list[tuple[Tensor, Tensor]]) -> None:
    """The six measures at every place, true labels, and their picture."""
    found: dict[str, list[Probed]] = {UNTRAINED: [between_layers(network(seed), batches) for seed in SEEDS]}
    for name in (WHOLE, BLOCKS):
        found[name] = [between_layers(trained[name, False, seed][0], batches) for seed in SEEDS]
    rows = []
    for name, runs in found.items():
        for places in zip(*(run.places for run in runs), strict=True):
            means = {key: statistics.mean(getattr(place, key) for place in places) for key in MEASURES}
            percents = [f"{100 * means.pop(key):.1f}" for key in ("linear_probe", "nearest_mean")]
            rows.append([name, places[0].name, *percents, *(f"{value:.3g}" for value in means.values())])
    own = {name: statistics.mean(run.accuracy for run in runs) for name, runs in found.items()}
    write_result(
        "analysis/probe",
        title="What the hidden layers of a network do",
        columns=["trained by", "what goes into", "linear probe, %", "nearest mean, %", *list(MEASURES)[2:]],
        rows=rows,
        notes=[
            f"Means of {len(SEEDS)} seeds. {SET_UP} Seen on {found[WHOLE][0].examples:,} test images, half to fit with "
            f"and half to judge by. The models' own accuracy on the judging half: "
            f"{', '.join(f'{name} {100 * value:.1f} %' for name, value in own.items())}.",
        ],
    )
    draw_probes({name: runs[0] for name, runs in found.items()}, PICTURE)


def between_layers(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Probed:
    """Without the places inside of layers, in front of the normalisation."""
    found = probe(model, batches)
    return replace(found, places=tuple(place for place in found.places if "." not in place.name))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    widths = [28 * 28, *[WIDTH] * HIDDEN]
    layers = [
        nn.Sequential(nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()) for before, after in pairwise(widths)
    ]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))


def redrawn(labels: Tensor, seed: int) -> Tensor:
    """With some of them drawn anew from all classes."""
    draw = torch.Generator().manual_seed(seed)
    anew = torch.randint(CLASSES, labels.shape, generator=draw)
    return torch.where(torch.rand(labels.shape, generator=draw) < WRONG, anew, labels)


def train(name: str, seed: int, inputs: Tensor, labels: Tensor) -> Trained:
    model = network(seed)
    learner: Backprop | LocalUpdates
    if name == WHOLE:
        learner = Backprop(model, "classification")
    else:
        learner = LocalUpdates(model, "classification", sample=inputs[:8], cut=LAYERS[:-1])
    optimizer = torch.optim.AdamW(learner.module.parameters(), weight_decay=0.0)
    draw = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=EPOCHS * len(inputs) // BATCH)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(inputs), generator=draw).split(BATCH):
            optimizer.zero_grad()
            result = learner.step(Pair(inputs[rows], labels[rows]))
            optimizer.step()
            schedule.step()
    print(f"{name}, seed {seed}: loss {result.loss:.3f}", file=sys.stderr)
    return model.eval(), learner


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    model.eval()
    return float((model(inputs).argmax(1) == labels).float().mean())


@torch.no_grad()
def seconds_share(leaves: EarlyExit, inputs: Tensor) -> float:
    """Of the whole model's seconds; turn and turn about, so that a busy machine slows both."""
    least = [float("inf"), float("inf")]
    for _ in range(200):
        for at, module in enumerate((leaves, leaves.model)):
            start = time.perf_counter()
            module(inputs)
            least[at] = min(least[at], time.perf_counter() - start)
    return least[0] / least[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
