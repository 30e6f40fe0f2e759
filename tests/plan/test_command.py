"""`leantrain plan`, from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from leantrain.cli import main
from leantrain.plan.methods import METHODS
from leantrain.plan.plan import KINDS
from leantrain.recipe.yaml import dump

DIGITS = {
    "model": {"class": "MLP", "hidden": [64, 64]},
    "data": {"class": "Sklearn", "name": "digits"},
    "optim": {"class": "torch.optim.AdamW", "lr": 0.01},
    "steps": 6,
    "batch_size": 16,
}


@pytest.fixture(autouse=True)
def few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the sake of time; which methods there are is no matter of the command's."""
    few = [method for method in METHODS if method.name in ("AdamW", "APOLLO-Mini")]
    monkeypatch.setattr("leantrain.plan.plan.METHODS", few)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    file = tmp_path / "digits.yaml"
    file.write_text(dump(DIGITS), encoding="utf-8")
    return str(file)


def test_a_plan_as_json_keeps_to_its_schema(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--model", "llama-tiny", "--memory", "1GB", "--context", "16", "--batch", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert set(plan) == {
        "schema", "model", "batch", "context", "parameters", "device", "memory_bytes", "fits", "combinations", "advice",
    }  # fmt: skip
    assert (plan["schema"], plan["memory_bytes"], plan["fits"], plan["advice"]) == (1, 10**9, True, [])
    for one in plan["combinations"]:
        assert set(one) == {
            "method", "dtype", "step_in_backward", "activation_checkpointing", "own", "deviation", "fits", "peak_bytes",
            "at_peak", "peaks", "optimizer_flops_share", "optimizer_moved_share", "costs",
        }  # fmt: skip
        assert tuple(one["at_peak"]) == KINDS
        assert sum(one["at_peak"].values()) == one["peak_bytes"]


def test_a_recipe_is_planned_checked_and_drawn(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "plan.png"
    assert main(["plan", "--recipe", recipe, "--memory", "1GB", "--check", "--json", "--picture", str(picture)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["combinations"][0]["own"] and plan["combinations"][0]["method"] == "digits"
    check = plan["check"]
    for kind in ("parameters", "gradients", "optimizer_state", "activations"):
        assert check["predicted"][kind] == check["measured"][kind], kind
    assert check["predicted"]["peak"] == pytest.approx(check["measured"]["peak"], rel=0.02)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_plan_for_people(recipe: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--recipe", recipe, "--memory", "1GB", "--batch", "8", "--dtype", "float32", "--check"]) == 0
    text = capsys.readouterr().out
    assert "batch 8" in text
    assert "AdamW " in text and "\n  float32" in text and "bfloat16" not in text
    assert "predicted" in text and "+0.00%" in text


def test_what_fits_nowhere_ends_with_1_and_says_what_would_have_to_give(
    recipe: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", "--recipe", recipe, "--memory", "1kB"]) == 1
    out, err = capsys.readouterr()
    assert "more than the 0.0 MB given" in err
    assert "no help" in out and "(+" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--model and --recipe"),
        (["--model", "llama-7b"], "--memory, --bandwidth or both"),
        (["--model", "llama-7b", "--bandwidth", "100"], "such as 100Mbit or 1Gbit, got '100'"),
        (["--model", "llama-tiny", "--bandwidth", "1Gbit", "--processes", "1"], "processes must be 2 or more"),
        (["--memory", "1GB"], "--model and --recipe"),
        (["--memory", "1GB", "--model", "a", "--recipe", "b"], "--model and --recipe"),
        (["--memory", "1gb", "--model", "llama-7b"], "'1gb'"),
        (["--memory", "1GB", "--model", "llama-8b"], "did you mean"),
        (["--memory", "1GB", "--model", "llama-7b", "--picture", "plan.txt"], ".png"),
        (["--memory", "1GB", "--model", "llama-7b", "--dtype", "float8"], "float8"),
        (["--memory", "1GB", "--model", "llama-7b", "--batch", "0"], "batch=0"),
        (["--memory", "1GB", "--recipe", "nowhere.yaml"], "nowhere.yaml"),
        (["--memory", "1GB", "--model", "llama-7b", "--chek"], "--chek"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err


def test_help_does_not_wait_for_torch():
    script = """
import sys
from leantrain.cli import main
try:
    main(["plan", "--help"])
except SystemExit:
    pass
sys.exit("torch" in sys.modules or "rich" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0
    assert "22.5GiB" in ended.stdout
