"""Two real processes train what one trains, whichever way they share the work, and read each other's checkpoints."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from leantrain.errors import UsageError
from leantrain.exchange import Dense, FullyShard
from leantrain.optim import GaLoreAdamW
from leantrain.recipe import Component, Recipe
from leantrain.train import train
from tests.small_runs import Processes, checkpoint_tensors, log_without_times, small_recipe

SHARD = Component("leantrain.exchange.FullyShard")
STEADY: dict[str, Any] = {"schedule": "constant", "warmup": 0.0, "log_every": 1}
TIED = Component("tests.small_runs.Forgetful")
GALORE: dict[str, Any] = {
    "optim": Component(
        "leantrain.optim.GaLoreAdamW", {"lr": 0.01, "rank": 4, "refresh": 5, "basis": "dct", "side": "right"}
    ),
    **STEADY,
}
LEAN: dict[str, Any] = {**GALORE, "step_in_backward": True, "activation_checkpointing": True, "clip": None}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything two processes do in these tests, done by one pair of them."""
    folder = tmp_path_factory.mktemp("two")
    train(small_recipe(**STEADY, steps=6), folder / "from one")
    train(small_recipe(**STEADY, steps=6), folder / "from one, sharded")
    _rename_exchange(folder / "from one, sharded", SHARD)
    jobs: list[tuple[Recipe, Path]] = [
        (small_recipe(**STEADY), folder / "dense"),
        (small_recipe(**STEADY, accumulate=2), folder / "dense, accumulated"),
        (small_recipe(**STEADY, exchange=SHARD), folder / "sharded"),
        (small_recipe(**STEADY, exchange=SHARD, accumulate=2), folder / "sharded, accumulated"),
        (small_recipe(**STEADY, steps=6), folder / "dense, then one"),
        (small_recipe(**STEADY, steps=6, exchange=SHARD), folder / "sharded, then one"),
        (small_recipe(**STEADY), folder / "from one"),
        (small_recipe(**STEADY, exchange=SHARD), folder / "from one, sharded"),
        (small_recipe(**STEADY, model=TIED), folder / "dropout"),
        (small_recipe(**STEADY, model=TIED, steps=6), folder / "dropout, stopped"),
        (small_recipe(**STEADY, model=TIED), folder / "dropout, stopped"),
        (small_recipe(**STEADY, ledger=True), folder / "measured"),
        (small_recipe(**GALORE, exchange=SHARD), folder / "galore, sharded"),
        (small_recipe(**GALORE, exchange=SHARD, steps=6), folder / "galore, sharded, then one"),
        (small_recipe(**LEAN, exchange=SHARD), folder / "lean, sharded"),
    ]
    Processes(2, jobs, folder).must_succeed()
    train(small_recipe(**STEADY), folder / "one")
    train(small_recipe(**STEADY), folder / "dense, then one")
    train(small_recipe(**STEADY, exchange=SHARD), folder / "sharded, then one")
    train(small_recipe(**GALORE), folder / "galore")
    train(small_recipe(**GALORE, clip=None), folder / "lean")
    train(small_recipe(**GALORE, exchange=SHARD), folder / "galore, sharded, then one")
    return folder


def _rename_exchange(out: Path, exchange: Component) -> None:
    """Make a checkpoint say that it was trained with another exchange, which in one process is the same thing."""
    from leantrain import checkpoint

    (folder,) = [path for path in (out / "checkpoints").iterdir() if path.name == "step-0000006"]
    state = json.loads((folder / "state.json").read_text())
    state["extra"]["progress"]["recipe"]["exchange"] = {"class_path": exchange.class_path, "init_args": {}}
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = {
        "bytes": (folder / "state.json").stat().st_size, "blake2b": checkpoint._checksum(folder / "state.json"),
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "name",
    ["dense", "dense, accumulated", "sharded", "sharded, accumulated", "dense, then one", "sharded, then one",
     "from one", "from one, sharded"],
)  # fmt: skip
def test_two_processes_train_what_one_trains(shared: Path, name: str) -> None:
    assert_same_run(shared / "one", shared / name)


@pytest.mark.parametrize("name", ["galore, sharded", "galore, sharded, then one"])
def test_two_processes_train_galore_in_shards_as_one_trains_it(shared: Path, name: str) -> None:
    assert_same_run(shared / "galore", shared / name)


def test_steps_in_backward_and_checkpointed_activations_change_nothing_in_shards(shared: Path) -> None:
    one, two = (
        [line["loss"] for line in log_without_times(shared / n) if "loss" in line] for n in ("lean", "lean, sharded")
    )
    assert two == pytest.approx(one, rel=5e-3)
    left, right = checkpoint_tensors(shared / "lean", 12), checkpoint_tensors(shared / "lean, sharded", 12)
    for key in (key for key in left if key.startswith("model/")):
        torch.testing.assert_close(right[key], left[key], atol=5e-3, rtol=5e-2, msg=key)


def test_steps_in_backward_are_refused_where_ddp_would_average_too_late(tmp_path: Path) -> None:
    processes = Processes(2, [(small_recipe(step_in_backward=True), tmp_path / "run")], tmp_path)
    assert 0 not in processes.wait()
    message = processes.events()[-1]["message"]
    assert "step_in_backward works on one process or with exchange FullyShard, got 2 processes" in message


