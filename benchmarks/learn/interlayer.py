"""The steps that simulate interlayer regularisation, each alone: what they do for blocks that learn by themselves.

    python -m benchmarks.learn.interlayer              all of it: a quarter of an hour
    python -m benchmarks.learn.interlayer products     seconds: what depth does to a matrix
    python -m benchmarks.learn.interlayer clean        one of the two ablations: "clean" or "noisy"

Ablations: 4000 images of Fashion-MNIST, from the folder `fashion-mnist` in $LEANTRAIN_DATA, as they are or with 30 % of
the labels drawn anew; four blocks of 256 (linear, batch normalisation, ReLU) and an output layer, which is a block of
its own, so that all four have a local loss. All blocks learn at once; in the last three rows, one after the other. SGD
with momentum 0.9, a cosine schedule and batches of 100, 15 epochs. Learning rates are chosen from three by the best
block's accuracy on held-out training images, on another seed.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.result import write_result
from leantrain.data.idx import read_idx
from leantrain.learn import Backprop, LayerWise, LocalUpdates, Whole
from leantrain.learn.fitting import Pair
from leantrain.learn.interlayer import DepthPreconditioner, factorise

ROOT = Path(__file__).parent.parent.parent
DATA = Path(os.environ.get("LEANTRAIN_DATA", ROOT.parent / "shared" / "data")) / "fashion-mnist"
SEEDS, TUNING_SEED, RATES = (0, 1, 2), 100, (0.02, 0.05, 0.125)
EXAMPLES, HELD_OUT, NOISE = 4000, 4000, 0.3
WIDTH, BLOCKS, EPOCHS, BATCH = 256, 4, 15, 100

BACKPROP = "backpropagation"
STEPS: dict[str, tuple[type[Whole], dict[str, Any]]] = {
    BACKPROP: (Backprop, {}),
    "none": (LocalUpdates, {}),
    "look_ahead 1": (LocalUpdates, {"look_ahead": 1}),
    "factors 2": (LocalUpdates, {"factors": 2}),
    "depth 2": (LocalUpdates, {"depth": 2}),
    "depth 3": (LocalUpdates, {"depth": 3}),
    "transport 0.03": (LocalUpdates, {"transport": 0.03}),
    "transport 0.1": (LocalUpdates, {"transport": 0.1}),
    "transport 0.3": (LocalUpdates, {"transport": 0.3}),
    "transport 1": (LocalUpdates, {"transport": 1.0}),
    "all: look_ahead 1, depth 2, transport 0.1": (LocalUpdates, {"look_ahead": 1, "depth": 2, "transport": 0.1}),
    "one block after the other": (LayerWise, {}),
    "laps 2": (LayerWise, {"laps": 2}),
    "laps 3": (LayerWise, {"laps": 3}),
}
"""What is trained how: four blocks at once, but for the last three."""


@dataclass(frozen=True)
class Images:
    """Normalised images [N, 784] float32 and their labels [N] int64."""

    train: Pair
    test: Pair


def images(seed: int, noise: float, held_out: bool) -> Images:
    """A sample of the training images, and the test images, or others of the training images, to judge by.

    `noise` is the part of the training labels that are drawn anew from all ten.
    """
    part = {
        name: (
            torch.from_numpy(read_idx(DATA / f"{name}-images-idx3-ubyte.gz").copy()).flatten(1),
            torch.from_numpy(read_idx(DATA / f"{name}-labels-idx1-ubyte.gz").copy()).long(),
        )
        for name in ("train", "t10k")
    }
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(part["train"][0]), generator=generator)
    pixels, labels = (each[order[:EXAMPLES]] for each in part["train"])
    redrawn = torch.rand(EXAMPLES, generator=generator) < noise
    labels = torch.where(redrawn, torch.randint(10, (EXAMPLES,), generator=generator), labels)
    mean, std = pixels.float().mean(), pixels.float().std()
    judged = part["t10k"]
    if held_out:
        rest = order[EXAMPLES : EXAMPLES + HELD_OUT]
        judged = (part["train"][0][rest], part["train"][1][rest])
    return Images(Pair((pixels - mean) / std, labels), Pair((judged[0] - mean) / std, judged[1]))


def network() -> nn.Sequential:
    """Four blocks, "block1" to "block4", and the "output" layer."""
    widths = [784, *[WIDTH] * BLOCKS]
    blocks = {
        f"block{k}": nn.Sequential(nn.Linear(widths[k - 1], WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU())
        for k in range(1, BLOCKS + 1)
    }
    return nn.Sequential(OrderedDict({**blocks, "output": nn.Linear(WIDTH, 10)}))


@dataclass(frozen=True)
class Trained:
    """Accuracies of the heads on blocks 1 to 4 in percent, of backpropagation only the last; and effective ranks."""

    accuracies: list[float]
    rank: float
    """exp(entropy of s / sum s), s the singular values of block 4's centred outputs for the images judged by."""


