"""What a comparison trains, in which order, and what it makes of the results."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from leantrain import compare as module
from leantrain import isolate, report
from leantrain.compare import compare
from leantrain.errors import UsageError
from leantrain.recipe import Comparison, Recipe, comparison_from_dict, recipe_to_dict
from leantrain.recipe.yaml import dump
from leantrain.report.words import verdict
from leantrain.results import differing_settings, finite
from leantrain.tuning import at_edge, next_split

BASE = {
    "model": {"class_path": "leantrain.nn.MLP", "init_args": {"hidden": [8]}},
    "data": {"class_path": "leantrain.data.Sklearn", "init_args": {"name": "iris"}},
    "optim": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    "steps": 20, "batch_size": 12, "log_every": 5, "trackers": [],
}  # fmt: skip


def described(**changes: Any) -> Comparison:
    """A small comparison: AdamW against SGD on iris."""
    runs = {"adamw": {}, "sgd": {"optim": "torch.optim.SGD", "optim.lr": 0.1}}
    given = {"name": "small", "base": BASE, "runs": runs, "baseline": "adamw", "seeds": [0, 1, 2], **changes}
    return comparison_from_dict(given)


class Pretend:
    """Stands in for training in a process: writes what training writes, with a loss and a peak of our choice."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, Recipe]] = []
        self.loss: Callable[[Recipe], float] = lambda recipe: 1.0
        self.peak: Callable[[Recipe], float] = lambda recipe: 1e6
        self.error: Callable[[Recipe], str] = lambda recipe: ""
        self.stop_before: int | None = None

    def __call__(self, recipe: Recipe, out: Path, *, on_event: Any, allow: Sequence[str]) -> dict[str, Any]:
        folder = "/".join(out.parts[-3:]) if out.parent.name in ("tune", "fit") else "/".join(out.parts[-2:])
        if self.stop_before == len(self.trained):
            return {"name": recipe.name, "seed": recipe.seed, "status": "interrupted", "notes": []}
        self.trained.append((folder, recipe))
        on_event({"kind": "start", "name": recipe.name, "steps": recipe.steps})
        out.mkdir(parents=True)
        (out / "recipe.yaml").write_text(dump(recipe_to_dict(recipe)))
        if error := self.error(recipe):
            return {"name": recipe.name, "seed": recipe.seed, "status": "failed", "error": error, "notes": []}
        loss = self.loss(recipe)
        result = {
            "schema": 1, "name": recipe.name, "seed": recipe.seed, "status": "finished", "steps": recipe.steps,
            "tokens": 0, "examples": 240, "seconds": 2.0, "parameters": 67, "notes": [], "environment": {"torch": "2"},
            "final": {"train_loss": loss, "val_loss": loss, "val_accuracy": 0.5},
            "curve": {"train": [[10, 0, 1.0, 2.0], [20, 0, 2.0, loss]], "val": [[20, 0, 2.0, loss]]},
            "ledger": {
                "step_seconds": {"median": 0.1, "p99": 0.2}, "bytes_sent": 0, "flops": {"total": 1000},
                "peak_bytes": {"total": self.peak(recipe), "optimizer_state": 400}, "phase_seconds": {"forward": 0.1},
                "energy_joules": None, "energy_source": "not available: a test",
            },
            "recipe": recipe_to_dict(recipe),
        }  # fmt: skip
        result = finite(result)
        (out / "result.json").write_text(json.dumps(result))
        on_event({"kind": "end", "status": "finished"})
        return result

    @property
    def folders(self) -> list[str]:
        return [folder for folder, _ in self.trained]


def just_the_verdicts(results: dict[str, Any], path: Path) -> None:
    path.write_text("\n".join(verdict(results, run) for run in results["runs"]))


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    stand_in = Pretend()
    monkeypatch.setattr(module, "train_isolated", stand_in)
    # Drawing takes a second; what reports say is tested in test_report.py.
    monkeypatch.setattr(report, "write_report", just_the_verdicts)
    return stand_in


def lr(recipe: Recipe) -> float:
    return float(recipe.optim.init_args["lr"])


