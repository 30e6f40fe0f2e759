"""What local updates keep for the backward pass, and what they cost in time, by the number of blocks.

    python -m benchmarks.learn.local_updates        two minutes

Bytes are those of storages that autograd holds, counted as they are saved and released (`leantrain.ledger`), at the
worst moment of a step; parameters and the batch are not among them. For L equal layers of width w in K blocks and a
batch of B examples, float32, they should be L B w * 4 without cuts and (L / K + 1) B w * 4 with them: one block and its
input. Steps without and with cuts are timed in turn, so that whatever else the machine does meets both. A step is
forward and backward, without the optimizer's. Draws docs/images/local_updates_memory.png.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.result import write_result
from leantrain.data import Batch
from leantrain.learn import Backprop, LocalUpdates
from leantrain.learn.whole import Whole
from leantrain.ledger.ledger import Ledger
from leantrain.nn import MLP, Llama, ResNetCifar

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "local_updates_memory.png"
REPEATS = 15
WIDTH, EXAMPLES = 256, 128


@dataclass(frozen=True)
class Case:
    """A model, a batch, and the numbers of blocks to cut it into."""

    name: str
    task: Any
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    targets: Callable[[], Tensor]
    blocks: tuple[int, ...]
    layers: int | None = None
    """Where the formula holds: equal layers of WIDTH."""

    def batch(self) -> Batch:
        inputs = self.inputs()
        return Batch(inputs, self.targets(), torch.arange(len(inputs)))


def _mlp(layers: int, blocks: tuple[int, ...]) -> Case:
    return Case(
        f"MLP, {layers} layers of {WIDTH}, batch {EXAMPLES}", "classification",
        lambda: MLP(WIDTH, classes=10, hidden=(WIDTH,) * layers),
        lambda: torch.randn(EXAMPLES, WIDTH), lambda: torch.randint(10, (EXAMPLES,)), blocks, layers,
    )  # fmt: skip


CASES = (
    _mlp(8, (2, 4, 8)),
    _mlp(16, (4, 16)),
    Case(
        "ResNet-20, batch 32 of 32 x 32", "classification", ResNetCifar,
        lambda: torch.randn(32, 3, 32, 32), lambda: torch.randint(10, (32,)), (2, 4, 8),
    ),
    Case(
        "LLaMA, 8 layers of 128, batch 8 x 128", "next_token",
        lambda: Llama(256, 128, hidden=128, mlp_hidden=344, layers=8, heads=4),
        lambda: torch.randint(256, (8, 128)), lambda: torch.randint(256, (8, 128)), (2, 4, 8),
    ),
)  # fmt: skip
OTHERS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    CASES[0].name: [("overlapping", {"blocks": 8, "scheme": "overlapping"})],
    CASES[2].name: [("greedy, balanced by time", {"blocks": blocks, "balance": "time"}) for blocks in CASES[2].blocks],
    CASES[3].name: [("overlapping", {"blocks": 8, "scheme": "overlapping"})],
}
"""What else is measured of a case, beside greedy updates of blocks with as many parameters each."""


def main() -> None:
    torch.manual_seed(0)
    rows: list[list[Any]] = []
    curves: dict[str, dict[int, int]] = {}
    for case in CASES:
        batch = case.batch()
        whole = _peak(lambda model, case=case: Backprop(model, case.task), case, batch)
        rows.append([case.name, "backpropagation", 1, *_bytes(whole, whole, case, 1), "1.00"])
        tried = [("greedy", {"blocks": blocks}) for blocks in case.blocks] + OTHERS.get(case.name, [])
        for name, how in tried:
            (peak, times), blocks = _local(case, batch, **how), how["blocks"]
            rows.append([case.name, name, blocks, *_bytes(peak, whole, case, blocks, name), f"{times:.2f}"])
            if name.startswith("greedy"):
                curves.setdefault(case.name + name.removeprefix("greedy"), {1: whole})[blocks] = peak
        print(*rows, sep="\n", file=sys.stderr, flush=True)
    write_result(
        "learn/local_updates",
        title="Activations kept for the backward pass, and the time of a step, by the number of blocks",
        columns=["model", "updates", "blocks", "peak MB", "formula MB", "x backpropagation", "x its time"],
        rows=rows,
        notes=[
            "Linear heads. Blocks have as many parameters each as can be, unless it says time. x its time: median of "
            f"the ratios of {REPEATS} pairs of steps, the one without cuts beside the one with them. Overlapping: each "
            "loss goes back through one further block.",
        ],
    )
    _draw(curves)


def _local(case: Case, batch: Batch, **how: Any) -> tuple[int, float]:
    """Peak bytes, and how many times as long as backpropagation a step takes."""

    def learner(model: nn.Module) -> Whole:
        return LocalUpdates(model, case.task, sample=batch.inputs[:2], **how)

    ours, theirs = learner(case.build()), Backprop(case.build(), case.task)
    pairs = [(_seconds(ours, batch), _seconds(theirs, batch)) for _ in range(REPEATS + 2)][2:]  # two warm up
    return _peak(learner, case, batch), statistics.median(with_cuts / without for with_cuts, without in pairs)


def _peak(make: Callable[[nn.Module], Whole], case: Case, batch: Batch) -> int:
    """Most bytes held for the backward pass at once, in a step."""
    learner = make(case.build())
    with Ledger(learner.module, memory_every=1) as ledger:
        learner.step(batch)
        ledger.step_done(examples=len(batch))
    found = ledger.summary()["peak_bytes"]["activations"]
    assert isinstance(found, int)
    return found


def _seconds(learner: Whole, batch: Batch) -> float:
    started = time.perf_counter()
    learner.step(batch)
    seconds = time.perf_counter() - started
    learner.module.zero_grad()
    return seconds


def _formula(layers: int, blocks: int, reach: int = 0) -> float:
    """Bytes: of the layers that a loss goes through, and the input of the first of them."""
    held = min(layers, (1 + reach) * layers / blocks) + (blocks > 1 + reach)
    return held * EXAMPLES * WIDTH * 4


def _bytes(peak: int, whole: int, case: Case, blocks: int, name: str = "") -> tuple[str, str, str]:
    formula = f"{_formula(case.layers, blocks, reach=int(name == 'overlapping')) / 1e6:.3f}" if case.layers else ""
    return f"{peak / 1e6:.3f}", formula, f"{peak / whole:.2f}"


def _draw(curves: dict[str, dict[int, int]]) -> None:
    """Measured peaks of the first model beside the formula, and those of all against backpropagation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot, which wants a display and keeps figures
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    first = CASES[0]
    assert first.layers is not None
    measured = curves[first.name]
    left.plot(list(measured), [_formula(first.layers, k) / 1e6 for k in measured], "o-", mfc="none", label="formula")
    left.plot(list(measured), [peak / 1e6 for peak in measured.values()], "x", label="measured")
    left.set(title=first.name, ylabel="MB kept for the backward pass")
    left.legend(frameon=False)
    for name, peaks in curves.items():
        label = name.replace(", batch", ",\nbatch").replace(", balanced", ",\nbalanced")
        right.plot(list(peaks), [peak / peaks[1] for peak in peaks.values()], "o-", label=label)
    right.set(title="against backpropagation", ylabel="x its bytes")
    right.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axes in (left, right):
        numbers = sorted({int(x) for line in axes.lines for x in line.get_xdata()})
        axes.set(xlabel="blocks", ylim=(0, None), xscale="log")
        axes.minorticks_off()
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.grid(alpha=0.3)
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
