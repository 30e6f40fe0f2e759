"""The command: help without torch, one line for every mistake, exit codes, and whole runs on a small data set."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from leantrain.cli import main
from leantrain.recipe import Recipe
from leantrain.recipe.yaml import dump, load_text
from leantrain.registry import METHODS
from leantrain.train import train

DIGITS: dict[str, Any] = {
    "model": {"class": "MLP", "hidden": [16]},
    "data": {"class": "Sklearn", "name": "digits"},
    "optim": {"class": "torch.optim.AdamW", "lr": 0.01},
    "steps": 6,
    "batch_size": 16,
    "log_every": 2,
    "eval_batches": 2,
    "trackers": [],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, with the recipe digits.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "digits.yaml").write_text(dump(DIGITS), encoding="utf-8")
    return tmp_path


def test_help_comes_at_once_because_torch_is_not_imported() -> None:
    program = """
import sys, time
start = time.perf_counter()
from leantrain.cli import main
for number, argv in enumerate([["--help"], ["train", "--help"], ["compare", "--help"], ["methods"], ["--version"]]):
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    assert code in (0, None), argv
    assert "torch" not in sys.modules, argv
    # 0.1 s and 0.3 s on an idle machine; torch alone would take seconds.
    assert time.perf_counter() - start < 5, argv
    assert number or "rich" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    assert ended.returncode == 0


def test_help_explains_every_key_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    from leantrain.recipe.schema import field_names

    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in [*field_names(), "out", "allow", "fresh", "quiet"])