def test_every_run_is_trained_once_with_every_seed_and_seeds_come_first(pretend: Pretend, tmp_path: Path):
    results = compare(described(), tmp_path)
    assert pretend.folders == [f"{run}/seed-{seed}" for seed in (0, 1, 2) for run in ("adamw", "sgd")]
    assert [recipe.seed for _, recipe in pretend.trained] == [0, 0, 1, 1, 2, 2]
    assert all(recipe.ledger for _, recipe in pretend.trained)
    assert results["status"] == "finished"
    assert results["cost"] == {"tuning_seconds": 0, "total_seconds": 12.0, "trainings": 6}


def test_means_spreads_and_the_test_against_the_baseline(pretend: Pretend, tmp_path: Path):
    luck = {0: 0.0, 1: 0.3, 2: -0.1}
    gain = {0: 0.10, 1: 0.12, 2: 0.11}
    pretend.loss = lambda r: 2.0 + luck[r.seed] - (gain[r.seed] if r.name == "sgd" else 0.0)
    runs = compare(described(), tmp_path)["runs"]
    assert runs["adamw"]["summary"]["val_loss"]["mean"] == pytest.approx(2.0 + 0.2 / 3)
    assert runs["adamw"]["summary"]["val_loss"]["std"] == pytest.approx(0.20816660)
    assert runs["adamw"]["versus_baseline"] == {}
    against = runs["sgd"]["versus_baseline"]["val_loss"]
    assert against["difference"] == pytest.approx(-0.11)
    # t = -0.11 / (0.01 / sqrt 3) = -19.05 with 2 degrees of freedom; 1 - t / sqrt(t^2 + 2) is its two-sided p
    t = 0.11 / (0.01 / math.sqrt(3))
    assert against["p_value"] == pytest.approx(1 - t / math.sqrt(t * t + 2), rel=1e-6)
    assert runs["sgd"]["versus_baseline"]["optimizer_state_bytes"]["p_value"] is None


def test_the_best_value_of_the_grid_is_used_for_all_seeds(pretend: Pretend, tmp_path: Path):
    pretend.loss = lambda r: abs(math.log10(lr(r) / (0.01 if r.name == "adamw" else 0.1)))
    results = compare(described(tune={"optim.lr": [0.001, 0.01, 0.1]}, tune_steps=7, tune_seed=9), tmp_path)
    tuned = [recipe for folder, recipe in pretend.trained if "/tune/" in folder]
    assert [(r.name, lr(r), r.seed, r.steps) for r in tuned] == [
        (run, value, 9, 7) for run in ("adamw", "sgd") for value in (0.001, 0.01, 0.1)
    ]
    finals = {r.name: (lr(r), r.steps) for folder, r in pretend.trained if "/seed-" in folder}
    assert finals == {"adamw": (0.01, 20), "sgd": (0.1, 20)}
    assert results["tune"]["adamw"]["best"] == 0.01 and not results["tune"]["adamw"]["at_edge"]
    assert results["tune"]["sgd"]["at_edge"] and "edge" in results["runs"]["sgd"]["notes"][0]
    assert results["cost"] == {"tuning_seconds": 12.0, "total_seconds": 24.0, "trainings": 12}
    assert results["settings"]["optim.lr"] == {"adamw": 0.01, "sgd": 0.1}


@pytest.mark.parametrize("worst", [math.nan, math.inf])
def test_a_value_that_diverges_is_never_the_best(pretend: Pretend, tmp_path: Path, worst: float):
    pretend.loss = lambda r: worst if lr(r) == 0.001 else 5.0
    tuned = compare(described(tune={"optim.lr": [0.001, 0.01]}), tmp_path)["tune"]["adamw"]
    assert tuned["best"] == 0.01
    assert tuned["grid"][0] == {"value": 0.001, "val_loss": None, "status": "diverged", "seconds": 2.0}


