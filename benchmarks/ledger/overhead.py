"""What watching costs: training steps with a ledger and without, taking turns, on a Llama of a million parameters.

    python -m benchmarks.ledger.overhead

Three copies of the model take the same steps on the same batches, in random order within each turn, so that a change
in the machine's speed meets all: one with a ledger, two without, whose difference shows how far to trust the figures.
Times are CPU seconds of this process, which other processes disturb least. Ordinary and sampled steps are compared
apart; the last row weighs them as in a long run. The weights of all copies are checked to be equal at the end, bit for
bit.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.result import write_result
from leantrain import Ledger
from leantrain.nn import Llama

TURNS, BATCH, CONTEXT, VOCABULARY = 150, 4, 64, 256
SAMPLED_EVERY, SAMPLED_HERE = 100, 15  # the ledger samples one step in 100; here more, for a median of them


class Copy:
    """One of the models with its optimizer, and the CPU seconds of each of its steps."""

    def __init__(self, model: Llama, ledger_every: int | None = None) -> None:
        self.model, self.seconds = model, list[float]()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.ledger = None if ledger_every is None else Ledger(model, self.optimizer, memory_every=ledger_every)

    def step(self, tokens: Tensor) -> None:
        started = time.process_time()
        phase: Callable[[str], AbstractContextManager[object]] = self.ledger.phase if self.ledger else _no_phase
        with phase("forward"):
            loss = cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        with phase("backward"):
            loss.backward()
        with phase("update"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.ledger:
            self.ledger.step_done(examples=BATCH, tokens=BATCH * CONTEXT)
        self.seconds.append(time.process_time() - started)

    def median(self, turns: Collection[int]) -> float:
        """Median milliseconds of the steps of `turns`."""
        return 1e3 * statistics.median(self.seconds[turn] for turn in turns)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Llama(vocab_size=VOCABULARY, context=CONTEXT, preset="1M")
    watched = Copy(copy.deepcopy(model), ledger_every=TURNS // SAMPLED_HERE)
    plain, twin = Copy(model), Copy(copy.deepcopy(model))
    with watched.ledger or nullcontext():
        for _ in range(TURNS):
            tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1))
            for each in random.sample([plain, twin, watched], 3):
                each.step(tokens)
    for weights in zip(*(each.model.parameters() for each in (plain, twin, watched)), strict=True):
        if not all(torch.equal(weights[0], other) for other in weights):
            raise SystemExit("the ledger changed the training: the weights differ")
    report(plain, twin, watched)


def report(plain: Copy, twin: Copy, watched: Copy) -> None:
    sampled = range(TURNS // SAMPLED_HERE, TURNS, TURNS // SAMPLED_HERE)  # without step 0, which also warms up
    ordinary = [turn for turn in range(2, TURNS) if turn not in sampled]
    base, with_ledger = plain.median(ordinary), watched.median(ordinary)
    slow = watched.median(sampled)
    rows = {
        "without": base,
        "without, the other copy": twin.median(ordinary),
        "with, ordinary steps": with_ledger,
        "with, sampled steps": slow,
        f"with, 1 in {SAMPLED_EVERY} sampled": with_ledger + (slow - with_ledger) / SAMPLED_EVERY,
    }
    write_result(
        "ledger/overhead",
        title="A training step with and without a ledger, Llama of 1.0 M parameters, one thread",
        columns=["ledger", "median CPU ms", "ratio"],
        rows=[[name, f"{milliseconds:.2f}", f"{milliseconds / base:.3f}"] for name, milliseconds in rows.items()],
        notes=[
            f"{TURNS} turns of a step each on {BATCH} x {CONTEXT} tokens. All weights equal at the end, bit for bit."
        ],
    )


def _no_phase(name: str) -> AbstractContextManager[object]:
    return nullcontext()


if __name__ == "__main__":
    main()
