"""Stepping in backward in two processes that are joined by gloo: together they take the way of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from leantrain.errors import RunError, UsageError
from leantrain.optim import AdamW, GaLoreAdamW
from leantrain.optim.in_backward import step_in_backward
from tests.gloo import in_processes

SIZE, RANK, SKETCH = 2, 3, 8
STEPS, ACCUMULATE = 5, 2


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 2)]
    return nn.Sequential(*layers).double()


def loss_of(model: nn.Module, number: int, rank: int | None) -> Tensor:
    """On this process's half of a batch, or on all of it."""
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return model(inputs if rank is None else inputs.chunk(SIZE)[rank]).square().mean()


def make(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "GaLoreAdamW":
        matrices = [model[2].weight, model[4].weight]
        others = [p for p in model.parameters() if all(p is not m for m in matrices)]
        groups = [{"params": matrices, "rank": RANK}, {"params": others}]
        # Of sharded matrices it is the columns that are projected, and directions may come out with another sign,
        # which moments that are rotated take no notice of.
        options: dict[str, Any] = {"stagger": False, "side": "right", "on_refresh": "rotate"}
        return GaLoreAdamW(groups, lr=1e-2, eps=1e-3, refresh=3, **options)
    return {"AdamW": AdamW, "torch.AdamW": torch.optim.AdamW}[kind](model.parameters(), lr=1e-2, eps=1e-3)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int | None, accumulate: int) -> list[float]:
    norms = []
    for step in range(STEPS):
        for micro_batch in range(accumulate):
            (loss_of(model, accumulate * step + micro_batch, rank) / accumulate).backward()
        optimizer.step()
        norms.append(float(optimizer.grad_norm))
    return norms


def weights(model: nn.Module) -> list[Tensor]:
    tensors = [p.detach() for p in model.parameters()]
    return [t.full_tensor() if isinstance(t, DTensor) else t.clone() for t in tensors]


