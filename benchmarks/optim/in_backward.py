"""A LLaMA's optimizer step in the backward pass and after it: gradient memory, weights, norm and time, side by side.

    python -m benchmarks.optim.in_backward

Every run has its own copy of the same weights and sees the same micro-batches of Python's standard library as bytes.
The runs take turns step by step, so that a change in the machine's speed meets all of them. Memory is what the ledger
sees in the first steps, which compute every matrix' first basis; times are of the later ones, without a ledger.
"""

from __future__ import annotations

import copy
import math
import statistics
import sysconfig
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.result import write_result
from leantrain.ledger.ledger import Ledger
from leantrain.nn import Llama
from leantrain.optim import AdamW, GaLoreAdamW, parameter_groups
from leantrain.optim.in_backward import BasisFrom, InBackward, step_in_backward

SHAPE: dict[str, Any] = {"vocab_size": 256, "context": 128, "hidden": 256, "layers": 4, "heads": 4}
BATCH, LENGTH = 16, 128
RANK, REFRESH = 64, 8
MEASURED, TIMED = 3, 11  # steps with a ledger, and after them


def main() -> None:
    torch.set_num_threads(1)
    text = standard_library(4_000_000)
    start = llama()
    runs = [run for name, make in (("AdamW", adamw), ("GaLore", galore)) for run in family(name, make, start)]
    held_out = batch(text, -1)
    for step in range(MEASURED + TIMED):
        for run in runs:
            run.step(batch(text, step), measured=step < MEASURED)

    rows = []
    for run in runs:
        base = run.ordinary or run
        rows.append([
            run.name,
            run.accumulate,
            f"{run.gradient_peak / 1e6:.2f}",
            f"{run.gradient_peak / base.gradient_peak:.2f}",
            "" if run is base else f"{difference(run.model, base.model):.0e}",
            f"{loss_of(run.model, held_out).item():.3f}",
            f"{statistics.median(run.seconds) / statistics.median(base.seconds):.2f}",
        ])  # fmt: skip
    sizes = [4 * p.numel() for p in start.parameters()]
    norms, apart = norm_errors(text, start, steps=10), float64_difference(text, start, steps=4)
    write_result(
        "optim/in_backward",
        title=f"Steps in backward, LLaMA of {sum(sizes) / 4e6:.1f} M parameters, rank {RANK}",
        columns=[
            "run", "micro-batches", "peak gradients MB", "x ordinary", "largest weight difference", "held-out loss",
            "x time",
        ],
        rows=rows,
        notes=[
            f"All gradients are {sum(sizes) / 1e6:.2f} MB, the largest single one {max(sizes) / 1e6:.2f} MB. "
            f"{MEASURED + TIMED} steps of {BATCH} x {LENGTH} tokens, a new basis of each matrix every {REFRESH}.",
            "Differences and times are from the ordinary run of the same optimizer and number of micro-batches. "
            "Rounding in float32 grows on the way, as the run with micro-batches in reverse shows; in float64, bases "
            f'from "whole" and the ordinary way are {apart:.0e} apart after 4 steps.',
            f"The norm of 4 micro-batches, estimated: {100 * root_mean_square(norms):.1f} % off (root mean square over "
            f"{len(norms)} steps), at worst {100 * max(map(abs, norms)):.1f} %.",
        ],
    )  # fmt: skip


def adamw(model: Llama) -> torch.optim.Optimizer:
    return AdamW(model.parameters(), lr=1e-3)


def galore(model: Llama) -> torch.optim.Optimizer:
    groups = parameter_groups(model, [{"params": "hidden", "rank": RANK}])
    return GaLoreAdamW(groups, lr=4e-3, refresh=REFRESH, basis="subspace")