def test_a_run_whose_whole_grid_fails_is_reported_and_the_other_goes_on(pretend: Pretend, tmp_path: Path):
    pretend.error = lambda r: "at step 3 the loss is nan and the gradient norm 1" if r.name == "sgd" else ""
    results = compare(described(tune={"optim.lr": [0.001, 0.01]}), tmp_path)
    assert results["status"] == "failed"
    assert results["runs"]["adamw"]["status"] == "finished"
    assert results["runs"]["sgd"]["status"] == "failed" and "diverged" in results["runs"]["sgd"]["notes"][0]
    assert "sgd/seed-0" not in pretend.folders


def test_a_seed_that_fails_does_not_lose_the_others(pretend: Pretend, tmp_path: Path):
    pretend.error = lambda r: "RuntimeError: a wire fell out" if (r.name, r.seed) == ("sgd", 1) else ""
    results = compare(described(), tmp_path)
    run = results["runs"]["sgd"]
    assert results["status"] == run["status"] == "failed"
    assert [r["status"] for r in run["results"]] == ["finished", "failed", "finished"]
    assert run["summary"]["val_loss"]["n"] == run["versus_baseline"]["val_loss"]["n"] == 2
    assert "a wire fell out" in run["results"][1]["error"]


def test_a_failed_baseline_leaves_nothing_to_compare_with_but_keeps_the_rest(pretend: Pretend, tmp_path: Path):
    pretend.error = lambda r: "no" if r.name == "adamw" else ""
    runs = compare(described(), tmp_path)["runs"]
    assert runs["sgd"]["versus_baseline"] == {} and runs["sgd"]["summary"]["val_loss"]["n"] == 3
    assert "no result to compare with" in (tmp_path / "report.html").read_text()


def test_an_interrupted_comparison_saves_what_is_done_and_goes_on_later(pretend: Pretend, tmp_path: Path):
    pretend.stop_before = 3
    stopped = compare(described(), tmp_path)
    assert stopped["status"] == "interrupted"
    assert [len(run["results"]) for run in stopped["runs"].values()] == [2, 1]
    assert json.loads((tmp_path / "results.json").read_text())["status"] == "interrupted"
    pretend.stop_before = None
    assert compare(described(), tmp_path)["status"] == "finished"
    assert pretend.folders == [f"{run}/seed-{seed}" for seed in (0, 1, 2) for run in ("adamw", "sgd")]


def test_a_finished_comparison_is_not_trained_again(pretend: Pretend, tmp_path: Path):
    first = compare(described(), tmp_path)
    events: list[dict[str, Any]] = []
    again = compare(described(), tmp_path, on_event=events.append)
    assert len(pretend.trained) == 6
    assert again["runs"] == first["runs"] and again["cost"] == first["cost"]
    assert [event["status"] for event in events] == ["was finished before"] * 6


def test_a_changed_recipe_is_trained_again_and_the_old_run_is_kept(pretend: Pretend, tmp_path: Path):
    compare(described(seeds=[0]), tmp_path)
    results = compare(described(seeds=[0], runs={"adamw": {}, "sgd": {"optim.lr": 0.5}}), tmp_path)
    assert pretend.folders == ["adamw/seed-0", "sgd/seed-0", "sgd/seed-0"]
    assert (tmp_path / "sgd" / "seed-0.old-1" / "result.json").exists()
    assert "seed-0.old-1" in results["runs"]["sgd"]["notes"][0]


def test_under_a_memory_budget_micro_batches_shrink_until_the_peak_fits(pretend: Pretend, tmp_path: Path):
    pretend.peak = lambda r: 2e6 + (1e6 if r.name == "sgd" else 0.5e6) * r.batch_size / r.accumulate
    results = compare(described(seeds=[0], budget="memory", budget_value="5MB"), tmp_path)
    finals = {r.name: r.accumulate for folder, r in pretend.trained if "/seed-" in folder}
    assert finals == {"adamw": 2, "sgd": 4}  # 2 + 6 / 2 = 5 fits exactly; 2 + 12 / 4 = 5 as well
    probes = [r for folder, r in pretend.trained if "/fit/" in folder]
    assert [(r.name, r.accumulate) for r in probes] == [
        (n, a) for n, e in (("adamw", 2), ("sgd", 4)) for a in (1, 2, 4) if a <= e
    ]
    assert all(r.steps <= 3 for r in probes)
    assert "3 of 12 examples" in results["runs"]["sgd"]["notes"][0]
    assert results["settings"]["accumulate"] == {"adamw": 2, "sgd": 4}


