"""Block learners in the loop: with every optimizer and exchange that should work, stopped and gone on, and refused."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from leantrain.errors import UsageError
from leantrain.learn import LocalUpdates
from leantrain.optim import schedule
from leantrain.recipe import Component, Recipe, build_data, build_learner, build_model
from leantrain.train import train
from tests.small_runs import LLAMA, Processes, checkpoint_tensors, log_without_times, small_recipe

THREE_LAYERS = Component("leantrain.nn.Llama", {**LLAMA.init_args, "layers": 3})
ADAMW = Component("leantrain.optim.AdamW", {"lr": 0.01, "weight_decay": 0.1})


def local(**arguments: Any) -> Component:
    return Component("leantrain.learn.LocalUpdates", {"blocks": 3, **arguments})


def recipe(**changes: Any) -> Recipe:
    return small_recipe(**{"learn": local(), "model": THREE_LAYERS, "log_every": 1, **changes})


# --- the loop ---


def by_hand(recipe: Recipe) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training in a loop of its own: an optimizer and a norm for every block."""
    data = build_data(recipe)
    model = build_model(recipe, data)
    learner = build_learner(recipe, model, data)
    assert isinstance(learner, LocalUpdates)
    factor = schedule(recipe.schedule, steps=recipe.steps, warmup=recipe.warmup, min_ratio=recipe.min_lr)
    optimizers = [torch.optim.AdamW(part.params, **recipe.optim.init_args, fused=True) for part in learner.parts]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    losses = []
    for step in range(recipe.steps):
        batch = data.train_batch(recipe.seed, step, recipe.batch_size)
        losses.append(learner.step(batch).loss.item())
        for part, optimizer, scheduler in zip(learner.parts, optimizers, schedulers, strict=True):
            if recipe.clip is not None:
                clip_grad_norm_(part.params, recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return losses, {f"model/{name}": value for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip": None},
        {"clip": 0.05},
        {"ledger": True},
        {"learn": local(scheme="overlapping")},
        {"step_in_backward": True, "clip": None},
        {"activation_checkpointing": True},
    ],
)
def test_a_run_equals_a_loop_written_by_hand_to_the_last_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    chosen = recipe(**changes)
    result = train(chosen, tmp_path)
    losses, weights = by_hand(chosen)
    assert [line[3] for line in result.curve["train"]] == losses
    saved = checkpoint_tensors(tmp_path, 12)
    assert {name for name in saved if name.startswith("model/")} == weights.keys()  # the heads are kept elsewhere
    for name, weight in weights.items():
        assert torch.equal(saved[name], weight), name


@pytest.mark.parametrize("scheme", ["greedy", "chunked", "overlapping"])
def test_one_block_is_a_run_with_backpropagation(scheme: str, tmp_path: Path) -> None:
    train(recipe(learn=local(blocks=1, scheme=scheme)), tmp_path / "ours")
    train(recipe(learn=Component("leantrain.learn.Backprop")), tmp_path / "theirs")
    assert log_without_times(tmp_path / "ours") == log_without_times(tmp_path / "theirs")
    left, right = checkpoint_tensors(tmp_path / "ours", 12), checkpoint_tensors(tmp_path / "theirs", 12)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_an_evaluation_has_every_blocks_loss(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    result = train(recipe(), tmp_path, on_event=events.append)
    (last,) = [event for event in events if event["kind"] == "eval"][-1:]
    losses = [last[name] for name in ("block1/val_loss", "block2/val_loss", "val_loss")]
    assert all(0 < loss < 3 for loss in losses)
    assert len(set(losses)) == 3
    assert result.final["val_loss"] == losses[-1]


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    whole, parts = train(recipe(), tmp_path / "whole"), train(recipe(accumulate=4), tmp_path / "parts")
    for a, b in zip(whole.curve["train"], parts.curve["train"], strict=True):
        assert a[3] == pytest.approx(b[3], abs=3e-4)  # float32 sums in another order, through 12 steps of Adam


# --- with every optimizer, and stopped ---

GALORE = Component("leantrain.optim.GaLoreAdamW", {"lr": 0.01, "rank": 4, "refresh": 5})
RESUMED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "overlapping": {"learn": local(scheme="overlapping", reach=2)},
    "accumulated": {"accumulate": 2},
    "clipped": {"clip": 0.05},
    "bf16": {"precision": "bf16"},
    "checkpointed activations": {"activation_checkpointing": True},
    "galore": {"optim": GALORE},
    "galore in backward": {"optim": GALORE, "step_in_backward": True, "accumulate": 2},
    "two optimizers": {
        "groups": [{"params": "hidden"}],
        "rest": Component("torch.optim.SGD", {"lr": 0.1, "momentum": 0.9}),
    },
    "momentum": {"optim": Component("torch.optim.SGD", {"lr": 0.05, "momentum": 0.9})},
    "batch normalisation": {
        "data": Component("tests.test_train_blocks.Pictures"),
        "model": Component("leantrain.nn.ResNetCifar", {"depth": 20}) ,
    },
}  # fmt: skip


