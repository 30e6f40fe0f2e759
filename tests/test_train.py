"""The loop: it equals a loop written by hand, stops well, goes on exactly, and refuses what cannot work."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from leantrain.errors import RunError, UsageError
from leantrain.optim import AdamW, schedule
from leantrain.recipe import Component, Recipe, build_data, build_model
from leantrain.train import train
from tests import small_runs
from tests.small_runs import Processes, checkpoint_tensors, log_without_times, small_recipe


def stopping_at(step: int):
    """An event handler that asks the run to stop, as Ctrl-C would, when the log line of `step` comes."""

    def on_event(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    return on_event


def by_hand(recipe: Recipe) -> tuple[list[float], torch.nn.Module]:
    """The same training without leantrain's loop. Returns every step's loss and the model."""
    data = build_data(recipe)
    model = build_model(recipe, data)
    optimizer = torch.optim.AdamW(model.parameters(), **recipe.optim.init_args, fused=True)
    factor = schedule(recipe.schedule, steps=recipe.steps, warmup=recipe.warmup, min_ratio=recipe.min_lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    for step in range(recipe.steps):
        batch = data.train_batch(recipe.seed, step, recipe.batch_size)
        loss = F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip or math.inf)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip": None},
        {"ledger": True},
        {"schedule": "linear", "warmup": 0.5},
        {"step_in_backward": True, "clip": None},
        {"activation_checkpointing": True},
    ],
)
def test_a_run_equals_a_loop_written_by_hand_to_the_last_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    recipe = small_recipe(log_every=1, **changes)
    result = train(recipe, tmp_path)
    losses, model = by_hand(recipe)
    assert [line[3] for line in result.curve["train"]] == losses
    saved = checkpoint_tensors(tmp_path, 12)
    for name, weight in model.state_dict().items():
        assert torch.equal(saved[f"model/{name}"], weight), name


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    whole = train(small_recipe(log_every=1), tmp_path / "whole")
    parts = train(small_recipe(log_every=1, accumulate=4), tmp_path / "parts")
    for a, b in zip(whole.curve["train"], parts.curve["train"], strict=True):
        assert a[:2] == b[:2]
        assert a[3] == pytest.approx(b[3], abs=2e-4)  # float32 sums in another order, through 12 steps of Adam
    assert whole.examples == parts.examples == 12 * 8
    assert whole.tokens == parts.tokens == 12 * 8 * 8


def test_stepping_in_backward_needs_less_memory_for_gradients_and_logs_the_true_norm(tmp_path: Path) -> None:
    plain = train(small_recipe(ledger=True, log_every=1, clip=None), tmp_path / "plain")
    lean = train(small_recipe(ledger=True, log_every=1, clip=None, step_in_backward=True), tmp_path / "lean")
    assert plain.ledger is not None and lean.ledger is not None
    peaks = [result.ledger["peak_bytes"]["gradients"] for result in (plain, lean)]  # type: ignore[index]
    assert peaks[1] < 0.3 * peaks[0]
    norms = [[line["grad_norm"] for line in log_without_times(tmp_path / name) if "grad_norm" in line]
             for name in ("plain", "lean")]  # fmt: skip
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


def test_checkpointing_needs_blocks_and_saves_their_activations(tmp_path: Path) -> None:
    peaks = []
    for checkpointing in (False, True):
        recipe = small_recipe(ledger=True, activation_checkpointing=checkpointing)
        result = train(recipe, tmp_path / str(checkpointing))
        assert result.ledger is not None
        peaks.append(result.ledger["peak_bytes"]["activations"])
    assert peaks[1] < 0.7 * peaks[0]
    with pytest.raises(UsageError, match="finds no repeated blocks in Forgetful"):
        train(small_recipe(model=RESUMED["dropout"]["model"], activation_checkpointing=True), tmp_path / "none")


def test_the_log_holds_the_mean_loss_since_the_line_before(tmp_path: Path) -> None:
    every = train(small_recipe(log_every=1), tmp_path / "every")
    third = train(small_recipe(log_every=5), tmp_path / "third")
    losses = [line[3] for line in every.curve["train"]]
    means = [sum(losses[:5]) / 5, sum(losses[5:10]) / 5, sum(losses[10:]) / 2]
    assert [line[3] for line in third.curve["train"]] == pytest.approx(means, abs=1e-6)
    assert [line[0] for line in third.curve["train"]] == [5, 10, 12]


def test_a_finished_run_leaves_what_the_docs_promise(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    result = train(small_recipe(ledger=True, trackers=["tensorboard"]), tmp_path, on_event=events.append)
    written = json.loads((tmp_path / "result.json").read_text())
    assert written == json.loads(json.dumps(result.to_dict()))
    assert written["status"] == "finished"
    assert written["steps"] == 12
    assert written["final"]["val_perplexity"] == pytest.approx(math.exp(written["final"]["val_loss"]))
    assert written["final"]["train_loss"] < 2.6 < math.log(16)  # better than guessing among 16 tokens
    assert [line[0] for line in written["curve"]["val"]] == [6, 12]
    assert written["ledger"]["steps"] == 12
    assert [event["kind"] for event in events] == [
        "start", "step", "checkpoint", "step", "eval", "checkpoint", "step", "step", "checkpoint", "eval", "end",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoints", "log.jsonl", "recipe.yaml", "result.json", "tensorboard",
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-0000008", "step-0000012"]


RESUMED: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate": 2},
    "bf16": {"precision": "bf16"},
    "dropout": {"model": Component("tests.small_runs.Forgetful")},
    "checkpointed activations": {"activation_checkpointing": True},
    "galore": {"optim": Component("leantrain.optim.GaLoreAdamW", {"lr": 0.01, "rank": 4, "refresh": 5})},
    "galore in backward": {
        "optim": Component("leantrain.optim.GaLoreAdamW", {"lr": 0.01, "rank": 4, "refresh": 5}),
        "step_in_backward": True,
        "accumulate": 2,
    },
    "q-galore": {
        "optim": Component("leantrain.optim.QGaLoreAdamW", {"lr": 0.01, "rank": 4, "full_precision_below": 0})
    },
    "8 bits": {"optim": Component("leantrain.optim.AdamW8bit", {"lr": 0.01, "full_precision_below": 0})},
    "two optimizers": {
        "groups": [{"params": "hidden"}],
        "rest": Component("torch.optim.SGD", {"lr": 0.1, "momentum": 0.9}),
    },
    "rmsprop": {"optim": Component("torch.optim.RMSprop", {"lr": 0.001, "momentum": 0.5, "centered": True})},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_was_stopped_ends_as_if_it_never_had_been(name: str, tmp_path: Path) -> None:
    changes = RESUMED[name]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(small_recipe(**changes, log_every=1), whole)
    # Once between two log lines' means, once where an evaluation is due.
    first = train(small_recipe(**changes, log_every=1), parts, on_event=stopping_at(4))
    assert (first.status, first.steps) == ("interrupted", 5)
    second = train(small_recipe(**changes, log_every=1), parts, on_event=stopping_at(8))
    assert (second.status, second.steps) == ("interrupted", 9)
    last = train(small_recipe(**changes, log_every=1), parts)
    assert (last.status, last.steps) == ("finished", 12)
    assert log_without_times(parts) == log_without_times(whole)
    left, right = checkpoint_tensors(parts, 12), checkpoint_tensors(whole, 12)
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


def test_a_stop_within_a_log_interval_and_on_an_evaluation_changes_no_line(tmp_path: Path) -> None:
    train(small_recipe(), tmp_path / "whole")
    stop_in_step(tmp_path / "parts", 4)
    stop_in_step(tmp_path / "parts", 6)
    train(small_recipe(), tmp_path / "parts")
    assert log_without_times(tmp_path / "parts") == log_without_times(tmp_path / "whole")


def stop_in_step(out: Path, step: int) -> None:
    """Train with a signal that arrives while the batch of `step` (from 1) is made."""
    original = small_runs.Tokens.train_batch

    def train_batch(self: small_runs.Tokens, seed: int, number: int, size: int) -> Any:
        if number + 1 == step:
            signal.raise_signal(signal.SIGINT)
        return original(self, seed, number, size)

    small_runs.Tokens.train_batch = train_batch  # type: ignore[method-assign]
    try:
        result = train(small_recipe(), out)
    finally:
        small_runs.Tokens.train_batch = original  # type: ignore[method-assign]
    assert (result.status, result.steps) == ("interrupted", step)


def test_sigterm_from_outside_finishes_the_step_saves_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "run"
    processes = Processes(1, [(small_recipe(steps=100_000, checkpoint_every=0), out)], tmp_path)
    processes.until(lambda events: len(events) > 3)
    processes.signal(signal.SIGTERM)
    assert processes.wait() == [0]
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert (out / "checkpoints" / f"step-{result['steps']:07d}" / "manifest.json").exists()


def test_a_killed_run_goes_on_and_ends_as_if_it_had_lived(tmp_path: Path) -> None:
    recipe = small_recipe(steps=60, checkpoint_every=2, log_every=2, eval_every=20)
    train(recipe, tmp_path / "whole")
    for kill_at in (6, 11, 17):
        processes = Processes(1, [(recipe, tmp_path / "killed")], tmp_path)
        processes.until(lambda events, kill_at=kill_at: len(events) >= kill_at)
        processes.signal(signal.SIGKILL)
        assert processes.wait() == [-signal.SIGKILL]
    assert train(recipe, tmp_path / "killed").status == "finished"
    assert log_without_times(tmp_path / "killed") == log_without_times(tmp_path / "whole")
    left, right = checkpoint_tensors(tmp_path / "killed", 60), checkpoint_tensors(tmp_path / "whole", 60)
    assert all(torch.equal(left[key], right[key]) for key in right)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = train(small_recipe(), tmp_path)
    log = (tmp_path / "log.jsonl").read_text()
    again = train(small_recipe(), tmp_path)
    assert again.curve == first.curve
    assert (tmp_path / "log.jsonl").read_text() == log


def test_a_run_can_be_made_longer_and_begun_anew(tmp_path: Path) -> None:
    train(small_recipe(schedule="constant", warmup=0.0), tmp_path / "parts")
    longer = train(small_recipe(schedule="constant", warmup=0.0, steps=18), tmp_path / "parts")
    whole = train(small_recipe(schedule="constant", warmup=0.0, steps=18), tmp_path / "whole")
    assert longer.final == whole.final
    anew = train(small_recipe(seed=1), tmp_path / "parts", resume=False)
    assert anew.final == train(small_recipe(seed=1), tmp_path / "other").final
    assert [line[0] for line in anew.curve["train"]] == [3, 6, 9, 12]


@pytest.mark.parametrize("changes", [{"seed": 1}, {"batch_size": 16}, {"clip": 0.5}, {"precision": "bf16"}])
def test_another_recipe_does_not_continue_a_run(changes: dict[str, Any], tmp_path: Path) -> None:
    train(small_recipe(), tmp_path)
    before = (tmp_path / "result.json").read_text()
    with pytest.raises(UsageError, match=next(iter(changes))):
        train(small_recipe(**changes), tmp_path)
    assert (tmp_path / "result.json").read_text() == before


@pytest.mark.parametrize("key", ["loss", "gradient norm"])
def test_a_number_that_is_not_finite_ends_the_run_before_the_weights_move(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leantrain.learn import Backprop

    steps = []
    original = Backprop.step

    def step(self: Backprop, batch: Any, weight: float = 1.0) -> Any:
        steps.append(1)
        result = original(self, batch, weight)
        if len(steps) == 7 and key == "loss":
            return dataclasses.replace(result, loss=torch.tensor(math.nan))
        if len(steps) == 7:
            next(self.model.parameters()).grad[0, 0] = math.inf
        return result

    updates = []
    monkeypatch.setattr(Backprop, "step", step)
    monkeypatch.setattr(AdamW, "step", counted(AdamW.step, updates))
    with pytest.raises(RunError, match=r"at step 7 .*" + ("nan" if key == "loss" else "inf") + r".*step-0000004"):
        train(small_recipe(), tmp_path)
    assert len(updates) == 6
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"
    monkeypatch.setattr(Backprop, "step", original)
    assert train(small_recipe(), tmp_path).final == train(small_recipe(), tmp_path / "whole").final


def counted(function: Any, calls: list[int]) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return function(*args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]  # torch wraps an optimizer's step once, unless it says so
    return wrapper


def test_a_budget_of_tokens_ends_the_run_and_the_schedule_with_it(tmp_path: Path) -> None:
    few = train(small_recipe(steps=1000, max_tokens=12 * 64, log_every=1), tmp_path / "tokens")
    assert (few.steps, few.tokens) == (12, 12 * 64)
    rates = [line["lr"] for line in log_without_times(tmp_path / "tokens") if "lr" in line]
    assert max(rates) > 0.009
    assert rates[-1] < 0.0025
    assert rates.index(max(rates)) <= 2


def test_a_budget_of_seconds_ends_the_run_soon_after(tmp_path: Path) -> None:
    result = train(small_recipe(steps=10**7, max_seconds=0.5, eval_every=0, log_every=1000), tmp_path)
    assert result.status == "finished"
    assert 0.5 <= result.seconds < 1.0


def test_an_optimizer_that_cannot_be_saved_trains_without_checkpoints(tmp_path: Path) -> None:
    recipe = small_recipe(optim=Component("tests.small_runs.OpaqueSGD", {"lr": 0.1}))
    result = train(recipe, tmp_path)
    assert result.status == "finished"
    (note,) = result.notes
    assert "cannot be resumed" in note
    assert "OpaqueSGD keeps a object" in note
    assert not (tmp_path / "checkpoints").exists()


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_note(tmp_path: Path) -> None:
    whole = train(small_recipe(), tmp_path / "whole")
    train(small_recipe(), tmp_path / "damaged", on_event=stopping_at(9))
    weights = tmp_path / "damaged/checkpoints/step-0000010/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = train(small_recipe(), tmp_path / "damaged")
    assert result.final == whole.final
    assert "step-0000010 (model.safetensors has" in result.notes[0]
    assert log_without_times(tmp_path / "damaged") == log_without_times(tmp_path / "whole")


def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        with pytest.raises(RunError, match=r"cannot save checkpoint .*No space left.*the last good checkpoint is"):
            train(small_recipe(steps=40, keep=10, checkpoint_every=1), disk / "run")
        kept = sorted((disk / "run/checkpoints").glob("step-*"))
        assert kept
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        assert train(small_recipe(steps=40, keep=1, checkpoint_every=20), disk / "run").status == "finished"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_cannot_be_divided_or_counted_is_refused(tmp_path: Path) -> None:
    iris = Component("leantrain.data.Sklearn", {"name": "iris"})
    recipe = small_recipe(data=iris, model=Component("leantrain.nn.MLP"))
    with pytest.raises(UsageError, match="max_tokens=5 needs tokens"):
        train(dataclasses.replace(recipe, max_tokens=5), tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("task", ["iris", "diabetes"])
def test_classes_and_numbers_are_learned_too(task: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    recipe = small_recipe(
        data=Component("leantrain.data.Sklearn", {"name": task}), model=Component("leantrain.nn.MLP"), eval_batches=2
    )
    final = train(recipe, tmp_path).final
    assert final["val_loss"] is not None
    assert ("val_accuracy" in final) == (task == "iris")
    assert "val_perplexity" not in final


def test_a_compiled_model_trains_and_its_checkpoint_has_the_plain_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compile(self: torch.nn.Module) -> None:
        compiled.append(self)
        original(self, backend="eager")  # Dynamo's half of torch.compile; the default backend calls a C++ compiler

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    train(small_recipe(compile=True, steps=2, eval_every=0), tmp_path / "compiled")
    train(small_recipe(steps=2, eval_every=0), tmp_path / "plain")
    assert len(compiled) == 1
    left, right = checkpoint_tensors(tmp_path / "compiled", 2), checkpoint_tensors(tmp_path / "plain", 2)
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key])
