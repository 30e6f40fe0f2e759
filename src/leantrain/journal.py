"""What a run leaves behind and tells while it goes: log.jsonl, trackers, events, result.json.

log.jsonl has one JSON object a line, either of training or, with `val_loss`, of an evaluation. Going on from a
checkpoint cuts it back to that checkpoint's step first, so the curve is whole and has no line twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from leantrain.atomic import write_text
from leantrain.errors import RunError
from leantrain.trackers import Tracker, open_trackers

OnEvent = Callable[[dict[str, Any]], None]
Status = Literal["finished", "interrupted", "failed"]
SCHEMA = 1
PROBED = "probe/accuracy"
"""In every line about the hidden layers."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended: the contents of result.json."""

    name: str
    seed: int
    status: Status
    steps: int
    tokens: int
    examples: int
    seconds: float
    """Seconds in training steps; evaluation, checkpoints and set-up are not counted."""
    parameters: int
    final: dict[str, float | None]
    """The last `train_loss`, `val_loss` and, where they mean something, `val_perplexity` and `val_accuracy`."""
    curve: dict[str, list[list[float | None]]]
    """`train` and `val`: [step, tokens, seconds, loss] for every line of the log."""
    ledger: dict[str, Any] | None
    environment: dict[str, Any]
    recipe: dict[str, Any]
    notes: list[str]
    probes: list[dict[str, Any]] = field(default_factory=list)
    """Every look at the hidden layers: its `step`, `probe/accuracy` and a `probe/PLACE/MEASURE` for each measure."""
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return asdict(self)


class Journal:
    """Keeps the records of one run in `folder`; where `writes` is False (all processes but the first), nothing."""

    def __init__(self, folder: Path, on_event: OnEvent, writes: bool) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self._on_event = on_event
        self._writes = writes
        self._lines: list[dict[str, Any]] = []
        self._trackers: list[Tracker] = []
        self._log = folder / "log.jsonl"
        self._open = False

    def open(self, step: int, recipe: dict[str, Any], recipe_text: str) -> None:
        """Begin at `step`: write the recipe down, cut the log back, wake the trackers."""
        if not self._writes:
            return
        self._lines = [line for line in _read_lines(self._log) if line["step"] <= step] if step else []
        try:
            write_text(self.folder / "recipe.yaml", recipe_text)
            write_text(self._log, "".join(json.dumps(line) + "\n" for line in self._lines))
        except OSError as error:
            raise RunError(f"cannot write to the run's folder {self.folder}: {error.strerror or error}") from error
        self._open = True
        self._trackers = open_trackers(recipe["trackers"], recipe["name"], self.folder, recipe, step)

    def tell(self, kind: str, **values: Any) -> None:
        """Pass an event on to whoever watches."""
        if self._writes:
            self._on_event({"kind": kind, **values})

    def note(self, text: str) -> None:
        """Something the user should read in the result, such as that a run cannot be resumed. Once is enough."""
        if text not in self.notes:
            self.notes.append(text)
            self.tell("note", text=text)

    def line(self, kind: Literal["step", "eval", "probe"], values: dict[str, Any]) -> None:
        """One line of the log, also told as an event and to the trackers."""
        if not self._writes:
            return
        line = {key: _plain(value) for key, value in values.items()}
        self._lines.append(line)
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self._log}: {error.strerror or error}") from error
        known = {key: value for key, value in line.items() if value is not None}
        self.tell(kind, **known)
        scalars = {_tag(kind, key): value for key, value in known.items() if key != "step"}
        for tracker in self._trackers:
            tracker.log(line["step"], scalars)

    def flush(self) -> None:
        """Put the log on the disk, so that it is never older than the checkpoint about to be written."""
        if self._writes:
            with self._log.open("rb") as file:
                os.fsync(file.fileno())

    def last(self, key: str) -> int:
        """The step of the newest line in the log that has `key`, -1 if there is none."""
        return max((line["step"] for line in self._lines if key in line), default=-1)

    def probes(self) -> list[dict[str, Any]]:
        """The lines about the hidden layers."""
        return [line for line in self._lines if PROBED in line]

    def final(self) -> dict[str, float | None]:
        """The last losses, from the log."""
        train = [line for line in self._lines if "loss" in line][-1:]
        evaluation = [line for line in self._lines if "val_loss" in line][-1:]
        final = {"train_loss": train[0]["loss"] if train else None, "val_loss": None}
        return final | {key: line[key] for line in evaluation for key in line if key.startswith("val_")}

    def curve(self) -> dict[str, list[list[float | None]]]:
        """The whole log as two curves of [step, tokens, seconds, loss]."""
        return {
            name: [[line[k] for k in ("step", "tokens", "seconds", key)] for line in self._lines if key in line]
            for name, key in (("train", "loss"), ("val", "val_loss"))
        }

    def close(self, result: RunResult) -> None:
        """Write result.json and say goodbye to trackers and watchers. A run that was refused before `open` leaves the
        folder, which may be another run's, as it is."""
        if not self._open:
            return
        write_text(self.folder / "result.json", json.dumps(result.to_dict(), indent=1))
        for tracker in self._trackers:
            tracker.close(result.status == "finished")
        self.tell(
            "end", name=result.name, status=result.status, steps=result.steps, seconds=result.seconds,
            final=result.final, notes=result.notes,
        )  # fmt: skip


def _read_lines(log: Path) -> list[dict[str, Any]]:
    """The log's lines; a torn one, left by a kill, is passed over."""
    lines = []
    for text in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: null stands for both."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tag(kind: str, key: str) -> str:
    if kind == "probe":
        return key
    return f"val/{key.removeprefix('val_')}" if kind == "eval" else f"train/{key}"