@dataclass
class Run:
    """One way to train, with all that is measured of it."""

    name: str
    accumulate: int
    model: Llama
    optimizer: torch.optim.Optimizer
    ordinary: Run | None = None
    """The run it is compared with."""
    backwards: bool = False
    """Whether it takes the micro-batches of a step in reverse order."""
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.model, self.optimizer, memory_every=1, flops=False)

    def step(self, tokens: Tensor, measured: bool) -> None:
        started = time.perf_counter()
        with self.ledger if measured else nullcontext():
            micro_batches = tokens.chunk(self.accumulate)
            for micro_batch in reversed(micro_batches) if self.backwards else micro_batches:
                with self._phase("forward", measured):
                    loss = loss_of(self.model, micro_batch) / self.accumulate
                with self._phase("backward", measured):
                    loss.backward()
            with self._phase("update", measured):
                if not isinstance(self.optimizer, InBackward):  # which measures the norm anyway
                    torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
                self.optimizer.step()
                self.optimizer.zero_grad()
            if measured:
                self.ledger.step_done(len(tokens))
        if not measured:
            self.seconds.append(time.perf_counter() - started)

    @property
    def gradient_peak(self) -> int:
        """Bytes, as the ledger saw them."""
        peak: int = self.ledger.summary()["peak_bytes"]["gradients"]
        return peak

    def _phase(self, name: str, measured: bool) -> AbstractContextManager[Any]:
        return self.ledger.phase(name) if measured else nullcontext()


def family(name: str, make: Callable[[Llama], torch.optim.Optimizer], start: Llama) -> list[Run]:
    """One optimizer the ordinary way and in backward, with one micro-batch and with four."""
    runs = []
    for accumulate in (1, 4):
        model = copy.deepcopy(start)
        ordinary = Run(f"{name}, ordinary", accumulate, model, make(model))
        runs.append(ordinary)
        if accumulate > 1:
            model = copy.deepcopy(start)
            runs.append(Run(f"{name}, ordinary, reversed", accumulate, model, make(model), ordinary, backwards=True))
        bases: tuple[BasisFrom, ...] = ("whole", "first") if accumulate > 1 and name == "GaLore" else ("first",)
        for basis_from in bases:
            model = copy.deepcopy(start)
            hooked = step_in_backward(model, make(model), accumulate=accumulate, basis_from=basis_from)
            kind = f'{name}, in backward, bases from "{basis_from}"' if len(bases) > 1 else f"{name}, in backward"
            runs.append(Run(kind, accumulate, model, hooked, ordinary))
    return runs


def float64_difference(text: Tensor, start: Llama, steps: int) -> float:
    """Largest weight difference between the ordinary way and bases from "whole", four micro-batches, in float64."""
    model, whole = copy.deepcopy(start).double(), copy.deepcopy(start).double()
    runs = [
        Run("in backward", 4, model, step_in_backward(model, galore(model), accumulate=4, basis_from="whole")),
        Run("ordinary", 4, whole, galore(whole)),
    ]
    for step in range(steps):
        for run in runs:
            run.step(batch(text, step), measured=False)
    return difference(model, whole)


def norm_errors(text: Tensor, start: Llama, steps: int) -> list[float]:
    """Relative errors of the reported norm, against the whole gradient that a second model has at the same weights."""
    model, whole = copy.deepcopy(start), copy.deepcopy(start)
    optimizer = step_in_backward(model, galore(model), accumulate=4)
    errors = []
    for step in range(steps):
        whole.load_state_dict(model.state_dict())
        whole.zero_grad()
        for micro_batch in batch(text, step).chunk(4):
            for each in (model, whole):
                (loss_of(each, micro_batch) / 4).backward()
        optimizer.step()
        true = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters() if p.grad is not None])
        errors.append((optimizer.grad_norm / true - 1).item())
    return errors


def root_mean_square(values: list[float]) -> float:
    return math.sqrt(statistics.mean(value * value for value in values))


def llama() -> Llama:
    torch.manual_seed(0)
    return Llama(**SHAPE)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def batch(text: Tensor, number: int) -> Tensor:
    """BATCH pieces of the text, from other places for every number."""
    generator = torch.Generator().manual_seed(number + 1)
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH,), generator=generator)
    return torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()])


def standard_library(size: int) -> Tensor:
    """The first bytes of the modules of Python's standard library, in alphabetical order."""
    text = b""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += file.read_bytes()
        if len(text) >= size:
            break
    return torch.tensor(list(text[:size]))


def difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


if __name__ == "__main__":
    main()
