"""What is learned on MNIST when 2 of 8 workers lie in every step, under each rule of aggregation and each attack.

    python -m benchmarks.exchange.monna

Eight workers train a perceptron together; each draws its digits from its own mixture of classes (Dirichlet, alpha 5).
The workers of the table are rows of one matrix in one process, which is what makes so many runs affordable; rules and
attacks are the package's own functions, and a step computes what a step of `MoNNA` computes. A last run checks that:
it repeats a cell with eight real processes, `MoNNA` and `leantrain.testing.attacks.lie`.

ALIE and FOE look for the strength that moves honest workers farthest, every tenth step among eight. An accuracy is that
of the worst honest worker on the test digits. Images are halved to 14 x 14, so that all of it takes minutes.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.result import write_result
from leantrain.data.idx import read_idx
from leantrain.exchange.robust.aggregators import (
    Rule,
    coordinate_median,
    geometric_median,
    krum,
    mean,
    nearest_neighbor_average,
    trimmed_mean,
)
from leantrain.exchange.robust.monna import MoNNA
from leantrain.nn import MLP
from leantrain.testing.attacks import (
    alie,
    around,
    constant,
    flip_labels,
    foe,
    gaussian,
    infinite,
    lie,
    mimic,
    random_sign,
    scaled,
    searched,
    sign_flip,
    silence,
)

WORKERS, LIARS, STEPS, BATCH, ALPHA, DECAY = 8, 2, 800, 25, 5.0, 1e-4
PIXELS, HIDDEN, CLASSES = 14 * 14, 64, 10
SHAPES = [(HIDDEN, PIXELS), (HIDDEN,), (CLASSES, HIDDEN), (CLASSES,)]
SEARCH_EVERY = 10
STRENGTHS = {alie: (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0), foe: (0.01, 0.03, 0.1, 0.3, 0.6, 1.0, 1.5, 3.0)}
CHECK_STEPS, CHECK_Z = 300, 1.0
"""Of the short runs: their steps, and how far the liars of the one in real processes, who use ALIE, are off."""


@dataclass(frozen=True)
class Moment:
    """What liars know in a step."""

    step: int
    honest: Tensor
    """[h, d], what honest workers send."""
    before: Tensor
    """[d], the mean of their models before the step."""
    mislabelled: Tensor
    """[d], that mean after a step along the momentum of gradients of flipped labels."""
    harm: Callable[[Tensor], float]


Attack = Callable[[Moment], Tensor]
Schedule = Callable[[int], float]


class Searched:
    """An attack whose strength is looked for every few steps."""

    def __init__(self, attack: Callable[[Tensor, float], Tensor]) -> None:
        self.attack, self.strength = attack, 0.0

    def __call__(self, moment: Moment) -> Tensor:
        if moment.step % SEARCH_EVERY == 0:

            def remembered(honest: Tensor, strength: float) -> Tensor:
                lies[strength] = self.attack(honest, strength)
                return lies[strength]

            lies: dict[float, Tensor] = {}
            worst = searched(remembered, moment.honest, moment.harm, STRENGTHS[self.attack])
            self.strength = next(strength for strength, lied in lies.items() if lied is worst)
        return self.attack(moment.honest, self.strength)


ATTACKS: dict[str, Callable[[], Attack]] = {
    "label flip": lambda: lambda moment: moment.mislabelled,
    "ALIE, searched": lambda: Searched(alie),
    "FOE, searched": lambda: Searched(foe),
    "sign flip": lambda: lambda moment: sign_flip(moment.honest),
    "steps reversed": lambda: lambda moment: around(moment.before, sign_flip)(moment.honest),
    "steps x -10": lambda: lambda moment: around(moment.before, scaled)(moment.honest),
    "mimic": lambda: lambda moment: mimic(moment.honest),
    "noise": lambda: lambda moment: gaussian(moment.honest, 0.1, seed=moment.step),
    "random sign": lambda: lambda moment: random_sign(moment.honest, seed=moment.step),
    "constant": lambda: lambda moment: constant(moment.honest),
    "silence": lambda: lambda moment: silence(moment.honest),
    "infinity": lambda: lambda moment: infinite(moment.honest),
}
FEW = ("label flip", "ALIE, searched", "FOE, searched", "sign flip", "steps reversed")


@dataclass(frozen=True)
class Column:
    """A rule, the workers' momentum, with how many seeds it runs and under which attacks."""

    title: str
    rule: Rule
    momentum: float = 0.99
    seeds: int = 1
    attacks: tuple[str, ...] = FEW


COLUMNS = [
    Column("MoNNA", nearest_neighbor_average, seeds=3, attacks=tuple(ATTACKS)),
    Column("mean", mean, seeds=3, attacks=tuple(ATTACKS)),
    Column("MoNNA, momentum 0", nearest_neighbor_average, momentum=0.0),
    Column("Krum", krum),
    Column("median", coordinate_median),
    Column("trimmed mean", trimmed_mean),
    Column("geometric median", geometric_median),
]


