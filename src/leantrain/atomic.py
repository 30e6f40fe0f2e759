"""Files and folders that appear whole or not at all: written aside, flushed to disk, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it takes `path`'s name only if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        _flush(aside)
        os.replace(aside, path)
        _flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path | str) -> Iterator[Path]:
    """Give a temporary folder beside `path`; it takes `path`'s name only if the block succeeds.

    An existing `path` is replaced. A crash at any moment leaves either the old folder, the new one, or neither
    under that name, never a mixture.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in aside.rglob("*"):
            _flush(file)
        _flush(aside)
        if path.exists():
            shutil.rmtree(path)
        os.replace(aside, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    """Replace the file at `path` by `text` in UTF-8, whole or not at all."""
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    """Ask the operating system to put a file or a folder's entries on the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
