"""What every process of a run has for itself, in a checkpoint: the state of its exchange; and, where processes go their
own ways between two meetings, its weights and optimizers as well.

Rank 0 writes it all, because it writes the checkpoint: the others send it theirs, one after another, so that it holds
one of them at a time. The files are safetensors, `rank-N.safetensors`, with the structure as JSON in their metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from leantrain import snapshot
from leantrain.exchange import Exchange
from leantrain.processes import rank, world_size
from leantrain.snapshot import Snapshot, TensorFile


def pack(model: nn.Module, optimizers: Sequence[Optimizer], exchange: Exchange) -> bytes | None:
    """This process's own state as the content of a file; None if it has none, which is then so in all processes."""
    state = exchange.state_dict()
    if not state and exchange.replicated:
        return None
    parts = {"exchange": snapshot.of_values(state, type(exchange).__name__)}
    if not exchange.replicated:
        parts["model"] = snapshot.of_model(model)
        parts |= {f"optimizer-{i}": snapshot.of_optimizer(each, model) for i, each in enumerate(optimizers)}
    tensors = {f"{part}:{name}": tensor for part, each in parts.items() for name, tensor in each.tensors.items()}
    structure = {part: each.structure for part, each in parts.items()}
    return save(Snapshot(tensors, {}).gathered(keep=True), {"structure": json.dumps(structure)})


@contextmanager
def collected(own: bytes | None) -> Iterator[Iterator[tuple[str, bytes]]]:
    """In the block, for rank 0: everybody's file by name, one after another. All processes must enter it.

    What the block leaves is received all the same, so that nobody is left sending.
    """
    files = _files(own)
    try:
        yield files
    finally:
        for _ in files:
            pass


def restore(path: Path, model: nn.Module, optimizers: Sequence[Optimizer], exchange: Exchange) -> None:
    """Put this process's own state from the checkpoint folder `path` into place, after what is everybody's.

    With another number of processes than saved it, the exchange decides what becomes of its state; weights and
    optimizers are then those that all agreed on.

    Raises:
        UsageError: the exchange cannot continue from what is there.
    """
    files = sorted(path.glob("rank-*.safetensors"), key=lambda file: int(file.stem.removeprefix("rank-")))
    if not files:
        return
    if len(files) != world_size():
        states = [_exchange_state(file) for file in files]
        exchange.load_state_dict(exchange.resized(states, rank(), world_size()))
        return
    with safe_open(files[rank()], "pt") as file:
        structure = json.loads(file.metadata()["structure"])
        if "model" in structure:
            snapshot.restore_model(model, _Part(file, "model"))
        for i, optimizer in enumerate(optimizers):
            if f"optimizer-{i}" in structure:
                part = _Part(file, f"optimizer-{i}")
                snapshot.restore_optimizer(optimizer, structure[part.name], model, part)
        exchange.load_state_dict(snapshot.values_of(structure["exchange"], _Part(file, "exchange")))


def _exchange_state(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        structure = json.loads(file.metadata()["structure"])
        return snapshot.values_of(structure["exchange"], _Part(file, "exchange"))


class _Part:
    """The tensors of one part of a file under their own names."""

    def __init__(self, file: TensorFile, name: str) -> None:
        self.file, self.name = file, name

    def keys(self) -> list[str]:
        prefix = f"{self.name}:"
        return [key.removeprefix(prefix) for key in self.file.keys() if key.startswith(prefix)]  # noqa: SIM118

    def get_tensor(self, name: str) -> Tensor:
        return self.file.get_tensor(f"{self.name}:{name}")


def _files(own: bytes | None) -> Iterator[tuple[str, bytes]]:
    if own is None:
        return
    if rank() > 0:
        content = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        dist.send(torch.tensor([content.numel()]), 0)
        dist.send(content, 0)
        return
    yield "rank-0.safetensors", own
    for other in range(1, world_size()):
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, other)
        content = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(content, other)
        yield f"rank-{other}.safetensors", content.numpy().tobytes()
