"""Chains on parameters that FSDP2 has split: one process's numbers, nothing gathered, checkpoints for any world."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from leantrain import checkpoint
from leantrain.errors import UsageError
from leantrain.exchange import Dense, FullyShard
from leantrain.optim import Adafactor, AdamW, Chain, GaLoreAdamW, LowRank, parameter_groups
from tests.gloo import in_processes

STEPS, SAVED, REFRESH, RANK = 10, 5, 3, 3
CASES: dict[str, dict[str, Any]] = {
    "subspace": {"basis": "subspace", "stagger": False},
    "dct": {"basis": "dct", "on_refresh": "reset", "weight_decay": 0.1},
    "random": {"basis": "random"},
    # Singular vectors may come out as their negatives, which moments that stay as they are would notice.
    "svd": {"basis": "svd", "on_refresh": "rotate", "stagger": False},
    "rsvd": {"basis": "rsvd", "on_refresh": "rotate"},
    "settled": {"basis": "subspace", "settled": 0.4, "refresh": 1},
}
RESUMED = ("subspace", "dct")
WORLDS = {1: RESUMED, 2: (*RESUMED, "svd"), 4: tuple(CASES)}
"""Which cases which number of processes trains."""


class Odd(nn.Module):
    """Matrices whose rows do not divide evenly, one with fewer rows than four processes, two of one shape, vectors, a
    convolution, and an embedding that is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 7), nn.Linear(7, 5)])
        self.conv = nn.Conv1d(5, 4, 2)
        self.few = nn.Linear(4, 3, bias=False)
        self.back = nn.Linear(3, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden).tanh()
        return self.head(self.back(self.few(self.conv(hidden.mT).mT.tanh())))


NUMBERS_OF_A_POWER_STEP = RANK * (6 + 6 + 6 + 6 + 7 + 10) + 2 * (4 + 3)
"""Columns times rank, over the matrices of `Odd`: embedding, four blocks, convolution; `few` and `back` at rank 2."""


def built(dtype: torch.dtype = torch.float64) -> Odd:
    torch.manual_seed(1)
    return Odd().to(dtype)


def sharded(world: int, dtype: torch.dtype = torch.float64) -> Odd:
    """As `FullyShard` does it, but also where there is one process."""
    model, mesh = built(dtype), init_device_mesh("cpu", (world,))
    fully_shard(model.blocks[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def galore(model: nn.Module, case: dict[str, Any]) -> GaLoreAdamW:
    narrow = [model.few.weight, model.back.weight]
    others = [param for param in model.parameters() if all(param is not other for other in narrow)]
    groups = [{"params": others}, {"params": narrow, "rank": 2}]
    return GaLoreAdamW(groups, **{"lr": 0.02, "rank": RANK, "refresh": REFRESH, "side": "right", **case})


def backward(model: nn.Module, step: int, rank: int = 0, world: int = 1) -> None:
    tokens = torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).double(), tokens[:, 2:].flatten())
    loss.backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int = 0, world: int = 1) -> None:
    for step in steps:
        backward(model, step, rank, world)
        optimizer.step()