def test_a_run_that_cannot_fit_is_named_and_not_dropped(pretend: Pretend, tmp_path: Path):
    pretend.peak = lambda r: 9e6 if r.name == "sgd" else 1e6
    results = compare(described(seeds=[0], budget="memory", budget_value="5MB"), tmp_path)
    assert results["runs"]["sgd"]["status"] == "does not fit"
    assert "9.0 MB" in results["runs"]["sgd"]["notes"][0]
    assert [r.accumulate for folder, r in pretend.trained if folder.startswith("sgd/fit")] == [1, 2, 4, 12]
    assert "does not fit" in (tmp_path / "report.html").read_text()


def test_a_run_that_needs_more_later_than_at_first_is_said_to_be_over_the_budget(pretend: Pretend, tmp_path: Path):
    pretend.peak = lambda r: 9e6 if r.steps > 3 else 1e6
    results = compare(described(seeds=[0], budget="memory", budget_value="5MB"), tmp_path)
    assert all("over the budget" in run["notes"][0] for run in results["runs"].values())


def test_running_out_of_memory_is_not_fitting_and_another_failure_is_a_failure(pretend: Pretend, tmp_path: Path):
    words = {"adamw": "torch.OutOfMemoryError: CUDA out of memory", "sgd": "KeyError: 'x'"}
    pretend.error = lambda r: words[r.name]
    runs = compare(described(seeds=[0], budget="memory", budget_value="5MB"), tmp_path)["runs"]
    assert runs["adamw"]["status"] == "does not fit"
    assert runs["sgd"]["status"] == "failed" and runs["sgd"]["results"][0]["error"] == "KeyError: 'x'"


def test_every_event_says_which_training_it_is_of_and_every_training_ends(pretend: Pretend, tmp_path: Path):
    pretend.error = lambda r: "no" if (r.name, r.seed) == ("sgd", 1) else ""
    events: list[dict[str, Any]] = []
    compare(described(tune={"optim.lr": [0.01, 0.1]}), tmp_path, on_event=events.append)
    assert [event["kind"] for event in events] == ["start", "end"] * 10
    assert events[0]["name"] == "[1/10] adamw/tune/optim.lr=0.01" and events[0]["purpose"] == "tune"
    assert events[-1]["name"] == "[10/10] sgd/seed-2"
    assert [e["status"] for e in events if e["kind"] == "end"].count("failed: no") == 1


def test_the_tables_have_one_line_per_training(pretend: Pretend, tmp_path: Path):
    compare(described(seeds=[0, 1], tune={"optim.lr": [0.01, 0.1]}), tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["run"], line["purpose"], line["seed"]) for line in lines] == [
        (run, *rest)
        for run in ("adamw", "sgd")
        for rest in (("tune", "1234"), ("tune", "1234"), ("final", "0"), ("final", "1"))
    ]
    assert lines[2]["val_loss"] == "1.0" and lines[2]["energy_joules"] == ""
    strict = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert strict["runs"]["adamw"]["results"][0]["folder"] == "adamw/seed-0"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": "memory"}, "budget_value"),
        ({"tune": {"optim.lr": [1, 2]}, "runs": {"adamw": {}, "b": {"tune": {"optim.lr": [1, 2, 3]}}}}, "as many"),
    ],
)
def test_unequal_terms_are_refused_before_anything_starts(
    pretend: Pretend, tmp_path: Path, changes: dict[str, Any], words: str
):
    with pytest.raises(UsageError, match=words):
        compare(described(**changes), tmp_path)
    assert not pretend.trained and not list(tmp_path.iterdir())


def test_torchrun_is_refused(pretend: Pretend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="torchrun"):
        compare(described(), tmp_path)


def test_the_edge_of_a_grid_is_only_one_of_numbers():
    assert at_edge(3, [1, 2, 3]) and at_edge(1.0, [1, 2, 3]) and not at_edge(2, [3, 2, 1])
    assert not at_edge("adam", ["adam", "sgd"]) and not at_edge(True, [True, False]) and not at_edge(1, [1])


