"""What a benchmark leaves behind: benchmarks/results/ROOM/NAME.json, from which every table in the docs is made."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from leantrain.atomic import write_text

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One table of figures, and all that is needed to measure it again."""

    title: str
    command: str
    date: str
    environment: dict[str, Any]
    columns: list[str]
    rows: list[list[Any]]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title!r} has {len(self.columns)} columns but a row of {len(row)}: {row}")

    def markdown(self) -> str:
        """The table, then how, when and on what it was measured, then the notes."""
        lines = [_row(self.columns), _row(["---"] * len(self.columns)), *map(_row, self.rows)]
        measured = f"Measured {self.date} by `{self.command}` on {machine(self.environment)}."
        return "\n".join([*lines, "", " ".join([measured, *self.notes])])


def write_result(
    name: str, *, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], notes: Sequence[str] = ()
) -> None:
    """Save a benchmark's table under `name`, such as "optim/galore_step", and print it.

    Raises:
        ValueError: a row has not as many cells as there are columns.
    """
    from leantrain.ledger.environment import describe

    result = Result(
        title=title,
        command=_command(),
        date=datetime.now(timezone.utc).date().isoformat(),
        environment=describe(),
        columns=list(columns),
        rows=[list(row) for row in rows],
        notes=list(notes),
    )
    write_text(FOLDER / f"{name}.json", json.dumps(asdict(result), indent=2, ensure_ascii=False) + "\n")
    print(f"{result.title}\n\n{result.markdown()}")


def read_results() -> dict[str, Result]:
    """Every saved result by its name, in alphabetical order."""
    return {
        file.relative_to(FOLDER).with_suffix("").as_posix(): Result(**json.loads(file.read_text(encoding="utf-8")))
        for file in sorted(FOLDER.rglob("*.json"))
    }


def machine(environment: dict[str, Any]) -> str:
    """An environment in a few words: processor or GPUs, cores, threads, memory, versions."""
    ram = environment.get("ram_bytes")
    threads = environment.get("threads")
    parts = [
        *environment.get("gpus", []),
        f"{environment.get('cpu')}, {environment.get('cores')} cores",
        f"{threads} thread{'' if threads == 1 else 's'}",
        f"{ram / 2**30:.0f} GiB" if ram else "",
        f"PyTorch {environment.get('torch')}",
        f"Python {environment.get('python')}",
    ]
    return ", ".join(part for part in parts if part)


def _command() -> str:
    """The command line of this process, as somebody else would type it."""
    main = sys.modules["__main__"].__spec__
    return " ".join([f"python -m {main.name}" if main else f"python {sys.argv[0]}", *sys.argv[1:]])


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", r"\|") for cell in cells) + " |"