def train(step: str, rate: float, seed: int, data: Images) -> Trained:
    """One run to the end."""
    torch.manual_seed(seed)
    model = network()
    method, how = STEPS[step]
    if step != BACKPROP:
        cut = [*(f"block{k}" for k in range(2, BLOCKS + 1)), "output"]
        how = {"sample": data.train.inputs[:2], "cut": cut, **how}
    learner = method(model, "classification", **how)
    steps = EPOCHS * EXAMPLES // BATCH
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(EXAMPLES, generator=generator) for _ in range(EPOCHS)])
    stage = None
    for number, rows in enumerate(order.split(BATCH)):
        position = learner.enter(number / steps)
        if learner.stage != stage:
            stage = learner.stage
            optimizer = torch.optim.SGD(learner.module.parameters(), rate, momentum=0.9)
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * position)) / 2
        learner.step(Pair(data.train.inputs[rows], data.train.targets[rows]))
        learner.hand_over()
        optimizer.step()
        optimizer.zero_grad()
    found = learner.evaluate(data.test)
    heads = [""] if step == BACKPROP else [f"block{k}/" for k in range(1, BLOCKS + 1)]
    accuracies = [100 * (found[f"{head}correct"] / found[f"{head}count"]).item() for head in heads]
    return Trained(accuracies, effective_rank(features(model, data.test.inputs)))


@torch.no_grad()
def features(model: nn.Sequential, inputs: Tensor) -> Tensor:
    """[N, WIDTH] of block 4."""
    return model.eval()[:-1](inputs)


def effective_rank(found: Tensor) -> float:
    """Of the covariance's square root, which has the singular values of the centred features."""
    values = torch.linalg.eigvalsh(found.T.cov().double()).clamp_min(0).sqrt()
    return torch.special.entr(values / values.sum()).sum().exp().item()


def ablation(noise: float) -> None:
    """Every step alone, and all of them."""
    name, rows = "noisy" if noise else "clean", []
    held_out = images(TUNING_SEED, noise, held_out=True)
    data = {seed: images(seed, noise, held_out=False) for seed in SEEDS}
    for step in STEPS:
        tried = {rate: max(train(step, rate, TUNING_SEED, held_out).accuracies) for rate in RATES}
        rate = max(RATES, key=tried.__getitem__)
        runs = [train(step, rate, seed, data[seed]) for seed in SEEDS]
        blocks = [[run.accuracies[k] for run in runs] for k in range(len(runs[0].accuracies))]
        last = [run.accuracies[-1] for run in runs]
        best = [max(run.accuracies) for run in runs]
        cells = [""] * (BLOCKS - len(blocks)) + [f"{statistics.mean(block):.1f}" for block in blocks]
        rows.append([step, f"{rate:g}", *cells[:-1], spread(last), spread(best), spread([run.rank for run in runs])])
        print(rows[-1], flush=True)
    labels = f"{NOISE:.0%} of the labels drawn anew".replace("%", " %") if noise else "labels as they are"
    write_result(
        f"learn/interlayer_{name}",
        title=f"Interlayer regularisation, simulated: {labels}",
        columns=["step", "lr", *(f"block {k}" for k in range(1, BLOCKS)), f"block {BLOCKS}", "best block",
                 f"effective rank, block {BLOCKS}"],
        rows=rows,
        notes=[
            f"Test accuracy in percent by the heads of each block, of backpropagation by its output; mean (± standard "
            f"deviation) over seeds {', '.join(map(str, SEEDS))}. {EXAMPLES} images of Fashion-MNIST, {EPOCHS} epochs, "
            f"{labels}; blocks of one layer of {WIDTH}. Learning rates chosen from {', '.join(map(str, RATES))}.",
        ],
    )  # fmt: skip


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def products() -> None:
    """What depth does to one matrix: how well the preconditioner stands in for factors, and which rank both prefer."""
    rows = [
        [f"path of 3 factors, lr {lr:g}", f"{way:.1e} apart, as a part of the way after 200 steps", ""]
        for lr in (1e-4, 1e-3)
        for way in [apart(lr)]
    ]
    for depth in (1, 2, 3):
        error, rank = completed(depth)
        rows.append([f"completion with {depth} factor{'s' * (depth > 1)}", f"{error:.3f}", f"{rank:.1f}"])
    write_result(
        "learn/interlayer_products",
        title="What depth does to a matrix",
        columns=["experiment", "distance, or relative error of unseen entries", "effective rank"],
        rows=rows,
        notes=[
            "Path: gradient descent of a 20 x 15 matrix on half of squared errors in float64, the preconditioner's end "
            "against the product's. Completion: 35 % of a 60 x 60 matrix of rank 3 is seen; Adam on factors with "
            "entries of size 0.001 (one matrix: lr 0.01, several: 0.003) until the squared error is below 1e-7.",
        ],
    )


