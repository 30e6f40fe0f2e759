"""Two hundred faults in the middle of training: workers killed, workers frozen, links cut.

    python -m benchmarks.train.faults [FAULTS]

Three processes on three hosts of the network lab train a small LLaMA with each of several exchanges, a checkpoint every
second step. At a random moment one of them is killed (SIGKILL), frozen (SIGSTOP) or loses its link. Everybody else must
end by itself, in time, with an error that names a rank. Then all start anew from the newest checkpoint, until the run
is at its end, where it must be the run that was left alone, to the last bit; and so on with the next run.

Without root there is no lab: the processes meet on the loopback interface, and no links are cut.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import statistics
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from benchmarks.netlab import Lab, namespaces
from benchmarks.result import write_result
from leantrain.checkpoint import newest_intact
from leantrain.errors import RunError
from leantrain.recipe import Component, Recipe, recipe_from_dict, recipe_to_dict

FAULTS, WORLD, STEPS = 200, 3, 120
LONGEST_WAIT_S = 0.8
TIMEOUT_S = 3.0
HANG_S = 30.0
"""Timeout, patience with the silent and a loaded machine together take less."""

EXCHANGES: dict[str, dict[str, Any]] = {
    "Dense": {},
    "MajorityVote": {},
    "DeepGradientCompression": {},
    "LocalSGD": {"every": 4},
    "FullyShard": {},
}
Kind = Literal["killed", "frozen", "cut off"]


@dataclass
class Tally:
    """What became of those who were left, for one kind of fault."""

    faults: int = 0
    left: int = 0
    named: int = 0
    """ended with an error that names the rank at fault, or the connection to it"""
    other: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    faults = int(sys.argv[1]) if len(sys.argv) > 1 else FAULTS
    reason = namespaces.why_not()
    if reason:
        print(f"no links will be cut: {reason}")
    lab: Lab | nullcontext[None] = nullcontext() if reason else Lab(hosts=WORLD)
    chance = random.Random(20)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.train.faults", "leantrain.train", "torch._dynamo"])
    tallies: dict[Kind, Tally] = {"killed": Tally(), "frozen": Tally(), "cut off": Tally()}
    same, different, damaged = 0, 0, 0
    with lab as there, TemporaryDirectory() as name:
        trial = Trial(context, there if isinstance(there, Lab) else None, Path(name))
        whole = {exchange: trial.undisturbed(exchange) for exchange in EXCHANGES}
        kinds: list[Kind] = ["killed"] * 4 + ["frozen"] + (["cut off"] if trial.lab else [])
        for number in range(faults):
            exchange = list(whole)[number % len(whole)]
            kind, victim, after_s = chance.choice(kinds), chance.randrange(WORLD), chance.uniform(0, LONGEST_WAIT_S)
            finished = trial.life(exchange, (kind, victim, after_s), tallies[kind])
            damaged += trial.damaged(exchange)
            if finished or number >= faults - len(whole):
                same, different = trial.compare(exchange, whole[exchange], same, different)
    write_result(
        "train/faults",
        title=f"{sum(tally.faults for tally in tallies.values())} faults of {WORLD} processes in training",
        columns=["one was", "faults", "others left", "ended naming it", "ended otherwise", "hung", "median s", "max s"],
        rows=[
            [kind, tally.faults, tally.left, tally.named, sum(tally.other.values()) - tally.other["hung"],
             tally.other["hung"], *([round(statistics.median(tally.seconds), 2), round(max(tally.seconds), 2)]
             if tally.seconds else ["", ""])]
            for kind, tally in tallies.items() if tally.faults
        ],
        notes=[
            f"Seconds from the fault to the end of each process that was left; LEANTRAIN_TIMEOUT_S={TIMEOUT_S:g}. "
            "Where a link was cut nobody is gone, and the one behind it must end as well. "
            f"Exchanges: {', '.join(EXCHANGES)}. Damaged checkpoints: {damaged}. Runs that went on to their end: "
            f"{same + different}; equal to the run that was left alone in weights, optimizer state and log, to the "
            f"last bit: {same}.",
            *(f"Otherwise: {text} ({count})." for tally in tallies.values() for text, count in tally.other.items()),
        ],
    )  # fmt: skip
    hung = any(tally.other["hung"] for tally in tallies.values())
    sys.exit(1 if hung or different or damaged else 0)


class Trial:
    """One run per exchange, in `folder`, that lives as often as it must."""

    def __init__(self, context: Any, lab: Lab | None, folder: Path) -> None:
        self.context, self.lab, self.folder = context, lab, folder
        self.port = 29600

    def life(self, exchange: str, fault: tuple[Kind, int, float] | None, tally: Tally, out: str = "run") -> bool:
        """One life of the run, ended by a fault unless it ends before; whether it got to its end."""
        self.port += 1
        ends: list[Connection] = []
        workers: list[BaseProcess] = []
        for rank in range(WORLD):
            here, there = self.context.Pipe()
            host = self.lab.hosts[rank] if self.lab else None
            address = self.lab.address(0) if self.lab else "127.0.0.1"
            described = recipe_to_dict(recipe(exchange))
            where = str(self.folder / exchange / out)
            args = (described, where, there, host, self.environment(rank, address, TIMEOUT_S if fault else 60.0))
            workers.append(self.context.Process(target=live, args=args))
            workers[-1].start()
            ends.append(here)
            there.close()
        try:
            said = heard(ends[0]) if ends[0].poll(60) else ("is late",)  # only rank 0 has events to tell
            if said[0] != "started":
                raise RuntimeError(f"the run with exchange {exchange} did not start: {' '.join(said)}")
            if fault is not None:
                kind, victim, after_s = fault
                if not wait(ends, timeout=after_s):
                    self.watch(kind, victim, workers, ends, tally)
                    return False
            ended = [heard(end) if end.poll(120) else ("hangs",) for end in ends]
            if fault is None and any(said[0] != "finished" for said in ended):
                raise RuntimeError(f"the run with exchange {exchange} did not get to its end: {ended}")
            return all(said[0] == "finished" for said in ended)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()

    def watch(self, kind: Kind, victim: int, workers: list[BaseProcess], ends: list[Connection], tally: Tally) -> None:
        """Do it, and see how the others end."""
        began = time.monotonic()
        if kind == "cut off":
            assert self.lab is not None
            self.lab.cut(victim)
        else:
            os.kill(workers[victim].pid or 0, signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
        tally.faults += 1
        left = {rank: end for rank, end in enumerate(ends) if kind == "cut off" or rank != victim}
        tally.left += len(left)
        while left:
            ready = wait(list(left.values()), timeout=max(0.0, began + HANG_S - time.monotonic()))
            if not ready:
                tally.other["hung"] += len(left)
                break
            for rank in [rank for rank, end in left.items() if end in ready]:
                tally.seconds.append(time.monotonic() - began)
                said = heard(left.pop(rank))
                if said[0] == "error" and blames(said[1], victim, rank):
                    tally.named += 1
                else:
                    tally.other[" ".join(said)[:200]] += 1
        if kind == "cut off":
            assert self.lab is not None
            for worker in workers:
                worker.kill()
                worker.join()
            self.lab.mend(victim)

    def undisturbed(self, exchange: str) -> str:
        """The mark of the run that is left alone."""
        self.life(exchange, None, Tally(), out="whole")
        return fingerprint(self.folder / exchange / "whole")

    def damaged(self, exchange: str) -> int:
        """How many checkpoints are not intact."""
        notes: list[str] = []
        try:
            newest_intact(self.folder / exchange / "run" / "checkpoints", notes.append)
        except RunError as error:
            notes.append(str(error))
        return len(notes)

    def compare(self, exchange: str, whole: str, same: int, different: int) -> tuple[int, int]:
        """Let the run go on to its end, compare it, and let the next one begin."""
        out = self.folder / exchange / "run"
        equal = self.life(exchange, None, Tally()) and fingerprint(out) == whole
        print(f"{exchange}: a run is at its end, {'the same' if equal else 'DIFFERENT'}", flush=True)
        out.rename(out.with_name(f"done-{self.port}"))
        return same + equal, different + (not equal)

    def environment(self, rank: int, address: str, timeout_s: float) -> dict[str, str]:
        return {
            "RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank), "MASTER_ADDR": address,
            "MASTER_PORT": str(self.port), "LEANTRAIN_TIMEOUT_S": str(timeout_s), "TORCH_CPP_LOG_LEVEL": "ERROR",
            **({"GLOO_SOCKET_IFNAME": "eth0"} if self.lab else {}),
        }  # fmt: skip


def recipe(exchange: str) -> Recipe:
    return Recipe(
        name="faults", steps=STEPS, batch_size=2 * WORLD, log_every=1, eval_every=0, checkpoint_every=2, trackers=[],
        device="cpu", exchange=Component(f"leantrain.exchange.{exchange}", EXCHANGES[exchange]),
        model=Component("leantrain.nn.Llama", {"hidden": 32, "mlp_hidden": 64, "layers": 2, "heads": 2}),
        data=Component("leantrain.data.Text", {"context": 16, "max_bytes": 300_000}),
        optim=Component("torch.optim.SGD", {"lr": 1e-2}),
    )  # fmt: skip


def live(described: dict[str, Any], out: str, end: Connection, host: str | None, environment: dict[str, str]) -> None:
    """A worker's life: says when it has started, and how it ended."""
    if host is not None:
        namespaces.enter(host)  # before there is a second thread, which would stay where it is
    os.environ.update(environment)
    import torch

    from leantrain.train import train

    torch.set_num_threads(1)
    began = False

    def on_event(event: dict[str, Any]) -> None:
        nonlocal began
        if not began:
            began = True
            end.send(("started",))

    try:
        train(recipe_from_dict(described), out, on_event=on_event)
        end.send(("finished",))
    except RunError as error:
        end.send(("error", str(error)))
    except BaseException as error:
        end.send(("unexpected", f"{type(error).__name__}: {error}"))


def heard(end: Connection) -> tuple[str, ...]:
    try:
        said: tuple[str, ...] = end.recv()
    except EOFError:
        return ("ended without a word",)
    return said


def blames(message: str, victim: int, speaker: int) -> bool:
    """Whether an error names the rank at fault; the one who was cut off may name all others, or its connections."""
    accused, _, _ = message.partition(" stopped ")
    named = {int(number) for number in re.findall(r"\d+", accused.partition(" of ")[0])}
    return bool(named) if speaker == victim else victim in named


def fingerprint(out: Path) -> str:
    """A hash of the last checkpoint's tensors and of the log without its seconds."""
    digest = hashlib.blake2b()
    for file in sorted((out / f"checkpoints/step-{STEPS:07d}").glob("*.safetensors")):
        digest.update(file.read_bytes())
    for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines():
        digest.update(repr([pair for pair in sorted(json.loads(line).items()) if pair[0] != "seconds"]).encode())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
