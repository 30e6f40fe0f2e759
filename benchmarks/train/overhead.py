"""What leantrain's loop costs beside a loop written by hand: time per step, and peak memory.

    python -m benchmarks.train.overhead

Time: both loops train the same model on the same batches in one process and take turns in blocks of steps, so that a
change in the machine's speed meets both. Their losses and weights must agree to the last bit. Memory: each loop runs
alone in a fresh process; compared are the peaks of its resident set (what torch allocates) and of Python's own
objects.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.nn import functional as F

from benchmarks.result import write_result
from leantrain.journal import Journal
from leantrain.optim import schedule
from leantrain.processes import World
from leantrain.recipe import Component, Recipe, build_data, build_model
from leantrain.train import Run

BLOCK = 2
BLOCKS = 96
MEMORY_STEPS = 12

RECIPE = Recipe(
    name="overhead", steps=BLOCK * BLOCKS, batch_size=8, log_every=10, trackers=[], device="cpu",
    model=Component("leantrain.nn.Llama", {"preset": "tiny"}),
    data=Component("leantrain.data.Text", {"context": 128, "max_bytes": 1_000_000}),
    optim=Component("leantrain.optim.AdamW", {"lr": 1e-3}),
)  # fmt: skip


class ByHand:
    """The loop that a tutorial would show, with the same clipping, schedule and logging interval."""

    def __init__(self) -> None:
        self.data = build_data(RECIPE)
        self.model = build_model(RECIPE, self.data)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
        factor = schedule(RECIPE.schedule, steps=RECIPE.steps, warmup=RECIPE.warmup, min_ratio=RECIPE.min_lr)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.number = 0
        self.losses: list[float] = []

    def step(self) -> None:
        batch = self.data.train_batch(RECIPE.seed, self.number, RECIPE.batch_size)
        logits = self.model(batch.inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), RECIPE.clip)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.number += 1


class Ours:
    """leantrain's `Run`, stepped from outside as its own loop does."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder, lambda event: None, writes=True)
        self.run = Run(RECIPE, World(0, 1, torch.device("cpu")), self.journal)
        self.run.begin(resume=False)
        self.model = self.run.model
        self.losses: list[float] = []

    def step(self) -> None:
        self.run.step(lambda: False)
        if self.run.due(RECIPE.log_every):
            self.run.log()


def main() -> None:
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        hand, ours = ByHand(), Ours(Path(folder))
        times = take_turns(hand.step, ours.step)
        logged = [line[3] for line in ours.journal.curve()["train"]]
    every = RECIPE.log_every
    same_losses = logged == [running_mean(hand.losses[i : i + every]) for i in range(0, len(logged) * every, every)]
    same_weights = all(torch.equal(a, b) for a, b in zip(hand.model.parameters(), ours.model.parameters(), strict=True))
    hand_memory, our_memory = memory("hand"), memory("ours")
    medians = [statistics.median(each) for each in times]
    # The ratio within each pair of neighbouring blocks: what is left when the machine's drift is taken out.
    per_block = [
        statistics.median(times[1][i : i + BLOCK]) / statistics.median(times[0][i : i + BLOCK])
        for i in range(0, len(times[0]), BLOCK)
    ]
    write_result(
        "train/overhead",
        title=f"The loop beside one written by hand: {sum(p.numel() for p in hand.model.parameters()):,} parameters",
        columns=["loop", "median step, ms", "x by hand", "peak resident set, MB", "peak Python objects, MB"],
        rows=[
            ["by hand", f"{1e3 * medians[0]:.3f}", "1", *hand_memory],
            ["leantrain", f"{1e3 * medians[1]:.3f}", f"{medians[1] / medians[0]:.4f}", *our_memory],
        ],
        notes=[
            f"{BLOCKS} blocks of {BLOCK} steps each, taking turns; median of the blocks' ratios "
            f"{statistics.median(per_block):.4f}.",
            f"Equal to the last bit: losses {answer(same_losses)}, weights {answer(same_weights)}.",
        ],
    )
    sys.exit(0 if same_losses and same_weights else 1)


def take_turns(*steps: Callable[[], None]) -> list[list[float]]:
    """Seconds of every step, the functions taking turns in blocks; who begins changes from block to block."""
    times: list[list[float]] = [[] for _ in steps]
    for block in range(BLOCKS):
        order = list(range(len(steps)))[:: 1 if block % 2 == 0 else -1]
        for which in order:
            for _ in range(BLOCK):
                start = time.perf_counter()
                steps[which]()
                times[which].append(time.perf_counter() - start)
    return times


def answer(agreed: bool) -> str:
    return "yes" if agreed else "NO"


def running_mean(losses: list[float]) -> float:
    """The mean as the loop takes it: a sum in float32, divided in float64."""
    total = torch.zeros(())
    for loss in losses:
        total += loss
    return total.item() / len(losses)


def memory(which: str) -> list[str]:
    """Peaks of resident set and Python objects of one loop alone, in MB."""
    peaks = []
    for kind in ("resident", "python"):
        command = [sys.executable, "-m", "benchmarks.train.overhead", which, kind]
        peaks.append(int(subprocess.run(command, capture_output=True, check=True).stdout))
    return [f"{peak / 1e6:.1f}" for peak in peaks]


def measure_memory(which: str, kind: str) -> None:
    """In a process of its own: what twelve steps add to the peak resident set, or to Python's objects."""
    import resource

    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        if kind == "python":
            tracemalloc.start()
        loop = ByHand() if which == "hand" else Ours(Path(folder))
        for _ in range(MEMORY_STEPS):
            loop.step()
        peak = tracemalloc.get_traced_memory()[1] if kind == "python" else None
    print(peak if peak is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure_memory(*sys.argv[1:])
    else:
        main()