def apart(lr: float, depth: int = 3, steps: int = 200) -> float:
    """How far the preconditioner's matrix ends from the factors' product, as a part of the way the product has gone."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(100, 15, generator=generator, dtype=torch.float64)
    target, start = (torch.randn(20, 15, generator=generator, dtype=torch.float64) / 15**0.5 for _ in range(2))
    layers = [nn.Linear(15, 20, bias=False, dtype=torch.float64) for _ in range(2)]
    for layer in layers:
        layer.weight = nn.Parameter(start.clone())
    factored, single = layers
    factorise(factored, [""], depth)
    preconditioner = DepthPreconditioner(single.parameters(), depth, every=1, floor=0.0, keep_norm=False)
    optimizers = [torch.optim.SGD(layer.parameters(), lr) for layer in layers]
    for _ in range(steps):
        for layer, optimizer in zip(layers, optimizers, strict=True):
            optimizer.zero_grad()
            ((layer(inputs) - inputs @ target.mT) ** 2).sum(1).mean().div(2).backward()
        preconditioner.apply()
        for optimizer in optimizers:
            optimizer.step()
    ends = [layer.weight.detach() for layer in layers]
    return ((ends[0] - ends[1]).norm() / (ends[0] - start).norm()).item()


def completed(depth: int, size: int = 60, rank: int = 3) -> tuple[float, float]:
    """Relative error where nothing was seen, and the effective rank of what is found."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, rank, generator=generator) for _ in range(2))
    truth = left @ right.mT / rank**0.5
    seen = torch.rand(size, size, generator=generator) < 0.35
    factors = [nn.Parameter(1e-3 * torch.randn(size, size, generator=generator)) for _ in range(depth)]
    optimizer = torch.optim.Adam(factors, lr=1e-2 if depth == 1 else 3e-3)
    for _ in range(20_000):
        product = factors[0] if depth == 1 else torch.linalg.multi_dot(factors)
        loss = (product - truth)[seen].square().mean()
        if loss < 1e-7:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    product = product.detach()
    error = (product - truth)[~seen].norm() / truth[~seen].norm()
    share = torch.linalg.svdvals(product)
    return error.item(), torch.special.entr(share / share.sum()).sum().exp().item()


PARTS = {"products": products, "clean": lambda: ablation(0.0), "noisy": lambda: ablation(NOISE)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for wanted in sys.argv[1:] or PARTS:
        if wanted not in PARTS:
            sys.exit(f"{wanted!r} is no part of this benchmark; there are {', '.join(PARTS)}")
        if wanted != "products" and not DATA.is_dir():
            print(f"{wanted} left out: there is no folder {DATA}")
            continue
        PARTS[wanted]()