@pytest.mark.parametrize(("batch", "splits"), [(12, [1, 2, 4, 12]), (1, [1]), (7, [1, 7]), (16, [1, 2, 4, 8, 16])])
def test_micro_batches_halve_where_they_can_and_end_at_one_example(batch: int, splits: list[int]):
    found = [1]
    while found[-1] < batch:
        found.append(next_split(batch, found[-1]))
    assert found == splits


def test_settings_that_differ_are_named_as_they_are_written():
    one = {"name": "a", "seed": 1, "optim": {"class_path": "x.A", "init_args": {"lr": 1, "rank": 4}}, "clip": 1}
    two = {"name": "b", "seed": 2, "optim": {"class_path": "x.B", "init_args": {"lr": 1}}, "clip": True}
    assert differing_settings({"one": one, "two": two}) == {
        "optim": {"one": "x.A", "two": "x.B"},
        "optim.rank": {"one": 4},
        "clip": {"one": 1, "two": True},
    }


# With real training, in real processes.


def test_real_trainings_in_processes_of_their_own_make_a_report(tmp_path: Path):
    events: list[dict[str, Any]] = []
    broken = {"optim": "torch.optim.SGD", "optim.lr": 1e30, "clip": None}
    comparison = described(seeds=[0], runs={"adamw": {}, "broken": broken}, base={**BASE, "eval_every": 10})
    results = compare(comparison, tmp_path, on_event=events.append)
    good, bad = results["runs"]["adamw"], results["runs"]["broken"]
    assert good["status"] == "finished" and results["status"] == "failed"
    assert good["summary"]["peak_bytes"]["mean"] > 0
    assert good["summary"]["optimizer_state_bytes"]["mean"] >= 2 * 4 * good["results"][0]["parameters"]
    assert bad["status"] == "failed" and "nan" in bad["results"][0]["error"]
    assert {"start", "step", "eval", "end"} <= {event["kind"] for event in events if event["run"] == "adamw"}
    page = (tmp_path / "report.html").read_text()
    assert "one seed" in page or "failed" in page
    assert "optimizer memory" in page and "<svg" in page


SCRIPT = """
import json, sys
from pathlib import Path
from leantrain.compare import compare
from leantrain.recipe import comparison_from_dict
print(compare(comparison_from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]),
              on_event=lambda event: print(event["kind"], flush=True))["status"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_are_passed_on_to_the_training_also_when_they_come_early(number: signal.Signals):
    class Child:
        received: list[int] = []  # noqa: RUF012
        send_signal = received.append

    before = signal.getsignal(number)
    with isolate._passing_signals_on() as signals:
        os.kill(os.getpid(), number)
        signals.to(Child)  # type: ignore[arg-type]
        os.kill(os.getpid(), number)
    assert Child.received == signals.passed == [number, number]
    assert signal.getsignal(number) is before


def test_stopping_in_the_middle_of_a_training_loses_nothing(tmp_path: Path):
    given = {
        "name": "stopped", "base": {**BASE, "steps": 400, "log_every": 20}, "runs": {"only": {}}, "baseline": "only",
        "seeds": [3],
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(given), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process:
        for line in process.stdout:
            if line == "step\n":
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 0
    assert rest.splitlines()[-2:] == ["end", "interrupted"]
    run = tmp_path / "only" / "seed-3"
    saved = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir()]
    assert saved and max(saved) < 400
    assert json.loads((tmp_path / "results.json").read_text())["status"] == "interrupted"

    events: list[dict[str, Any]] = []
    results = compare(comparison_from_dict(given), tmp_path, on_event=events.append)
    assert results["status"] == "finished"
    assert next(event for event in events if event["kind"] == "start")["step"] == max(saved)
    # Whole, and nothing twice: the curve has a point every 20 steps.
    curve = results["runs"]["only"]["results"][0]["curve"]["train"]
    assert [point[0] for point in curve] == list(range(20, 401, 20))