def main() -> None:
    free = {0.99: [learned(mean, None, 0.99, seed) for seed in range(3)], 0.0: [learned(mean, None, 0.0, 0)]}
    table: dict[str, list[str]] = {"nobody lies, plain mean": [], **{attack: [] for attack in ATTACKS}}
    furthest = 0.0
    for column in COLUMNS:
        say(column.title)
        table["nobody lies, plain mean"].append(shown(free[column.momentum][: column.seeds]))
        for attack in ATTACKS:
            found = [
                learned(column.rule, ATTACKS[attack](), column.momentum, seed)
                for seed in range(column.seeds if attack in column.attacks else 0)
            ]
            table[attack].append(shown(found))
            if column is COLUMNS[0]:
                furthest = max(furthest, statistics.mean(free[0.99]) - statistics.mean(found))
    say("a short run")
    short = [
        learned(mean if attack is None else nearest_neighbor_average, attack, 0.99, 0, CHECK_STEPS, steep)
        for attack in (None, ATTACKS["ALIE, searched"](), ATTACKS["steps reversed"]())
    ]
    say("real processes")
    simulated, real, spread = learned(nearest_neighbor_average, fixed, 0.99, 0, CHECK_STEPS), *in_processes()
    write_result(
        "exchange/monna",
        title=f"Accuracy in % on MNIST when {LIARS} of {WORKERS} workers lie, by attack and rule",
        columns=["attack", *(column.title for column in COLUMNS)],
        rows=[[attack, *cells] for attack, cells in table.items()],
        notes=[
            f"Test accuracy of the worst honest worker after {STEPS} steps; with two figures, the mean and the lowest "
            f"of 3 seeds. Perceptron {PIXELS}-{HIDDEN}-{CLASSES}, batch {BATCH} per worker, Dirichlet alpha "
            f"{ALPHA:.0f}, momentum 0.99 unless it says 0, learning rate 0.75 falling linearly to 0, weight decay "
            f"{DECAY}. Attacks are on models, and on steps where it says so. The largest mean loss of MoNNA against "
            "the plain mean of 8 honest workers: "
            f"{furthest:.1f} points.",
            f"After only {CHECK_STEPS} steps of 0.75 / (1 + floor(t / 50)), one seed: {short[0]:.1f} % without liars, "
            f"{short[1]:.1f} % with MoNNA under ALIE, {short[2]:.1f} % under reversed steps.",
            "Workers of the table are simulated in one process with the package's rules and attacks. The same with "
            f"{WORKERS} real processes over gloo, ALIE with z = {CHECK_Z:.0f}, {CHECK_STEPS} steps: {real:.1f} % of "
            f"the worst honest worker, {simulated:.1f} % simulated; honest models differ by at most "
            f"{100 * spread:.2f} % of their norm.",
        ],
    )  # fmt: skip


def linear(step: int) -> float:
    """The learning rate of the table."""
    return 0.75 * (1 - step / STEPS)


