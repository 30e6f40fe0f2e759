"""What is lost and what is saved when four processes meet every some steps instead of in every one.

    python -m benchmarks.exchange.local_sgd         ten minutes

Four processes train a small LLaMA on Python's standard library, by leantrain's own loop, AdamW in each. The learning
rate of every row is the best of three by the mean loss of three seeds on held-out text. Bytes are the ones
that the exchange says it sent, which `benchmarks.exchange.break_even` checks against the kernel's counters.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.result import write_result
from leantrain.recipe import Component, Recipe
from leantrain.train import train

PROCESSES, STEPS, SEEDS = 4, 320, (0, 1, 2)
RATES = (0.001, 0.003, 0.01)
BASE = Recipe(
    name="local-sgd", steps=STEPS, batch_size=16, eval_batches=8, checkpoint_every=0, trackers=[], device="cpu",
    ledger=True, warmup=0.1,
    model=Component("leantrain.nn.Llama", {"hidden": 64, "mlp_hidden": 172, "layers": 2, "heads": 2}),
    data=Component("leantrain.data.Text", {"context": 64, "max_bytes": 2_000_000}),
    optim=Component("leantrain.optim.AdamW", {"lr": 0.01}),
)  # fmt: skip


def _of(name: str, **arguments: Any) -> Component:
    return Component(f"leantrain.exchange.{name}", arguments)


EXCHANGES = {
    "Dense, every step": _of("Dense"),
    "LocalSGD, every 8": _of("LocalSGD", every=8),
    "DiLoCo, every 8": _of("DiLoCo", every=8),
    "DiLoCo, every 32": _of("DiLoCo", every=32),
    "DiLoCo, every 32, bfloat16": _of("DiLoCo", every=32, codec="bfloat16"),
    "DiLoCo, every 32, entropy": _of("DiLoCo", every=32, codec="entropy"),
    "DiLoCo, every 32, one-bit": _of("DiLoCo", every=32, codec="one-bit"),
    "DiLoCo, every 32, one-bit, no residual": _of("DiLoCo", every=32, codec="one-bit", residual=False),
}


def main() -> None:
    found, rates = {}, {}
    for name, exchange in EXCHANGES.items():
        recipes = {rate: replace(BASE, exchange=exchange, optim=_adamw(rate)) for rate in RATES}
        tried = {rate: [together(replace(recipe, seed=seed)) for seed in SEEDS] for rate, recipe in recipes.items()}
        rates[name] = min(RATES, key=lambda rate: sum(run["val_loss"] for run in tried[rate]))
        found[name] = tried[rates[name]]
        print(name, rates[name], found[name], file=sys.stderr, flush=True)
    single = replace(BASE, batch_size=BASE.batch_size // PROCESSES, optim=_adamw(rates["Dense, every step"]))
    alone = [together(replace(single, seed=seed), 1) for seed in SEEDS]
    dense = found["Dense, every step"]
    rows = [_row(name, rates[name], runs, dense) for name, runs in found.items()]
    rows.append(_row(f"one process, batch {BASE.batch_size // PROCESSES}", rates["Dense, every step"], alone, dense))
    write_result(
        "exchange/local_sgd",
        title=f"{PROCESSES} processes, {STEPS} steps of {BASE.batch_size} x 64 bytes of text, AdamW",
        columns=["exchange", "lr", "held-out loss", "sd", "kB per step", "x fewer than Dense"],
        rows=rows,
        notes=[
            f"Held-out loss in nats per byte, mean and standard deviation of {len(SEEDS)} seeds; learning rates: those "
            f"of {', '.join(map(str, RATES))} with the best mean. The last row is what a process learns with nobody to "
            "talk to, at the rate of Dense.",
        ],
    )


def together(recipe: Recipe, size: int = PROCESSES) -> dict[str, float]:
    """Held-out loss, and bytes per step, of a run in `size` processes."""
    fork = multiprocessing.get_context("fork")
    with TemporaryDirectory() as folder, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.close()
        ends = [fork.Pipe(duplex=False) for _ in range(size)]
        variables = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        workers = [
            fork.Process(target=_work, args=(recipe, Path(folder), {**variables, "RANK": str(rank)}, ends[rank][1]))
            for rank in range(size)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise SystemExit(f"{recipe.exchange.class_path}: a process failed, nothing is recorded")
        found: dict[str, float] = ends[0][0].recv()
        return found


def _work(recipe: Recipe, folder: Path, variables: Mapping[str, str], answer: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(variables)
    result = train(recipe, folder / "run")
    assert result.ledger is not None
    answer.send({"val_loss": result.final["val_loss"], "bytes": result.ledger["bytes_sent"] / recipe.steps})


def _adamw(rate: float) -> Component:
    return Component("leantrain.optim.AdamW", {"lr": rate})


def _row(name: str, rate: float, runs: list[dict[str, float]], dense: list[dict[str, float]]) -> list[str]:
    losses, sent = [run["val_loss"] for run in runs], runs[0]["bytes"]
    fewer = f"{dense[0]['bytes'] / sent:.1f}" if sent else ""
    spread = f"{statistics.stdev(losses):.3f}"
    return [name, f"{rate:g}", f"{statistics.mean(losses):.3f}", spread, f"{sent / 1e3:.1f}", fewer]


if __name__ == "__main__":
    main()
