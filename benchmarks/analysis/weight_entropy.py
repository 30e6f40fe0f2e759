"""Does the entropy of the weights fall while a network trains? Three answers to the one question, and their curves.

    python -m benchmarks.analysis.weight_entropy

An MLP on Fashion-MNIST with SGD and with Adam, with and without weight decay, and a small LLaMA on characters with
AdamW. Draws docs/images/weight_entropy.png. Data is looked for in the folder LEANTRAIN_DATA, by default ../shared/data.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.exchange.entropy_coded import ROOT, characters, fashion_mnist, llama, mlp
from benchmarks.result import write_result
from leantrain.analysis import EntropyPoint, WeightEntropy, draw_entropy

PICTURE = ROOT / "docs" / "images" / "weight_entropy.png"
SEEDS = (0, 1)
EPOCHS, BATCH = 10, 128
LM_STEPS, LM_BATCH, LM_CONTEXT = 600, 16, 64


@dataclass(frozen=True)
class Case:
    """What is trained, for how many steps, and how often it is looked at."""

    name: str
    steps: int
    every: int
    model: Callable[[int], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    peak_lr: float


def sgd(decay: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=decay)


PER_EPOCH = 10_000 // BATCH
CASES = [
    Case("MLP, SGD, decay 5e-4", EPOCHS * PER_EPOCH, PER_EPOCH, mlp, sgd(5e-4), 0.1),
    Case("MLP, SGD, no decay", EPOCHS * PER_EPOCH, PER_EPOCH, mlp, sgd(0.0), 0.1),
    Case("MLP, Adam", EPOCHS * PER_EPOCH, PER_EPOCH, mlp, lambda m: torch.optim.Adam(m.parameters()), 2e-3),
    Case("LLaMA, AdamW, decay 0.1", LM_STEPS, LM_STEPS // 10, llama,
         lambda m: torch.optim.AdamW(m.parameters(), weight_decay=0.1), 3e-3),
]  # fmt: skip


def main() -> None:
    images, text = fashion_mnist(), characters()
    curves = {case.name: [curve(case, seed, images, text) for seed in SEEDS] for case in CASES}
    rows = []
    for name, runs in curves.items():
        for quantity in ("range", "fixed", "change"):
            points = [statistics.mean(values) for values in zip(*(bits(run, quantity) for run in runs), strict=True)]
            first, last = points[0], points[-1]
            rows.append([
                name, quantity, *(f"{points[at]:.2f}" for at in (0, 1, 3, len(points) - 1)), f"{last - first:+.2f}",
                "falls" if last < first - 0.1 else "rises" if last > first + 0.1 else "stays",
            ])  # fmt: skip
    write_result(
        "analysis/weight_entropy",
        title="Entropy of the weights over training, bits a weight",
        columns=["trained", "quantity", "first", "second", "fourth", "last", "last - first", "it"],
        rows=rows,
        notes=[
            f"Means of {len(SEEDS)} seeds. Looked at before training and at 10 equal intervals after it began; the "
            "columns are such points, and the first change is that of the first interval. range: a grid of 256 values "
            "from each tensor's smallest to its largest weight. fixed: steps of 1/32 of a tensor's initial deviation. "
            "change: what changed in one interval, in those steps. One-cycle learning rates. MLP 784-256-256-10 on "
            f"10,000 images of Fashion-MNIST, {EPOCHS} epochs, batch {BATCH}; LLaMA of the preset `tiny` on 1 MB of "
            f"tiny Shakespeare, {LM_STEPS} steps of {LM_BATCH} x {LM_CONTEXT} characters.",
        ],
    )  # fmt: skip
    draw_entropy({name: runs[0] for name, runs in curves.items()}, PICTURE)


def bits(curve: list[EntropyPoint], quantity: str) -> list[float]:
    return [found for point in curve if (found := getattr(point, quantity)) is not None]


def curve(case: Case, seed: int, images: list[Tensor], text: list[Tensor]) -> list[EntropyPoint]:
    """Train, and look at the weights 11 times."""
    model = case.model(seed)
    meter = WeightEntropy(model, every=case.every)
    optimizer = case.optimizer(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, case.peak_lr, total_steps=case.steps + 1)
    draw = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(case.steps):
        if case.model is llama:
            start = torch.randint(len(text[0]) - LM_CONTEXT, (LM_BATCH, 1), generator=draw)
            windows = text[0][start + torch.arange(LM_CONTEXT + 1)]
            inputs, targets = windows[:, :-1], windows[:, 1:].flatten()
        else:
            if len(order) < BATCH:
                order = torch.randperm(len(images[0]), generator=draw)
            inputs, targets, order = images[0][order[:BATCH]], images[1][order[:BATCH]], order[BATCH:]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs).flatten(0, -2), targets).backward()
        optimizer.step()
        schedule.step()
        meter.after_step()
    print(f"{case.name}, seed {seed}: {meter.curve[-1]}", file=sys.stderr)
    return meter.curve


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