def outcome(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and optimizer state, each tensor whole."""
    found = {name: param.detach() for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        found |= {f"{name}/{key}": value for key, value in optimizer.state[param].items()}
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}


@contextmanager
def collectives() -> Iterator[list[list[Any]]]:
    """Every collective in the block: its name, and how many numbers its largest argument has."""

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace in ("c10d", "_c10d_functional"):
                values = torch.utils._pytree.tree_leaves((args, kwargs))
                heard.append([func._opname, max((v.numel() for v in values if isinstance(v, Tensor)), default=0)])
            return func(*args, **(kwargs or {}))

    heard: list[list[Any]] = []
    with Listen():
        yield heard


# What each process does.


def everything(rank: int, world: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"end": {}, "heard": {}, "resumed": {}}
    for name in WORLDS[world]:
        model = sharded(world)
        optimizer = galore(model, CASES[name])
        found["heard"][name] = []
        for step in range(STEPS):
            if step == SAVED and name in RESUMED:
                checkpoint.save(folder / f"{name} {world}", SAVED, model, [optimizer], {})
            backward(model, step, rank, world)
            with collectives() as heard:
                optimizer.step()
            found["heard"][name].append(heard)
        found["end"][name] = outcome(model, optimizer)
        if name == "subspace":
            found["held"] = held(model, optimizer)
    half = sharded(world, torch.bfloat16)
    train(half, optimizer := galore(half, CASES["subspace"]), range(STEPS), rank, world)
    found["bfloat16"] = outcome(half, optimizer)
    for path in sorted(folder.iterdir()):
        name, saved_by = path.name.split()
        dense = world == 2 and saved_by == "2"
        bare = built() if dense else sharded(world)
        optimizer = galore(bare, CASES[name])
        checkpoint.load(path / f"step-{SAVED:07d}", bare, [optimizer])
        train(Dense().attach(bare) if dense else bare, optimizer, range(SAVED, STEPS), rank, world)
        found["resumed"][f"{name}, {saved_by}"] = outcome(bare, optimizer)
    return found


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[Any]]:
    """How each tensor of the state is placed, and the shape of what this process has of it."""
    kinds = {Shard(0): "rows", Replicate(): "everywhere"}
    return {
        f"{name}/{key}": [kinds[value.placements[0]], *value.to_local().shape]
        if isinstance(value, DTensor)
        else ["whole", *value.shape]
        for name, param in model.named_parameters()
        for key, value in optimizer.state[param].items()
    }


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each process of each world found. Checkpoints are passed on from one world to the next."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in RESUMED:
        model = built()
        optimizer = galore(model, CASES[name])
        train(model, optimizer, range(SAVED))
        checkpoint.save(folder / f"{name} one", SAVED, model, [optimizer], {})
    found = {world: in_processes(world, everything, world, folder) for world in (2, 4, 1)}
    for name in RESUMED:  # and back to a process without FSDP2
        model = built()
        optimizer = galore(model, CASES[name])
        checkpoint.load(folder / f"{name} 4" / f"step-{SAVED:07d}", model, [optimizer])
        train(model, optimizer, range(SAVED, STEPS))
        found[1][0]["resumed"][f"{name}, 4, not sharded"] = outcome(model, optimizer)
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """What one process ends with that has never heard of the others."""
    found = {}
    for name, case in CASES.items():
        model = built()
        train(model, optimizer := galore(model, case), range(STEPS))
        found[name] = outcome(model, optimizer)
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], signed: bool) -> None:
    """To rounding; the columns of `basis` and `exp_avg` up to their signs unless `signed`."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        absolute = not signed and key.endswith(("/basis", "/exp_avg"))
        left, right = (found[key].abs(), value.abs()) if absolute else (found[key], value)
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, names in WORLDS.items() for name in names])
def test_shards_train_what_one_process_trains(worlds: Any, alone: Any, world: int, name: str) -> None:
    for rank in range(world):
        assert_equal(worlds[world][rank]["end"][name], alone[name], signed="svd" not in name)


@pytest.mark.parametrize("world", WORLDS)
def test_a_checkpoint_goes_on_in_any_world_and_with_ddp(worlds: Any, alone: Any, world: int) -> None:
    resumed = worlds[world][0]["resumed"]
    savers = {1: ("one", "2", "4", "1", "4, not sharded"), 2: ("one", "2"), 4: ("one", "2", "4")}[world]
    assert resumed.keys() == {f"{name}, {saved_by}" for name in RESUMED for saved_by in savers}
    for name, found in resumed.items():
        assert_equal(found, alone[name.partition(",")[0]], signed=True)


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in (2, 4) for name in WORLDS[world]])
def test_the_step_sends_no_gradient(worlds: Any, world: int, name: str) -> None:
    """Nothing at all between refreshes, and then only sums: no process gets to see others' rows."""
    heard = [worlds[world][rank]["heard"][name] for rank in range(world)]
    assert all(each == heard[0] for each in heard), "processes disagree on what to send"
    assert {operation for step in heard[0] for operation, _ in step} <= {"allreduce_"}
    if name == "random":
        assert not any(heard[0])
    elif not CASES[name].get("stagger", True):
        assert [bool(step) for step in heard[0]] == [step % REFRESH == 0 for step in range(STEPS)]


def test_a_power_step_sends_columns_times_rank_numbers(worlds: Any) -> None:
    sent = [sum(numbers for _, numbers in step) for step in worlds[4][0]["heard"]["subspace"]]
    assert sent == [NUMBERS_OF_A_POWER_STEP if step % REFRESH == 0 else 0 for step in range(STEPS)]