class Counted:
    """Sizes of what `dist.all_reduce` sends, between two looks."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.send, dist.all_reduce = dist.all_reduce, self

    def __call__(self, tensor: Tensor, *args: Any, **options: Any) -> Any:
        self.sizes.append(tensor.numel())
        return self.send(tensor, *args, **options)

    def look(self) -> list[int]:
        sizes, self.sizes = self.sizes, []
        return sorted(sizes)


def replicas(rank: int, kind: str, accumulate: int, options: dict[str, Any]) -> dict[str, Any]:
    model, counted = small_model(), Counted()
    group = dist.group.WORLD
    optimizer = step_in_backward(model, make(kind, model), accumulate=accumulate, process_group=group, **options)
    counted.look()
    sent, norms = [], []
    for step in range(STEPS):
        for micro_batch in range(accumulate):
            (loss_of(model, accumulate * step + micro_batch, rank) / accumulate).backward()
        optimizer.step()
        sent.append(counted.look())
        norms.append(float(optimizer.grad_norm))
    return {"weights": weights(model), "norms": norms, "sent": sent}


@pytest.mark.parametrize("accumulate", [1, ACCUMULATE])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("torch.AdamW", {"max_norm": 0.1, "clip": "exact"}),
        ("AdamW", {"max_norm": 0.1}),
        ("GaLoreAdamW", {}),
        ("GaLoreAdamW", {"basis_from": "whole"}),
    ],
)
def test_two_processes_take_the_way_of_one(kind: str, options: dict[str, Any], accumulate: int):
    first, second = in_processes(SIZE, replicas, kind, accumulate, options)
    model = small_model()
    norms = train(model, step_in_backward(model, make(kind, model), accumulate=accumulate, **options), None, accumulate)
    assert first["norms"] == second["norms"] == pytest.approx(norms, rel=0.1 if kind == "GaLoreAdamW" else 1e-6)
    for one, other, alone in zip(first["weights"], second["weights"], weights(model), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, alone, rtol=1e-9, atol=1e-9)


def test_projected_gradients_travel_and_whole_ones_only_for_a_basis():
    sent = in_processes(SIZE, replicas, "GaLoreAdamW", ACCUMULATE, {})[0]["sent"]
    model = small_model()
    order = 2  # the fingerprint of the order, and its negative
    matrices = [model[2].weight, model[4].weight]
    plain = [p.numel() for p in model.parameters() if all(p is not m for m in matrices)]
    projected = [RANK * m.shape[0] for m in matrices] + [SKETCH * m.shape[1] for m in matrices]
    whole = [m.numel() for m in matrices]
    for step, sizes in enumerate(sent):
        assert sizes == sorted([order, *plain, *projected, *(whole if step % 3 == 0 else [])])


def sharded(rank: int, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    model = small_model()
    for layer in (model[2], model[4]):
        fully_shard(layer)
    fully_shard(model)
    optimizer = step_in_backward(model, make(kind, model), **options)
    norms = train(model, optimizer, rank, options.get("accumulate", 1))
    assert all(p.grad is None for p in model.parameters())
    return {"weights": weights(model), "norms": norms}


@pytest.mark.parametrize("accumulate", [1, ACCUMULATE])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("torch.AdamW", {"max_norm": 0.1, "clip": "exact"}),
        ("AdamW", {"max_norm": 0.1, "clip": "exact"}),
        ("GaLoreAdamW", {}),
    ],
)
def test_sharded_parameters_are_stepped_where_they_are(kind: str, options: dict[str, Any], accumulate: int):
    options = {"accumulate": accumulate, **options}
    first, second = in_processes(SIZE, sharded, kind, options)
    model = small_model()
    norms = train(model, step_in_backward(model, make(kind, model), **options), None, accumulate)
    estimated = kind == "GaLoreAdamW" and accumulate > 1
    assert first["norms"] == second["norms"] == pytest.approx(norms, rel=0.1 if estimated else 1e-6)
    for one, alone in zip(first["weights"], weights(model), strict=True):
        torch.testing.assert_close(one, alone, rtol=1e-8, atol=1e-8)


def refusals(rank: int) -> None:
    model = small_model()
    group = dist.group.WORLD
    with pytest.raises(UsageError, match=r"Train the plain model with step_in_backward\(\.\.\., process_group="):
        step_in_backward(DistributedDataParallel(model), torch.optim.AdamW(model.parameters()))

    model = small_model()
    step_in_backward(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(UsageError, match="Train the plain model"):  # wrapped later, as Accelerate does
        loss_of(DistributedDataParallel(model), 0, rank)

    model = small_model()
    with torch.no_grad():
        model[0].bias += rank
    with pytest.raises(UsageError, match="the processes start from different weights"):
        step_in_backward(model, torch.optim.AdamW(model.parameters()), process_group=group)

    model = fully_shard(small_model())
    with pytest.raises(UsageError, match="process_group is for plain models"):
        step_in_backward(model, torch.optim.AdamW(model.parameters()), process_group=group)

    model = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
    with torch.no_grad():
        model[0].weight.fill_(1.0), model[1].weight.fill_(1.0)
    optimizer = step_in_backward(model, torch.optim.AdamW(model.parameters()), process_group=group)
    model[rank](torch.ones(1, 3)).sum().backward()  # each process uses another matrix
    with pytest.raises(RunError, match="did not use the same parameters"):
        optimizer.step()

    model = small_model()
    optimizer = step_in_backward(model, make("GaLoreAdamW", model), accumulate=2, process_group=group)
    loss_of(model, 0, rank).backward()
    with pytest.raises(UsageError, match="every process holds other gradients"):
        optimizer.state_dict()
    loss_of(model, 1, rank).backward()
    optimizer.step()
    optimizer.state_dict()


def test_what_would_drift_apart_is_refused():
    in_processes(SIZE, refusals)


def spoiled(rank: int) -> dict[str, Any]:
    model = small_model()
    optimizer = step_in_backward(
        model, make("GaLoreAdamW", model), accumulate=2, process_group=dist.group.WORLD, max_norm=1.0
    )
    if rank == 1:  # one process's gradient of one parameter goes bad
        model[4].weight.register_hook(lambda grad: grad * float("nan"))
    before = weights(model)
    loss_of(model, 0, rank).backward()
    loss_of(model, 1, rank).backward()
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)]
    return {"weights": weights(model), "skipped": optimizer.skipped, "moved": moved}


def test_all_processes_skip_what_is_not_finite_in_one():
    first, second = in_processes(SIZE, spoiled)
    assert first["skipped"] == second["skipped"] > 0
    assert first["moved"] == second["moved"] == [True] * 4 + [False] + [True] * 3
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
