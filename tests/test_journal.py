"""The records of a run: whole lines, cut back cleanly, and a folder that is not touched before its time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from leantrain.errors import RunError
from leantrain.journal import Journal

RECIPE: dict[str, Any] = {"name": "j", "trackers": []}


def journal(folder: Path, step: int = 0, events: list[dict[str, Any]] | None = None, writes: bool = True) -> Journal:
    made = Journal(folder, [].append if events is None else events.append, writes)
    made.open(step, RECIPE, "name: j\n")
    return made


def test_going_on_cuts_the_log_back_and_passes_over_a_torn_line(tmp_path: Path) -> None:
    first = journal(tmp_path)
    for step in (1, 2, 3):
        first.line("step", {"step": step, "loss": step / 10, "tokens": 0, "seconds": 0.5})
    first.line("eval", {"step": 2, "val_loss": 0.7, "tokens": 0, "seconds": 0.5})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    second = journal(tmp_path, step=2)
    assert [line["step"] for line in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())] == [1, 2, 2]
    assert second.curve() == {"train": [[1, 0, 0.5, 0.1], [2, 0, 0.5, 0.2]], "val": [[2, 0, 0.5, 0.7]]}
    assert second.final() == {"train_loss": 0.2, "val_loss": 0.7}
    assert second.last("val_loss") == 2
    assert journal(tmp_path).curve() == {"train": [], "val": []}


def test_what_json_cannot_say_is_null(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    made = journal(tmp_path, events=events)
    made.line("eval", {"step": 1, "val_loss": math.inf, "tokens": 0, "seconds": 0.0})
    assert json.loads((tmp_path / "log.jsonl").read_text())["val_loss"] is None
    assert "val_loss" not in events[0]
    assert made.final()["val_loss"] is None


def test_a_note_is_told_once(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    made = journal(tmp_path, events=events)
    made.note("twice")
    made.note("twice")
    assert made.notes == ["twice"]
    assert events == [{"kind": "note", "text": "twice"}]


def test_other_processes_write_and_say_nothing(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    made = journal(tmp_path / "run", events=events, writes=False)
    made.line("step", {"step": 1, "loss": 0.1, "tokens": 0, "seconds": 0.0})
    made.tell("start")
    made.flush()
    assert not events
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write to the run's folder .*file/run"):
        journal(tmp_path / "file" / "run")