def assert_same_run(expected: Path, found: Path) -> None:
    one, two = log_without_times(expected), log_without_times(found)
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:  # float32 sums in another order, amplified by up to 12 steps of Adam
            assert b[key] == pytest.approx(a[key], rel=5e-3), (key, a, b)
    left, right = checkpoint_tensors(expected, 12), checkpoint_tensors(found, 12)
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(right[key], left[key], atol=5e-3, rtol=5e-2, msg=key)


def test_two_processes_that_were_stopped_go_on_to_the_last_bit(shared: Path) -> None:
    assert log_without_times(shared / "dropout, stopped") == log_without_times(shared / "dropout")
    left, right = checkpoint_tensors(shared / "dropout", 12), checkpoint_tensors(shared / "dropout, stopped", 12)
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_sharded_processes_hold_only_their_part_and_save_the_whole(shared: Path) -> None:
    whole, sharded = checkpoint_tensors(shared / "dense", 12), checkpoint_tensors(shared / "sharded", 12)
    assert {key: tensor.shape for key, tensor in whole.items()} == {key: t.shape for key, t in sharded.items()}


def test_the_ledger_books_the_bytes_of_every_step(shared: Path) -> None:
    result = json.loads((shared / "measured" / "result.json").read_text())
    # Every parameter's number of values is even, so a ring of two sends each gradient once in all.
    assert result["ledger"]["bytes_sent"] == 12 * 4 * result["parameters"]
    assert result["examples"] == result["ledger"]["examples"] == 12 * 8


def test_all_processes_stop_after_the_same_step_when_one_gets_a_signal(tmp_path: Path) -> None:
    processes = Processes(2, [(small_recipe(steps=100_000, checkpoint_every=0), tmp_path / "run")], tmp_path)
    processes.until(lambda events: len(events) > 3)
    processes.signal(signal.SIGTERM, rank=1)
    assert processes.wait() == [0, 0]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert (tmp_path / "run" / "checkpoints" / f"step-{result['steps']:07d}").is_dir()


def test_a_batch_that_cannot_be_shared_out_is_refused_by_all(tmp_path: Path) -> None:
    processes = Processes(2, [(small_recipe(batch_size=9), tmp_path / "run")], tmp_path)
    assert processes.wait() == [2, 2]
    assert "batch_size must be a multiple of processes x accumulate = 2 x 1" in processes.events()[-1]["message"]


class NeedsWholeMatrices(torch.optim.SGD):
    whole_matrices = True


def test_sharding_refuses_an_optimizer_that_needs_whole_matrices() -> None:
    with pytest.raises(UsageError, match=r"FullyShard cannot be combined with optimizer NeedsWholeMatrices.*whole"):
        FullyShard().check_optimizer(NeedsWholeMatrices)
    FullyShard().check_optimizer(torch.optim.AdamW)
    FullyShard().check_optimizer(GaLoreAdamW)
    Dense().check_optimizer(NeedsWholeMatrices)


def test_the_refusal_comes_before_any_work(tmp_path: Path) -> None:
    optim = Component("tests.exchange.test_dense.NeedsWholeMatrices", {"lr": 0.01})
    with pytest.raises(UsageError, match="FullyShard cannot be combined"):
        train(small_recipe(exchange=SHARD, optim=optim, data=Component("tests.small_runs.Missing")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("exchange", [Dense(), FullyShard()])
def test_one_process_gets_its_own_model_back(exchange: Dense | FullyShard) -> None:
    model = nn.Linear(2, 3)
    assert exchange.attach(model) is model
    exchange.connect([torch.optim.SGD(model.parameters(), lr=0.1)])
    with exchange.gradient_sync(model, enabled=False):
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None
    assert exchange.bytes_sent_per_step(model, 1) == 0


def test_bytes_follow_the_formula_of_a_ring() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ModuleList([nn.Linear(4, 4, bias=False)]))
    model[0].bias.requires_grad_(False)
    # Dense over 4: pieces of ceil(30 / 4) = 8 and 16 / 4 = 4 numbers, 3 of them in each of 2 rounds, of 4 bytes.
    assert Dense().bytes_sent_per_step(model, 4) == 2 * 3 * (8 + 4) * 4
    # Sharded over 4: 5 rows are padded to 8, so pieces of 2 rows of 6, and of 2 of the frozen bias; 1 row of 4.
    # Root: gathered once, scattered once unless frozen; block: gathered twice, scattered once.
    root, bias, block = 3 * 12 * 4, 3 * 2 * 4, 3 * 4 * 4
    assert FullyShard().bytes_sent_per_step(model, 4) == 2 * root + bias + 3 * block
    assert FullyShard().bytes_sent_per_step(model, 4, micro_batches=2) == 3 * root + 2 * bias + 5 * block


def test_three_processes_that_were_stopped_go_on_to_the_last_bit(tmp_path: Path) -> None:
    # With three, DDP's layout of buckets decides in which order a ring adds; it changes after a first backward pass.
    recipe = small_recipe(**STEADY, batch_size=12, keep=3, ledger=True)
    Processes(3, [(recipe, tmp_path / "whole")], tmp_path).must_succeed()
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / f"step-{step:07d}")
    Processes(3, [(recipe, tmp_path / "stopped")], tmp_path).must_succeed()
    whole, stopped = checkpoint_tensors(tmp_path / "whole", 12), checkpoint_tensors(tmp_path / "stopped", 12)
    assert [key for key in whole if not torch.equal(whole[key], stopped[key])] == []
