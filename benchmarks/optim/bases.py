"""Bases side by side: the time of a refresh against a full SVD's, and the share of real gradients that each captures.

    python -m benchmarks.optim.bases

Two tables. `optim/bases` is about quality: a small Llama learns Python's standard library under GaLore, and at every
refresh each basis is fitted to the gradients of all its hidden matrices, following its own history. `optim/bases_time`
is about time, on square matrices of random numbers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.result import write_result
from leantrain.data import Text
from leantrain.nn import Llama
from leantrain.optim import GaLoreAdamW, parameter_groups
from leantrain.optim.bases import BASES, DCT, SVD, Basis, captured
from leantrain.optim.rules import State

KINDS: dict[str, Basis] = {
    "svd": BASES["svd"],
    "subspace": BASES["subspace"],
    "rsvd": BASES["rsvd"],
    "dct, l1": DCT("l1"),
    "dct, l2": DCT("l2"),
    "coordinate": BASES["coordinate"],
    "random": BASES["random"],
}
PARTS = (4, 8)
"""Ranks, as parts of a matrix's smaller side S: S / 4 and S / 8."""
PRESET, CONTEXT, BATCH, STEPS, REFRESH = "1M", 128, 16, 200, 50
SIZES = (1024, 2048)


def main() -> None:
    torch.set_num_threads(1)
    quality()
    durations()


def quality() -> None:
    torch.manual_seed(0)
    data, model = Text(context=CONTEXT), Llama(vocab_size=256, preset=PRESET, context=CONTEXT)
    groups = parameter_groups(model, [{"params": "hidden", "rank": model.layers[0].attn.q_proj.weight.shape[0] // 4}])
    optimizer = GaLoreAdamW(groups, lr=0.03, refresh=REFRESH, basis="subspace", stagger=False)
    matrices = optimizer.param_groups[0]["params"]
    followed = {
        (name, part): [Followed(matrix, basis, part) for matrix in matrices]
        for name, basis in KINDS.items()
        for part in PARTS
    }
    for step in range(STEPS):
        batch = data.train_batch(seed=0, step=step, size=BATCH)
        loss = F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())
        loss.backward()
        for basis in [basis for bases in followed.values() for basis in bases]:
            if step % REFRESH == 0:
                basis.refresh()
            if step % REFRESH == REFRESH - 1:
                basis.outdated.append(basis.captured())
        optimizer.step()
        optimizer.zero_grad()
    rows = []
    for name in KINDS:
        row: list[str] = [name]
        for part in PARTS:
            best, kind = followed["svd", part], followed[name, part]
            shares = [
                now / most for b, k in zip(best, kind, strict=True) for now, most in zip(k.new, b.new, strict=True)
            ]
            row += [
                f"{mean(kind, 'new'):.4f}",
                f"{statistics.mean(shares):.4f} ({min(shares):.4f})",
                f"{mean(kind, 'outdated'):.4f}",
            ]
        rows.append(row)
    first = [k.first / b.first for b, k in zip(followed["svd", 4], followed["subspace", 4], strict=True)]
    write_result(
        "optim/bases",
        title=f"Share of the gradients' energy |G|^2 in each basis, Llama {PRESET} learning text",
        columns=[
            "basis",
            *(
                column
                for part in PARTS
                for column in (f"rank S / {part}: share", "of the SVD's: mean (least)", f"{REFRESH - 1} steps later")
            ),
        ],
        rows=rows,
        notes=[
            f"{len(matrices)} hidden matrices, S = {min(matrices[0].shape)}, trained by GaLore with subspace iteration "
            f"for {STEPS} steps to a loss of {loss.item():.2f}; means over the refreshes at steps "
            f"{', '.join(map(str, range(REFRESH, STEPS, REFRESH)))}.",
            "Subspace iteration follows the run with one step per refresh. Its very first fit, a step from random "
            f"directions, has {statistics.mean(first):.4f} ({min(first):.4f}) of the SVD's share at S / 4.",
        ],
    )


class Followed:
    """One basis of one matrix at one rank over a run, and what it captured of the gradients."""

    def __init__(self, param: Tensor, basis: Basis, part: int) -> None:
        self.param, self.basis = param, basis
        self.right, self.size = param.shape[0] >= param.shape[1], min(param.shape)
        self.rank = self.size // part
        begun = basis.init(self.size, self.rank, param.detach())
        self.stored: State = {name: value.unsqueeze(0) for name, value in begun.items()}
        self.first = 0.0
        self.new: list[float] = []
        self.outdated: list[float] = []

    def refresh(self) -> None:
        self.stored = self.basis.fit(self.grad, self.stored, not self.first, self.rank, self.right)
        if self.first:
            self.new.append(self.captured())
        else:
            self.first = self.captured()

    def captured(self) -> float:
        return captured(self.grad, self.basis.directions(self.stored, self.size, self.rank, self.grad), self.right)

    @property
    def grad(self) -> Tensor:
        assert self.param.grad is not None
        return self.param.grad.unsqueeze(0)


def mean(bases: list[Followed], what: str) -> float:
    return statistics.mean(value for basis in bases for value in getattr(basis, what))


def durations() -> None:
    rows = []
    for size in SIZES:
        grad = torch.randn(1, size, size, generator=torch.Generator().manual_seed(0))
        svd, _ = refresh_seconds(SVD(), grad, 1)
        rows.append([size, "any", "svd", f"{1e3 * svd:.1f}", "1.0", ""])
        for rank in (size // part for part in PARTS):
            for name in ("subspace", "rsvd", "dct", "coordinate", "random"):
                fit, directions = refresh_seconds(BASES[name], grad, rank)
                faster = "" if name == "random" else f"{svd / fit:.1f}"  # it only counts
                rows.append([size, rank, name, f"{1e3 * fit:.1f}", faster, f"{1e3 * directions:.1f}"])
    write_result(
        "optim/bases_time",
        title="Time of one refresh of a square matrix in float32",
        columns=["S", "rank", "basis", "refresh ms", "times faster than the SVD", "directions ms"],
        rows=rows,
        notes=[
            "Medians of 5. Subspace iteration starts from a basis. Directions: making them from what is stored, with "
            "which every step begins.",
        ],
    )


def refresh_seconds(basis: Basis, grad: Tensor, rank: int) -> tuple[float, float]:
    """Seconds of a fit that follows another, and of making the directions from what it stored."""
    size = grad.shape[2]
    begun = {name: value.unsqueeze(0) for name, value in basis.init(size, rank, grad[0]).items()}
    stored = basis.fit(grad, begun, True, rank, True)
    basis.directions(stored, size, rank, grad)  # the first of a size makes the cosine matrix
    return (
        seconds(lambda: basis.fit(grad, stored, False, rank, True)),
        seconds(lambda: basis.directions(stored, size, rank, grad)),
    )


def seconds(work: Callable[[], object], times: int = 5) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