def test_moments_are_split_as_the_rows_are_and_bases_are_everywhere(worlds: Any) -> None:
    rows_of_few = []
    for rank in range(4):
        placed = worlds[4][rank]["held"]
        assert placed["blocks.3.weight/basis"] == ["everywhere", 7, RANK]
        assert placed["blocks.3.weight/exp_avg"] == ["rows", [2, 2, 1, 0][rank], RANK]  # 5 rows, cut as chunk() does
        assert placed["blocks.3.bias/exp_avg_sq"] == ["rows", [2, 2, 1, 0][rank]]
        assert all(kind == "whole" for key, (kind, *shape) in placed.items() if not shape)
        rows_of_few.append(placed["few.weight/exp_avg"][1])
    assert rows_of_few == [1, 1, 1, 0]


@pytest.mark.parametrize("world", WORLDS)
def test_bfloat16_weights_keep_bfloat16_state_and_go_the_same_way(worlds: Any, alone: Any, world: int) -> None:
    start = dict(built().named_parameters())
    exact, found = alone["subspace"], worlds[world][0]["bfloat16"]
    off = moved = 0.0
    for name, param in start.items():
        assert found[name].dtype == found[f"{name}/exp_avg"].dtype == torch.bfloat16
        off += (found[name].double() - exact[name]).square().sum().item()
        moved += (exact[name] - param).square().sum().item()
    assert off < 0.1 * moved


# What is refused.


def test_the_loop_takes_low_rank_optimizers_and_refuses_foreign_ones() -> None:
    FullyShard().check_optimizer(GaLoreAdamW)

    class Foreign(torch.optim.SGD):
        """As galore_torch's: a rank in its groups, and no word about sharded matrices."""

    def work(rank: int) -> str:
        model = FullyShard().attach(nn.Linear(6, 5))
        FullyShard().connect([GaLoreAdamW(model.parameters(), rank=2), torch.optim.AdamW(model.parameters())])
        foreign = Foreign([{"params": list(model.parameters()), "rank": 2}], lr=0.1)
        try:
            FullyShard().connect([foreign])
        except UsageError as error:
            return str(error)
        return ""

    for message in in_processes(2, work):
        assert "FullyShard cannot be combined with optimizer Foreign: it works on whole" in message


REFUSED: dict[str, tuple[Any, str]] = {
    "left side": (lambda model: GaLoreAdamW(model.parameters(), rank=2, side="left"), "left"),
    "low-bit moments": (
        lambda model: GaLoreAdamW(model.parameters(), rank=2, state_bits=8, full_precision_below=0),
        "LowBit needs whole matrices",
    ),
    "whole matrices": (lambda model: Chain(model.parameters(), Adafactor()), "whole matrices"),
    "whole projected matrices": (
        lambda model: Chain(model.parameters(), LowRank(Adafactor(), rank=2)),
        "whole matrices",
    ),
}


def test_what_needs_whole_matrices_is_refused_by_name() -> None:
    def work(rank: int) -> dict[str, str]:
        said = {}
        for name, (make, _) in REFUSED.items():
            model = FullyShard().attach(nn.Linear(80, 80, bias=False))
            try:
                optimizer = make(model)
                model(torch.ones(2, 80)).sum().backward()
                optimizer.step()
            except UsageError as error:
                said[name] = str(error)
        return said

    for said in in_processes(2, work):
        assert said.keys() == REFUSED.keys()
        for name, (_, words) in REFUSED.items():
            assert words in said[name], (name, said[name])


def test_elementwise_chains_need_no_word_from_the_others() -> None:
    """Plain AdamW, whose whole step PyTorch's fused kernel takes, on the rows of each process."""

    def work(rank: int) -> dict[str, Any]:
        model = sharded(2)
        optimizer = AdamW(parameter_groups(model, []), lr=0.02)
        backward(model, 0, rank, 2)
        with collectives() as heard:
            optimizer.step()
        return {"heard": heard, "end": outcome(model, optimizer)}

    model = built()
    train(model, optimizer := AdamW(model.parameters(), lr=0.02), range(1))
    for found in in_processes(2, work):
        assert not found["heard"]
        assert_equal(found["end"], outcome(model, optimizer), signed=True)