def test_help_on_a_class_lists_its_arguments(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--optim.help", "GaLoreAdamW"]) == 0
    text = capsys.readouterr().out
    assert "--optim.rank" in text
    assert "one of 'svd', 'subspace'" in text
    assert "--optim.params" not in text
    assert main(["train", "--optim.help", "os.system"]) == 2


def test_a_run_leaves_its_results_and_says_where(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits.yaml", "--steps", "4", "--optim.lr", "0.02"]) == 0
    result = json.loads((folder / "runs" / "digits" / "result.json").read_text(encoding="utf-8"))
    assert (result["status"], result["steps"]) == ("finished", 4)
    assert result["recipe"]["optim"] == {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}}
    text = capsys.readouterr().out
    assert "step 4/4" in text
    assert f"results: {Path('runs') / 'digits'}" in text
    assert "\x1b" not in text


def test_quiet_and_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--quiet", "--out", "here", "digits.yaml"]) == 0
    assert capsys.readouterr().out == ""
    assert (folder / "here" / "result.json").exists()


def test_a_finished_run_is_not_repeated_unless_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def steps_logged() -> int:
        capsys.readouterr()
        assert main(["train", "digits.yaml", *more]) == 0
        return sum("  loss " in line for line in capsys.readouterr().out.splitlines())

    more: list[str] = []
    assert (steps_logged(), steps_logged()) == (3, 0)
    more = ["--fresh"]
    assert steps_logged() == 3


def test_the_printed_recipe_is_the_same_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits.yaml", "--clip", "2", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert load_text(printed, "here")["clip"] == 2
    (folder / "again.yaml").write_text(printed, encoding="utf-8")
    assert main(["train", "again.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == printed
    assert not (folder / "runs").exists()


def test_without_a_recipe_there_is_a_default_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "text.txt").write_text("to be or not to be " * 400, encoding="utf-8")
    small = ["--steps", "2", "--batch_size", "2", "--eval_batches", "1", "--data.path", "text.txt"]
    assert main(["train", *small, "--trackers", "[]"]) == 0
    result = json.loads((folder / "runs" / "default" / "result.json").read_text(encoding="utf-8"))
    assert result["recipe"]["optim"]["class_path"] == "leantrain.optim.GaLoreAdamW"
    assert result["tokens"] == 2 * 2 * 64


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "none.yaml"], "cannot read none.yaml"),
        (["train", "digits.yaml", "--stps", "3"], "train has no flag '--stps'; did you mean 'steps'?"),
        (["train", "digits.yaml", "--alow", "x"], "train has no flag '--alow'; did you mean 'allow'?"),
        (["train", "digits.yaml", "--steps", "0"], "steps must be a whole number, at least 1, got 0"),
        (["train", "digits.yaml", "--optim.rank", "3"], "optim: AdamW has no argument 'rank'"),
        (["train", "digits.yaml", "--optim", "my_package.Adam"], "add --allow my_package if you trust it"),
        (["train", "digits.yaml", "--model.classes", "2"], "model.classes=2 is too small: the data need 10"),
        (["train", "digits.yaml", "more.yaml"], "train has no flag 'more.yaml'"),
        (["train", "--modle.help", "MLP"], "train has no flag '--modle.help'; did you mean 'model'?"),
        (["train", "--steps.help", "MLP"], "steps is not a key that names a class"),
        (["compare"], "the following arguments are required: RECIPE.yaml"),
        (["compare", "digits.yaml"], "a comparison has no key 'model'"),
        (["compare", "digits.yaml", "--sees", "1"], "compare has no flag '--sees'; did you mean 'seeds'?"),
        (["report", "nowhere"], "nowhere is not the folder of a comparison"),
        (["tran"], "invalid choice: 'tran'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    assert main(argv) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.startswith("leantrain: error: ")
    assert said.err.count("\n") == 1
    assert not (folder / "runs").exists()


def test_a_failure_is_one_line_and_exit_code_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("deep inside")

    monkeypatch.setattr("leantrain.train.train", broken)
    assert main(["train", "digits.yaml"]) == 1
    assert capsys.readouterr().err == "leantrain: failed: ZeroDivisionError: deep inside (--debug shows where)\n"
    assert main(["train", "digits.yaml", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_with_exit_code_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--optim", "torch.optim.SGD", "--optim.lr", "1e30", "--clip", "null", "--warmup", "0"]
    assert main(["train", "digits.yaml", *flags]) == 1
    assert "the loss is" in capsys.readouterr().err


def test_a_class_in_a_file_of_ones_own_is_used_when_allowed(folder: Path) -> None:
    (folder / "my_own_optimizer.py").write_text("from torch.optim import SGD as Mine", encoding="utf-8")
    flags = ["--optim", "my_own_optimizer.Mine", "--optim.lr", "0.1", "--quiet"]
    assert main(["train", "digits.yaml", *flags]) == 2
    assert main(["train", "digits.yaml", *flags, "--allow", "my_own_optimizer"]) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on_and_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    @contextmanager
    def impatient(quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
        yield lambda event: signal.raise_signal(number) if event["kind"] == "step" else None

    with monkeypatch.context() as patch:
        patch.setattr("leantrain.display.watch", impatient)
        assert main(["train", "digits.yaml"]) == 1
    assert "interrupted at step 3; the same command goes on from there" in capsys.readouterr().err
    assert main(["train", "digits.yaml"]) == 0
    assert "going on from step 3" in capsys.readouterr().out


def test_a_comparison_ends_with_a_table_and_a_report(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train_here(recipe: Recipe, out: Path, *, on_event: Any, allow: Sequence[str]) -> dict[str, Any]:
        """In this process: starting one for each training takes seconds, and is tested with `compare`."""
        return train(recipe, out, on_event=on_event).to_dict()

    monkeypatch.setattr("leantrain.compare.train_isolated", train_here)
    runs = {"adamw": {}, "galore": {"optim": "GaLoreAdamW", "optim.rank": 4}}
    keys = {"base": {**DIGITS, "steps": 2}, "runs": runs, "baseline": "adamw", "seeds": [0]}
    (folder / "two.yaml").write_text(dump(keys), encoding="utf-8")
    assert main(["compare", "two.yaml", "--steps", "3"]) == 0
    text = capsys.readouterr().out
    assert "adamw (baseline)" in text
    page = folder / "runs" / "two" / "report.html"
    assert f"report: {Path('runs') / 'two' / 'report.html'}" in text
    page.unlink()
    assert main(["report", str(folder / "runs" / "two")]) == 0
    assert page.exists()


def test_the_methods_are_those_of_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["class_path"]) for row in rows] == [(m.name, m.class_path) for m in METHODS]
    assert main(["methods"]) == 0
    assert all(method.name in capsys.readouterr().out for method in METHODS[:1])


def test_the_environment_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["python"].startswith("3.")
    assert main(["env"]) == 0
    assert "python: 3." in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_error_with_a_traceback() -> None:
    command = f"{sys.executable} -m leantrain train --help | head -1"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    assert ended.stdout.startswith("usage: leantrain train")


def test_without_a_display_the_report_is_not_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from leantrain.cli import _open

    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    _open(folder / "report.html")
    assert opened == []
    assert "no display" in capsys.readouterr().err
    monkeypatch.setenv("DISPLAY", ":0")
    _open(folder / "report.html")
    assert opened == [(folder / "report.html").resolve().as_uri()]