def stopping_at(step: int):
    """An event handler that asks the run to stop, as Ctrl-C would, when the log line of `step` comes."""

    def on_event(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    return on_event


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_was_stopped_ends_as_if_it_never_had_been(name: str, tmp_path: Path) -> None:
    chosen = recipe(**RESUMED[name])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(chosen, whole)
    for step in (4, 8):
        assert train(chosen, parts, on_event=stopping_at(step)).status == "interrupted"
    assert train(chosen, parts).status == "finished"
    assert log_without_times(parts) == log_without_times(whole)
    left, right = checkpoint_tensors(parts, 12), checkpoint_tensors(whole, 12)
    assert left.keys() == right.keys()
    assert any(name.startswith("learner/") for name in right)
    for key in right:
        assert torch.equal(left[key], right[key]), key


OPTIMIZERS = {
    "AdamW": {}, "AdamW8bit": {"full_precision_below": 0}, "AdamW4bit": {"full_precision_below": 0},
    "APOLLO": {"rank": 4}, "APOLLOMini": {"rank": 1}, "DCTAdamW": {"rank": 4}, "GaLoreAdamW": {"rank": 4},
    "GaLoreAdafactor": {"rank": 4}, "QGaLoreAdamW": {"rank": 4, "full_precision_below": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_blocks(name: str, tmp_path: Path) -> None:
    optim = Component(f"leantrain.optim.{name}", {"lr": 0.01, **OPTIMIZERS[name]})
    result = train(recipe(optim=optim, steps=20, eval_every=0, checkpoint_every=0), tmp_path)
    first, *_, last = (line[3] for line in result.curve["train"])
    assert last < 0.97 * first


class Pictures:
    """Little pictures, bright in the corner that is their class."""

    task = "classification"
    train_size = 1000

    def __init__(self) -> None:
        self.spec = {"classes": 4, "channels": 3, "image_size": 8}

    def train_batch(self, seed: int, step: int, size: int) -> Any:
        from leantrain.data import Batch

        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        targets = torch.randint(4, (size,), generator=generator)
        corners = F.one_hot(targets, 4).view(size, 1, 2, 2).float().repeat_interleave(4, 2).repeat_interleave(4, 3)
        return Batch(corners + torch.randn(size, 3, 8, 8, generator=generator), targets, torch.arange(size))

    def eval_batches(self, size: int, limit: int | None = None):
        yield self.train_batch(2**20, 0, size)


# --- several processes ---

TOGETHER = {
    "greedy": {},
    "overlapping": {"learn": local(scheme="overlapping")},
    "accumulated": {"accumulate": 2},
    "galore": {"optim": GALORE},
}


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    jobs = [(recipe(**changes, steps=6, clip=None), tmp_path / name) for name, changes in TOGETHER.items()]
    Processes(2, jobs, tmp_path).must_succeed()
    for name, changes in TOGETHER.items():
        train(recipe(**changes, steps=6, clip=None), tmp_path / f"{name}, alone")
        left, right = checkpoint_tensors(tmp_path / name, 6), checkpoint_tensors(tmp_path / f"{name}, alone", 6)
        for key, weight in right.items():
            if key.startswith(("model/", "learner/")):
                torch.testing.assert_close(left[key], weight, rtol=0, atol=3e-4)


EXCHANGES = {
    "majority vote": {
        "exchange": Component("leantrain.exchange.MajorityVote"),
        "optim": Component("torch.optim.SGD", {"lr": 0.003}),
    },
    "local sgd": {"exchange": Component("leantrain.exchange.LocalSGD", {"every": 4})},
    "diloco": {"exchange": Component("leantrain.exchange.DiLoCo", {"every": 4})},
    "top k": {"exchange": Component("leantrain.exchange.DeepGradientCompression")},
}


def test_exchanges_of_other_kinds_train_blocks_and_go_on_exactly(tmp_path: Path) -> None:
    jobs = [(recipe(**changes, steps=20), tmp_path / name) for name, changes in EXCHANGES.items()]
    Processes(2, jobs, tmp_path).must_succeed()
    for name in EXCHANGES:
        log = [line for line in log_without_times(tmp_path / name) if "val_loss" in line]
        for loss in ("block1/val_loss", "block2/val_loss", "val_loss"):
            assert log[-1][loss] < log[0][loss], (name, loss)
        shutil.copytree(tmp_path / name, tmp_path / f"{name}, stopped")
        shutil.rmtree(tmp_path / f"{name}, stopped" / "checkpoints" / "step-0000020")
    Processes(2, [(each, Path(f"{out}, stopped")) for each, out in jobs], tmp_path).must_succeed()
    for name in EXCHANGES:
        left, right = (checkpoint_tensors(tmp_path / each, 20) for each in (name, f"{name}, stopped"))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name


def test_a_sharded_model_cannot_be_cut(tmp_path: Path) -> None:
    sharded = recipe(exchange=Component("leantrain.exchange.FullyShard"))
    processes = Processes(2, [(sharded, tmp_path / "run")], tmp_path)
    assert set(processes.wait()) == {2}
    for rank in range(2):
        said = processes.events(rank)[-1]
        assert said["type"] == "UsageError"
        assert (
            "learn=LocalUpdates works with models that every process holds whole, not with exchange FullyShard"
            in (said["message"])
        )


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compile": True}, r"compile is not available with learn=LocalUpdates"),
        (
            {"step_in_backward": True, "learn": local(scheme="overlapping")},
            r"step_in_backward needs a learner that completes a gradient in one backward pass, not LocalUpdates",
        ),
        ({"learn": local(blocks=9)}, r"learn: blocks must be 1 to 6, as many as Llama can be cut into; got 9"),
        (
            {"learn": Component("leantrain.learn.LocalUpdates")},
            r"learn: give cut=\[names of modules\] or blocks=number",
        ),
        ({"learn": local(block=3)}, r"did you mean 'blocks'"),
        ({"learn": local(scheme="greedily")}, r"greedily"),
        ({"model": Component("tests.small_runs.Forgetful")}, r"learn: blocks must be 1 to 1, .*build it without tied"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        train(recipe(**changes), tmp_path)


def test_a_run_of_another_cut_is_not_continued(tmp_path: Path) -> None:
    train(recipe(), tmp_path)
    with pytest.raises(UsageError, match="learn"):
        train(recipe(learn=local(blocks=2)), tmp_path)
