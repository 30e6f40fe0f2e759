"""Trackers are told every figure under the same names, and a missing one is refused before any work."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from leantrain.errors import UsageError
from leantrain.recipe.schema import TRACKERS as ALLOWED
from leantrain.trackers import TRACKERS, check_trackers, open_trackers
from leantrain.train import train
from tests.small_runs import small_recipe
from tests.test_train import stopping_at


class Calls:
    """Stands in for a package: remembers every call and returns what wandb.init and mlflow.start_run would."""

    def __init__(self) -> None:
        self.made: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.made.append((name, args, kwargs))
            return SimpleNamespace(log=self.log, finish=self.finish, info=SimpleNamespace(run_id="run-7"))

        return call

    def of(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for called, args, kwargs in self.made if called == name]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulators.EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_shows_what_the_log_says_once_also_after_going_on(tmp_path: Path) -> None:
    recipe = small_recipe(trackers=["tensorboard"], log_every=1)
    train(recipe, tmp_path, on_event=stopping_at(4))
    result = train(recipe, tmp_path)
    shown = scalars(tmp_path)
    for tag, curve in (("train/loss", "train"), ("val/loss", "val")):
        assert [step for step, _ in shown[tag]] == [line[0] for line in result.curve[curve]]
        assert [value for _, value in shown[tag]] == pytest.approx([line[3] for line in result.curve[curve]])
    assert {"train/lr", "train/grad_norm", "train/tokens", "val/perplexity"} <= shown.keys()


@pytest.mark.parametrize(("name", "log"), [("wandb", "log"), ("mlflow", "log_metrics"), ("trackio", "log")])
def test_the_others_are_told_by_their_own_calls(
    name: str, log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls()
    monkeypatch.setitem(sys.modules, name, calls)  # type: ignore[arg-type]
    train(small_recipe(trackers=[name], log_every=6), tmp_path)
    told = calls.of(log)
    assert [kwargs["step"] for _, kwargs in told] == [6, 6, 12, 12]
    assert told[0][0][0].keys() == {
        "train/loss", "train/lr", "train/grad_norm", "train/tokens", "train/examples", "train/seconds",
    }  # fmt: skip
    assert told[1][0][0].keys() == {"val/loss", "val/perplexity", "val/tokens", "val/seconds"}
    assert calls.made[-1][0] in ("finish", "end_run")


def test_going_on_means_the_same_wandb_and_mlflow_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, mlflow = Calls(), Calls()
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)  # type: ignore[arg-type]
    for step in (0, 5):
        open_trackers(["wandb", "mlflow"], "name", tmp_path, {"steps": 9}, step)
    first, second = (kwargs for _, kwargs in wandb.of("init"))
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert [kwargs["run_id"] for _, kwargs in mlflow.of("start_run")] == [None, "run-7"]
    assert len(mlflow.of("log_params")) == 1


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="'wandb' needs the package wandb: pip install wandb"):
        train(small_recipe(trackers=["wandb"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match="'tensorbord' does not exist; did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])


def test_the_recipe_knows_the_same_names() -> None:
    assert set(TRACKERS) == set(ALLOWED)
