"""Trainings that take a second: data and models for the tests of the loop, and a way to run them in real processes."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from leantrain.data import Batch
from leantrain.errors import LeantrainError
from leantrain.recipe import Component, Recipe, recipe_from_dict, recipe_to_dict

REPOSITORY = Path(__file__).parent.parent


class Tokens:
    """A made-up language in which the next token is mostly the last one plus three."""

    task = "next_token"
    train_size = 1000

    def __init__(self, context: int = 8, vocab_size: int = 16) -> None:
        self.spec = {"vocab_size": vocab_size, "context": context}

    def train_batch(self, seed: int, step: int, size: int) -> Batch:
        return self._batch(torch.Generator().manual_seed(1_000_003 * seed + step), size)

    def eval_batches(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        whole = self._batch(torch.Generator().manual_seed(2**40), 22)
        cuts = range(0, 22, size)
        for start in list(cuts)[:limit]:
            part = slice(start, start + size)
            yield Batch(whole.inputs[part], whole.targets[part], whole.ids[part])

    def _batch(self, generator: torch.Generator, size: int) -> Batch:
        vocab, context = self.spec["vocab_size"], self.spec["context"]
        first = torch.randint(vocab, (size, 1), generator=generator)
        noise = torch.randint(10, (size, context), generator=generator) == 0
        tokens = (first + torch.cat([torch.zeros_like(first), (3 + noise.long()).cumsum(1)], 1)) % vocab
        return Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(size))


class Forgetful(nn.Module):
    """A model with dropout, a tied weight and a buffer that training changes."""

    def __init__(self, vocab_size: int, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
        hidden = self.embedding(inputs)
        for block in self.blocks:
            hidden = hidden + self.dropout(block(hidden).relu())
        return self.head(hidden)


class OpaqueSGD(torch.optim.SGD):
    """Keeps a Python object in its state, as galore_torch does."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for param in self.param_groups[0]["params"]:
            self.state[param]["projector"] = object()


LLAMA = Component("leantrain.nn.Llama", {"hidden": 16, "mlp_hidden": 24, "layers": 2, "heads": 2})


def small_recipe(**changes: Any) -> Recipe:
    """A run of 12 steps with a checkpoint every 4."""
    base = Recipe(
        name="small", model=LLAMA, data=Component("tests.small_runs.Tokens"), steps=12, batch_size=8, trackers=[],
        optim=Component("leantrain.optim.AdamW", {"lr": 0.01, "weight_decay": 0.1}), eval_every=6, checkpoint_every=4,
        log_every=3, device="cpu",
    )  # fmt: skip
    return replace(base, **changes)


def checkpoint_tensors(out: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: weights, buffers and optimizer states."""
    folder = out / "checkpoints" / f"step-{step:07d}"
    return {
        f"{file.stem}/{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def log_without_times(out: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl, without what two runs may differ in."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


class Processes:
    """Worker processes with the variables torchrun would give them, each training the same `jobs` one after another.

    They are forked from a server that has imported everything once. Every worker writes its events, and the error that
    ended it if one did, to a file.

    Args:
        jobs: recipes and the folders to train them in.
        folder: where the workers' files go.
        environment: more variables for the workers.
    """

    def __init__(self, size: int, jobs: list[tuple[Recipe, Path]], folder: Path, **environment: str) -> None:
        self.said = [folder / f"worker-{r}.jsonl" for r in range(size)]
        for file in self.said:
            file.write_text("")
        numbered = [(recipe_to_dict(recipe), str(out), str(free_port())) for recipe, out in jobs]
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", **environment}
        self.workers = [
            _forkserver().Process(
                target=_work, args=(numbered, {**common, "RANK": str(r), "LOCAL_RANK": str(r)}, self.said[r])
            )
            for r in range(size)
        ]
        for worker in self.workers:
            worker.start()

    def events(self, rank: int = 0) -> list[dict[str, Any]]:
        """What a worker has said so far; the last one of an ended worker may be {"kind": "error", ...}."""
        lines = self.said[rank].read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def until(self, condition: Callable[[list[dict[str, Any]]], bool], seconds: float = 60) -> None:
        """Wait for events of the first worker that fulfil `condition`."""
        deadline = time.monotonic() + seconds
        while not condition(self.events()):
            assert time.monotonic() < deadline, self.events()
            assert self.workers[0].is_alive(), self.events()
            time.sleep(0.005)

    def signal(self, number: int, rank: int = 0) -> None:
        os.kill(self.workers[rank].pid or 0, number)

    def wait(self, seconds: float = 60) -> list[int | None]:
        """Every worker's exit status, once all have ended."""
        deadline = time.monotonic() + seconds
        for worker in self.workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            worker.kill()
            worker.join()
        return [worker.exitcode for worker in self.workers]

    def must_succeed(self) -> None:
        assert set(self.wait()) == {0}, [self.events(r)[-1:] for r in range(len(self.workers))]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@functools.cache
def _forkserver() -> ForkServerContext:
    os.environ["PYTHONPATH"] = f"{REPOSITORY / 'src'}:{REPOSITORY}"  # the server looks nowhere else for what it imports
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.small_runs", "leantrain.train"])
    return context


def _work(jobs: list[tuple[dict[str, Any], str, str]], environment: dict[str, str], said: Path) -> None:
    from leantrain.train import train

    torch.set_num_threads(1)
    os.environ.update(environment)

    def say(event: dict[str, Any]) -> None:
        with said.open("a") as file:
            file.write(json.dumps(event) + "\n")

    for described, out, port in jobs:
        os.environ.setdefault("MASTER_PORT", port)
        try:
            train(recipe_from_dict(described, allow=["tests"]), Path(out), on_event=say)
        except LeantrainError as error:
            say({"kind": "error", "type": type(error).__name__, "message": str(error)})
            sys.exit(error.exit_code)
        if "MASTER_PORT" not in environment:
            del os.environ["MASTER_PORT"]