def steep(step: int) -> float:
    """One that leaves training unfinished: what is lost while steps are still large."""
    return 0.75 / (1 + step // 50)


def learned(
    rule: Rule, attack: Attack | None, beta: float, seed: int, steps: int = STEPS, schedule: Schedule = linear
) -> float:
    """Accuracy in percent of the worst honest worker. Without an attack all are honest."""
    honest = WORKERS - (LIARS if attack else 0)
    weights = start(seed).repeat(honest, 1)
    momenta, mislabelled = torch.zeros_like(weights), torch.zeros_like(weights[:1])
    for step in range(steps):
        rate, before = schedule(step), weights.mean(0)
        images, labels = batch(seed, step)
        momenta.mul_(beta).add_(gradients(weights, images[:honest], labels[:honest]), alpha=1 - beta)
        sent = weights - rate * (momenta + DECAY * weights)
        if attack:
            wrong = flip_labels(labels[-1:], CLASSES)
            mislabelled.mul_(beta).add_(gradients(before[None], images[-1:], wrong), alpha=1 - beta)
            harm = functools.partial(displaced, rule, sent)
            sent = with_lies(sent, attack(Moment(step, sent, before, before - rate * mislabelled[0], harm)))
        weights = mixed(rule, sent, honest)
    return min(accuracy(each) for each in weights)


def fixed(moment: Moment) -> Tensor:
    """The attack of the run in real processes."""
    return alie(moment.honest, CHECK_Z)


def with_lies(honest: Tensor, lied: Tensor) -> Tensor:
    return torch.cat([honest, lied.expand(LIARS, -1)])


def mixed(rule: Rule, sent: Tensor, honest: int) -> Tensor:
    """Every honest worker's next model, [h, d]."""
    liars = len(sent) - honest
    if rule is nearest_neighbor_average:
        return torch.stack([nearest_neighbor_average(sent, liars, own) for own in range(honest)])
    return rule(sent, liars).repeat(honest, 1)


def displaced(rule: Rule, honest: Tensor, lied: Tensor) -> float:
    """How far honest models end from the honest mean, in the mean over workers."""
    return float((mixed(rule, with_lies(honest, lied), len(honest)) - honest.mean(0)).norm(dim=1).mean())


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return MLP(PIXELS, CLASSES, hidden=(HIDDEN,))


def start(seed: int) -> Tensor:
    return torch.cat([param.detach().flatten() for param in mlp(seed).parameters()])


def logits(weights: Tensor, images: Tensor) -> Tensor:
    """Of h perceptrons at once: [h, d], [h, B, pixels] -> [h, B, classes]."""
    parts = weights.split([int(np.prod(shape)) for shape in SHAPES], dim=1)
    w1, b1, w2, b2 = (part.view(-1, *shape) for part, shape in zip(parts, SHAPES, strict=True))
    return torch.baddbmm(b2.unsqueeze(1), F.relu(torch.baddbmm(b1.unsqueeze(1), images, w1.mT)), w2.mT)


def gradients(weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Of each worker's mean loss: [h, d], [h, B, pixels], [h, B] -> [h, d]."""
    weights = weights.detach().requires_grad_()
    loss = F.cross_entropy(logits(weights, images).flatten(0, 1), labels.flatten(), reduction="sum") / BATCH
    return torch.autograd.grad(loss, weights)[0]


@torch.no_grad()
def accuracy(weights: Tensor) -> float:
    images, labels = mnist("t10k")
    return 100 * float((logits(weights[None], images[None])[0].argmax(1) == labels).float().mean())


def batch(seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Every worker's examples of a step: [workers, B, pixels] and [workers, B]."""
    images, labels = mnist("train")
    chosen = places(seed)[:, step]
    return images[chosen], labels[chosen]


@functools.cache
def places(seed: int) -> Tensor:
    """Which digits every worker sees in every step, [workers, steps, B]: drawn by class, then among its examples."""
    mixtures = np.random.default_rng(seed).dirichlet([ALPHA] * CLASSES, size=WORKERS)
    draws = torch.Generator().manual_seed(seed)
    classes = torch.multinomial(torch.from_numpy(mixtures), STEPS * BATCH, replacement=True, generator=draws)
    labels = mnist("train")[1]
    counts = labels.bincount(minlength=CLASSES)
    within = (torch.rand(classes.shape, generator=draws) * counts[classes]).long()
    return labels.argsort(stable=True)[(counts.cumsum(0) - counts)[classes] + within].view(WORKERS, STEPS, BATCH)


@functools.cache
def mnist(part: str) -> tuple[Tensor, Tensor]:
    """Images [n, pixels], halved in both directions, and labels [n]."""
    root = Path(os.environ.get("LEANTRAIN_DATA", Path(__file__).parents[3] / "shared" / "data"))
    pixels, labels = (
        torch.from_numpy(np.array(read_idx(root / "mnist" / f"{part}-{kind}-ubyte.gz")))
        for kind in ("images-idx3", "labels-idx1")
    )
    images = F.avg_pool2d(pixels.unsqueeze(1).float() / 255, 2).flatten(1)
    return (images - 0.1307) / 0.3081, labels.long()


def in_processes() -> tuple[float, float]:
    """The worst honest accuracy of a run in real processes, and how far apart honest models are, relative to a norm."""
    mnist("train"), mnist("t10k"), places(0)  # once, before the others are forked
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        workers = [fork.Process(target=work, args=(Path(name), rank)) for rank in range(WORKERS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise SystemExit("a process failed: nothing is recorded")
        models = torch.stack([torch.load(Path(name) / f"{rank}.pt") for rank in range(WORKERS - LIARS)])
    return min(accuracy(model) for model in models), float(torch.cdist(models, models).max() / models[0].norm())


def work(folder: Path, rank: int) -> None:
    """One worker: a loop as a user would write it."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=WORKERS)
    liars = range(WORKERS - LIARS, WORKERS)
    exchange = lie(MoNNA(byzantine=LIARS), functools.partial(alie, z=CHECK_Z), liars)
    model = exchange.attach(mlp(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=DECAY)
    exchange.connect([optimizer])
    for step in range(CHECK_STEPS):
        optimizer.param_groups[0]["lr"] = linear(step)
        images, labels = batch(0, step)
        optimizer.zero_grad()
        F.cross_entropy(model(images[rank]), labels[rank]).backward()
        exchange.finish_gradients()
        optimizer.step()
        exchange.after_step()
    torch.save(torch.cat([param.detach().flatten() for param in model.parameters()]), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def shown(found: list[float]) -> str:
    """A cell: nothing, one figure, or the mean and the lowest."""
    if len(found) < 2:
        return "".join(f"{each:.1f}" for each in found)
    return f"{statistics.mean(found):.1f} ({min(found):.1f})"


def say(what: str) -> None:
    print(f"# {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
