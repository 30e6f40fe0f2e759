"""One training in a process of its own, so that its peak memory is its own and its crash ends nothing else.

The parent writes the job to the child's standard input as JSON and reads its events, one JSON object a line, from the
child's standard output. Whatever else the child or a library prints goes to `stderr.txt` in the run's folder. Ctrl-C
and SIGTERM are passed on: the child saves a checkpoint and ends, and so does the parent's reading.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from leantrain.errors import LeantrainError
from leantrain.recipe import Recipe, recipe_from_dict, recipe_to_dict

OnEvent = Callable[[dict[str, Any]], None]

_OUTPUT = "stderr.txt"


def train_isolated(recipe: Recipe, out: Path, *, on_event: OnEvent, allow: Sequence[str] = ()) -> dict[str, Any]:
    """Train in a fresh process, from the newest checkpoint in `out` if there is one.

    Args:
        recipe: what to train.
        out: the run's folder.
        on_event: called with every event of the training, in this process.
        allow: packages beside the trusted ones whose classes the recipe may name.

    Returns:
        The run's result as in its result.json; with status "failed" there is an `error`, its last words. A process that
        died before it wrote a result leaves only `status` ("failed" or "interrupted"), `name`, `seed` and `notes`.
    """
    out.mkdir(parents=True, exist_ok=True)
    # Only ever called where there is no result to keep; a leftover must not be taken for this training's.
    (out / "result.json").unlink(missing_ok=True)
    job = {"recipe": recipe_to_dict(recipe), "out": str(out), "allow": list(allow)}
    error = ""
    with (out / _OUTPUT).open("wb") as output, _passing_signals_on() as signals:
        child = subprocess.Popen(
            [sys.executable, "-m", "leantrain.isolate"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output,
            encoding="utf-8",
            start_new_session=True,  # or a terminal's Ctrl-C would reach the child twice: by itself, and from us
        )  # fmt: skip
        with child:
            signals.to(child)
            try:
                _send(job, child)
                for event in _events(child):
                    if event.get("kind") == "error":
                        error = str(event["message"])
                    else:
                        on_event(event)
            except BaseException:
                child.kill()
                raise
    if (out / "result.json").exists():
        result: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
    else:
        status = "interrupted" if signals.passed else "failed"
        result = {"name": recipe.name, "seed": recipe.seed, "status": status, "notes": []}
    if result["status"] == "failed":
        result["error"] = error or _last_words(child.returncode, out / _OUTPUT)
    return result


class _Signals:
    """Passes on what arrives, also what arrived before there was a child."""

    def __init__(self) -> None:
        self.passed: list[int] = []
        self._child: subprocess.Popen[str] | None = None

    def to(self, child: subprocess.Popen[str]) -> None:
        self._child = child
        for number in self.passed:
            child.send_signal(number)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.passed.append(number)
        if self._child is not None:
            self._child.send_signal(number)


@contextmanager
def _passing_signals_on() -> Iterator[_Signals]:
    signals = _Signals()
    if threading.current_thread() is not threading.main_thread():  # only that one may have handlers
        yield signals
        return
    before = {number: signal.signal(number, signals) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(job: dict[str, Any], child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    try:
        with child.stdin:
            json.dump(job, child.stdin)
    except BrokenPipeError:
        pass  # it ended before it read anything; its exit status tells


def _events(child: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert child.stdout is not None
    for line in child.stdout:
        if line.endswith("\n"):  # a line without end is that of a process killed while it wrote
            yield json.loads(line)


def _last_words(returncode: int, output: Path) -> str:
    if returncode < 0:
        name = signal.Signals(-returncode).name
        return f"killed by {name}" + (", as the system does when memory runs out" if name == "SIGKILL" else "")
    lines = [line for line in output.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"ended with exit status {returncode}"


def _child(job: dict[str, Any], events: TextIO) -> int:
    """What runs in the new process. Returns its exit status."""

    def tell(event: dict[str, Any]) -> None:
        print(json.dumps(event), file=events, flush=True)

    from leantrain.train import train  # torch is imported here, after the parent has stopped waiting for a reader

    try:
        recipe = recipe_from_dict(job["recipe"], job["allow"])
        train(recipe, Path(job["out"]), on_event=tell)
    except LeantrainError as error:
        tell({"kind": "error", "message": str(error)})
        return error.exit_code
    return 0


if __name__ == "__main__":
    # Standard output is for events only: what a library prints there must not come between them.
    _event_stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.exit(_child(json.load(sys.stdin), _event_stream))
