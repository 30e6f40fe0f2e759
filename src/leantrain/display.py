"""What a person sees while a run goes on, and the table after a comparison.

`watch` gives a function for `train(..., on_event=...)`: a live line on a terminal, plain lines anywhere else, nothing
if asked to be quiet or in any process but the first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

Event = Mapping[str, Any]
OnEvent = Callable[[Event], None]


@contextmanager
def watch(quiet: bool = False, console: Console | None = None) -> Iterator[OnEvent]:
    """In the block, the function that shows the events of training.

    Args:
        quiet: show nothing.
        console: where to show it; by default standard output.
    """
    console = console or Console(highlight=False)
    if quiet or os.environ.get("RANK", "0") != "0":
        yield lambda event: None
    elif console.is_terminal:
        with _progress(console) as progress:
            yield Live(progress)
    else:
        yield Lines(console)


@dataclass
class Pace:
    """How far a run is and how fast, from the events seen so far."""

    steps: int = 0
    step: int = 0
    seconds: float | None = 0.0
    """Seconds of training at the newest "step" event; None when going on from a checkpoint of unknown age."""
    amount: int = 0
    """Tokens, or examples where data are not text."""
    unit: str = "examples"
    rate: float | None = None
    """`amount` per second since the event before."""
    seconds_left: float | None = None
    here: bool = True
    """Whether this process trains; a comparison trains in processes of their own, with memory of their own."""
    shown: dict[str, float] = field(default_factory=dict)
    """The newest of each figure that is worth a column."""

    @classmethod
    def of(cls, event: Event) -> Pace:
        """The pace at a "start" event."""
        step = int(event.get("step") or 0)
        return cls(int(event.get("steps") or 0), step, None if step else 0.0, here="run" not in event)

    def see(self, event: Event) -> None:
        """Take in a "step" or "eval" event."""
        self.shown |= {key: event[key] for key, _, _ in _FIGURES if isinstance(event.get(key), (int, float))}
        if event["kind"] != "step":
            return
        self.unit = "tokens" if event.get("tokens") else "examples"
        amount, seconds, step = int(event.get(self.unit) or 0), float(event.get("seconds") or 0.0), int(event["step"])
        if self.seconds is not None and seconds > self.seconds and amount >= self.amount:
            self.rate = (amount - self.amount) / (seconds - self.seconds)
            self.seconds_left = max(0, self.steps - step) * (seconds - self.seconds) / max(1, step - self.step)
        self.amount, self.seconds, self.step = amount, seconds, step

    def words(self) -> str:
        """Losses, learning rate, speed and memory as one line of text."""
        parts = [figures(self.shown)]
        if self.rate is not None:
            parts.append(f"{self.rate:,.0f} {self.unit}/s")
        if self.here and (peak := peak_memory()) is not None:
            parts.append(f"peak {size(peak)}")
        return "  ".join(parts)


_FIGURES = (("loss", "loss", ".4f"), ("val_loss", "val loss", ".4f"), ("val_accuracy", "val accuracy", ".4f"),
            ("lr", "lr", ".3g"))  # fmt: skip


def figures(values: Mapping[str, Any]) -> str:
    """`loss 1.2580  lr 0.0094`: those of the known figures that `values` has."""
    return "  ".join(f"{label} {values[key]:{form}}" for key, label, form in _FIGURES if key in values)


class Lines:
    """A line for every event, without escape codes: for files, pipes and logs of jobs."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.pace = Pace()

    def __call__(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "start":
            self.pace = Pace.of(event)
            self._say(_opening(event))
        elif kind == "step":
            self.pace.shown.clear()
            self.pace.see(event)
            left = "" if self.pace.seconds_left is None else f"  left {clock(self.pace.seconds_left)}"
            self._say(f"step {event['step']}/{self.pace.steps}  {self.pace.words()}{left}")
        elif kind == "eval":
            self._say(f"step {event['step']}/{self.pace.steps}  {figures(event)}")
        elif kind == "note":
            self._say(f"note: {event.get('text', '')}")
        elif kind == "end":
            self._say(_closing(event))

    def _say(self, line: str) -> None:
        # Not rich's print: it would break lines at 80 columns, and a log has no width.
        self.console.file.write(f"{line}\n")
        self.console.file.flush()


class Live:
    """One line per run on a terminal that is redrawn as the run goes on."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.pace = Pace()
        self.task: TaskID | None = None

    def __call__(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "start":
            self.pace = Pace.of(event)
            self.progress.console.print(_opening(event), markup=False)
            self.task = self.progress.add_task("", total=self.pace.steps or None, completed=self.pace.step, words="")
        elif kind in ("step", "eval") and self.task is not None:
            self.pace.see(event)
            self.progress.update(self.task, completed=event["step"], words=self.pace.words())
        elif kind == "note":
            self.progress.console.print(f"note: {event.get('text', '')}", markup=False)
        elif kind == "end":
            if self.task is not None:
                self.progress.remove_task(self.task)
                self.task = None
            self.progress.console.print(_closing(event), markup=False)


def summary(results: Mapping[str, Any], console: Console | None = None) -> None:
    """The end of a comparison as a table: every run's mean and spread over seeds, beside the baseline's.

    Args:
        results: as in results.json.
        console: where to show it; by default standard output.
    """
    baseline = results["baseline"]
    head = ["run", *(label for _, label, _, _ in _COLUMNS)]
    rows = []
    for name, run in results["runs"].items():
        cells = []
        for key, _, write, spreads in _COLUMNS:
            figure = run["summary"].get(key, {})
            ratio = run["versus_baseline"].get(key, {}).get("ratio")
            cells.append(_cell(figure.get("mean"), figure.get("std") if spreads else None, ratio, write))
        remarks = ["baseline"] * (name == baseline) + [run["status"]] * (run["status"] != "finished")
        rows.append([f"{name} ({', '.join(remarks)})" if remarks else name, *cells])
    table(head, rows, console, numbers=True)


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None = None, *, numbers: bool = False
) -> None:
    """Print a table; with `numbers`, all columns but the first are aligned to the right and not broken."""
    shown = Table(*head, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in shown.columns[1:] if numbers else ():
        column.justify = "right"
    for column in shown.columns if numbers else ():
        column.no_wrap = True
    for row in rows:
        shown.add_row(*row)
    (console or Console(highlight=False)).print(shown, markup=False)


def size(bytes_: float) -> str:
    """A number of bytes for people, in powers of 1000: 1536000 is `1.54 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if bytes_ < 1000:
            return f"{bytes_:.3g} {unit}"
        bytes_ /= 1000
    return f"{bytes_:.3g} TB"


def clock(seconds: float) -> str:
    """A duration: `4.2 s`, and from a minute on `0:01:20`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def peak_memory() -> int | None:
    """The most memory so far in bytes: of the GPU if one is in use, otherwise of this process. None if unknown."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return int(peak)
    try:
        import resource
    except ImportError:
        return None
    # Linux counts in units of 1024 bytes, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


_COLUMNS: tuple[tuple[str, str, Callable[[float], str], bool], ...] = (
    ("val_loss", "val loss", lambda value: f"{value:.4f}", True),
    ("peak_bytes", "peak memory", size, False),
    ("optimizer_state_bytes", "opt. state", size, False),
    ("seconds", "time", lambda value: f"{value:.1f} s", True),
)
"""Metric, heading, how a value is written, and whether its spread over seeds says something."""


def _cell(mean: float | None, std: float | None, ratio: float | None, write: Callable[[float], str]) -> str:
    """`3.2101 ± 0.0042`, mean and spread over seeds, and below it the ratio to the baseline, `x 0.98`."""
    if mean is None:
        return "not measured"
    spread = "" if std is None else f" ± {write(std)}"
    return write(mean) + spread + ("" if ratio is None else f"\nx {ratio:.3g}")


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(10),
        TextColumn("{task.completed:.0f}/{task.total}"),
        TimeRemainingColumn(),
        # On a narrow terminal what does not fit is cut off, not wrapped.
        TextColumn("{task.fields[words]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
        console=console,
        expand=True,
    )


def _opening(event: Event) -> str:
    parts = [f"{event.get('name', 'run')}:"]
    if event.get("parameters"):
        parts.append(f"{event['parameters']:,} parameters,")
    parts.append(f"{event.get('steps')} steps")
    if event.get("device"):
        parts.append(f"on {event['device']}")
    if event.get("world", 1) > 1:
        parts.append(f"in {event['world']} processes")
    if event.get("step"):
        parts.append(f"(going on from step {event['step']})")
    return " ".join(parts)


def _closing(event: Event) -> str:
    words = [f"{event.get('name', 'run')} {event.get('status', 'ended')}"]
    if event.get("seconds"):
        words.append(f"after {clock(event['seconds'])} of training")
    final = {key: value for key, value in (event.get("final") or {}).items() if isinstance(value, (int, float))}
    words += [f"{key.replace('_', ' ')} {value:.4f}" for key, value in final.items()]
    return "  ".join(words)
