"""A run killed with SIGKILL at thirty random moments against the same run left alone.

    python -m benchmarks.train.kill

A checkpoint is written after every step, so many of the kills fall into the writing of one. Every new life goes on
from the newest intact checkpoint. In the end weights, optimizer state and log must be those of the run that was never
killed, to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.result import write_result
from leantrain.recipe import Component, Recipe
from leantrain.train import train

KILLS = 30
LONGEST_LIFE_S = 1.2

RECIPE = Recipe(
    name="kill", steps=1500, batch_size=4, log_every=1, eval_every=50, eval_batches=2, checkpoint_every=1, trackers=[],
    device="cpu",
    model=Component("leantrain.nn.Llama", {"hidden": 64, "mlp_hidden": 128, "layers": 2, "heads": 2}),
    data=Component("leantrain.data.Text", {"context": 32, "max_bytes": 300_000}),
    optim=Component("leantrain.optim.GaLoreAdamW", {"lr": 1e-3, "rank": 8, "refresh": 20}),
)  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    chance = random.Random(20)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["leantrain.train"])
    with TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        train(RECIPE, whole)
        torn: set[str] = set()
        for _ in range(KILLS):
            life = context.Process(target=live, args=(killed,))
            life.start()
            time.sleep(chance.uniform(0.05, LONGEST_LIFE_S))
            life.kill()
            life.join()
            if life.exitcode != -signal.SIGKILL:
                sys.exit("the run was finished before its last kill: give it more steps")
            torn |= {left.name for left in (killed / "checkpoints").glob(".*.tmp")}
        at_last_kill = newest(killed)
        result = train(RECIPE, killed)
        same = {name: fingerprint(whole, name) == fingerprint(killed, name) for name in ("model", "optimizer-0")}
        same["log"] = log(whole) == log(killed)
    write_result(
        "train/kill",
        title=f"Killed {KILLS} times at random moments, then compared with the run that was left alone",
        columns=["kills", "while a checkpoint was written", "steps at the last kill", "steps at the end",
                 "same weights", "same optimizer state", "same log"],
        rows=[[KILLS, len(torn), at_last_kill, result.steps, *("yes" if each else "NO" for each in same.values())]],
        notes=["Same: to the last bit; of the log, all but the seconds."],
    )  # fmt: skip
    sys.exit(0 if all(same.values()) else 1)


def live(out: Path) -> None:
    """One life of the run."""
    torch.set_num_threads(1)
    train(RECIPE, out)


def newest(out: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    return max((int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*")), default=0)


def fingerprint(out: Path, name: str) -> str:
    """A hash of the tensors in the last checkpoint."""
    return hashlib.blake2b((out / f"checkpoints/step-{RECIPE.steps:07d}/{name}.safetensors").read_bytes()).hexdigest()


def log(out: Path) -> list[dict[str, float]]:
    """log.jsonl without what two runs may differ in."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


if __name__ == "__main__":
    main()
