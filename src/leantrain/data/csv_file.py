"""A CSV file as names and rows of cells, or one clear reason why it is none."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from leantrain.errors import RunError, UsageError, nearest

MISSING = frozenset({"", "?", "na", "n/a", "nan", "null"})


@dataclass(frozen=True)
class CsvFile:
    """Cells without the spaces around them, one per name in every row; `origins` are the file and line of each row."""

    path: Path
    names: list[str]
    rows: list[list[str]]
    origins: list[tuple[Path, int]]

    def place(self, column: int | str, argument: str) -> int:
        """Where the column named or numbered `column` is, in [0, columns).

        Raises:
            UsageError: there is no such column, or more than one of that name; `argument` is who asked.
        """
        count = len(self.names)
        if isinstance(column, int):
            if not -count <= column < count:
                raise UsageError(f"{argument}={column} is not a column of {self.path}, which has {count}")
            return column % count
        if self.names.count(column) > 1:
            raise UsageError(f"{argument}={column!r} names {self.names.count(column)} columns of {self.path}")
        if column not in self.names:
            raise UsageError(f"{argument}={column!r} is not a column of {self.path}{nearest(column, self.names)}")
        return self.names.index(column)

    def column(self, place: int) -> list[str]:
        """The cells of one column."""
        return [row[place] for row in self.rows]

    def where(self, row: int, place: int) -> str:
        """A cell in words, for errors."""
        path, line = self.origins[row]
        return f"{path}, line {line}, column {self.names[place]!r}"


def read_csv(path: Path, header: bool | None, delimiter: str) -> CsvFile:
    """Read a UTF-8 file; empty lines are skipped.

    Args:
        header: whether the first row holds names; None takes it for names unless one of its cells is a number.
            Without names, columns are called "0", "1", ...

    Raises:
        UsageError: there is no such file, no row in it, or the delimiter is not one character.
        RunError: not UTF-8, an unclosed quote, or rows of different lengths, as in a truncated file.
    """
    if len(delimiter) != 1:
        raise UsageError(f"delimiter must be one character, got {delimiter!r}")
    rows, lines = _cells(path, delimiter)
    if header is None:
        header = bool(rows) and not any(map(is_number, rows[0]))
    names = rows[0] if header and rows else [str(place) for place in range(len(rows[0]) if rows else 0)]
    rows, lines = rows[header:], lines[header:]
    if not rows:
        raise UsageError(f"{path} holds no rows" + (" below its header" if header else ""))
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(names):
            raise RunError(f"{path}, line {line} has {len(row)} cells, expected {len(names)}; is the file truncated?")
    return CsvFile(path, names, rows, [(path, line) for line in lines])


def is_missing(cell: str) -> bool:
    """Whether a cell says that its value is not known."""
    return cell.lower() in MISSING


def is_number(cell: str) -> bool:
    """Whether a cell is a number; a missing one is not."""
    if is_missing(cell) or "_" in cell:  # Python reads 1_000 as a number, CSV files do not mean it
        return False
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _cells(path: Path, delimiter: str) -> tuple[list[list[str]], list[int]]:
    rows, lines = [], []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            for row in reader:
                if any(cell.strip() for cell in row):
                    rows.append([cell.strip() for cell in row])
                    lines.append(reader.line_num)
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x}); convert it") from None
    except csv.Error as error:
        raise RunError(f"{path}, line {reader.line_num} is damaged: {error}") from error
    except OSError as error:
        raise UsageError(f"no CSV file at {path}: {error.strerror}") from error
    return rows, lines
