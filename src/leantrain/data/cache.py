"""Arrays computed once from a slow source (tokens of a corpus, pixels of JPEGs), kept on disk and memory-mapped.

One file per result, named by a fingerprint of everything it was computed from. It begins with a block of 4096 bytes,
a JSON header padded by spaces: format, fingerprint, and for each array its name, dtype, shape, offset and CRC-32.
The arrays follow, each at a multiple of 64 bytes.

A file appears whole or not at all (see `leantrain.atomic`), so a reader never needs a lock. A lock only keeps a second
process from doing the same work at the same time: it waits, and finds the file there. What is on the disk is checked,
size and sums, every time it is opened (about a second per gigabyte), and built again when it does not hold.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import numpy as np
from numpy.typing import NDArray

from leantrain.atomic import whole_file
from leantrain.errors import RunError
from leantrain.ledger.record import event

if sys.platform != "win32":
    import fcntl

FORMAT = "leantrain arrays 1"
HEADER_BYTES = 4096
ALIGN = 64
CHECK_BYTES = 1 << 24

Arrays = dict[str, NDArray[Any]]


class Section(TypedDict):
    """One array in the file. `crc` is the CRC-32 of its bytes."""

    name: str
    dtype: str
    shape: list[int]
    offset: int
    crc: int


class ArrayWriter:
    """Appends rows to named arrays in an open file, one array after the other, without keeping them in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._file.seek(HEADER_BYTES)
        self.sections: list[Section] = []

    def append(self, name: str, rows: NDArray[Any]) -> None:
        """Add `rows` to the array `name`. A new name ends the array before it; rows may be empty, to declare one."""
        rows = np.ascontiguousarray(rows)
        if not self.sections or self.sections[-1]["name"] != name:
            assert name not in [section["name"] for section in self.sections], f"{name} has ended already"
            self._file.write(bytes(-self._file.tell() % ALIGN))
            self.sections.append(
                Section(name=name, dtype=rows.dtype.str, shape=[0, *rows.shape[1:]], offset=self._file.tell(), crc=0)
            )
        section = self.sections[-1]
        assert section["dtype"] == rows.dtype.str and section["shape"][1:] == list(rows.shape[1:])
        data = rows.reshape(-1).view(np.uint8).data
        self._file.write(data)
        section["shape"][0] += len(rows)
        section["crc"] = zlib.crc32(data, section["crc"])

    def finish(self, fingerprint: str) -> None:
        """Write the header."""
        header = {
            "format": FORMAT, "fingerprint": fingerprint, "bytes": self._file.tell(), "arrays": self.sections,
        }  # fmt: skip
        text = json.dumps(header).encode()
        assert len(text) < HEADER_BYTES, "too many arrays for one header"
        self._file.seek(0)
        self._file.write(text.ljust(HEADER_BYTES - 1) + b"\n")


def cached_arrays(
    folder: Path, kind: str, source: Mapping[str, object], build: Callable[[ArrayWriter], None]
) -> Arrays:
    """The arrays that `build` writes, from the cache when the same `source` was built before.

    Args:
        folder: where cache files are; made when missing. See `cache_folder`.
        kind: first part of the file's name, for people who look into the folder.
        source: all that the arrays depend on, as JSON-able values: another value is another file.
        build: writes the arrays; called only when no intact file is there.

    Returns:
        Read-only memory maps by name.

    Raises:
        RunError: the cache cannot be written (no permission, disk full). Errors of `build` pass through.
    """
    text = json.dumps({"format": FORMAT, **source}, sort_keys=True)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    path = folder / f"{kind}-{fingerprint[:24]}.arrays"
    arrays = read_arrays(path, fingerprint)
    if arrays is not None:
        return arrays
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            arrays = read_arrays(path, fingerprint)  # another process may have built it while this one waited
            if arrays is None:
                _build(path, fingerprint, build)
                arrays = read_arrays(path, fingerprint)
    except OSError as error:
        raise RunError(
            f"cannot write the data cache {path}: {error.strerror or error}. "
            f"Free some space there, or name another folder with cache= or $LEANTRAIN_CACHE"
        ) from error
    if arrays is None:
        raise RunError(f"the data cache {path} is damaged right after it was written; is the disk faulty?")
    return arrays


def cache_folder(cache: str | None) -> Path:
    """The folder named by `cache`, else by $LEANTRAIN_CACHE, else `~/.cache/leantrain`."""
    named = cache or os.environ.get("LEANTRAIN_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "leantrain"


def read_arrays(path: Path, fingerprint: str) -> Arrays | None:
    """Memory maps of the arrays in `path`; None if the file is missing, damaged or holds something else."""
    header = _read_header(path)
    if header is None:
        return None
    arrays: Arrays = {}
    try:
        if (header["format"], header["fingerprint"]) != (FORMAT, fingerprint):
            return None
        if header["bytes"] != path.stat().st_size:
            event("damaged_data_cache")
            return None
        for section in header["arrays"]:
            array = _map(path, section)
            if _crc(array) != section["crc"]:
                event("damaged_data_cache")
                return None
            arrays[section["name"]] = array
    except (KeyError, TypeError, ValueError, OSError):
        event("damaged_data_cache")
        return None
    return arrays


def _read_header(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(HEADER_BYTES))
    except (OSError, ValueError):  # missing; or not JSON, or not text
        return None
    return header if isinstance(header, dict) else None


def _map(path: Path, section: Section) -> NDArray[Any]:
    shape, dtype = tuple(section["shape"]), np.dtype(section["dtype"])
    if math.prod(shape) == 0:  # nothing can be mapped
        return np.empty(shape, dtype)
    mapped = np.memmap(path, dtype=dtype, mode="r", offset=section["offset"], shape=shape)
    return mapped.view(np.ndarray)  # the plain class slices several times faster; the map lives on as its base


def _crc(array: NDArray[Any]) -> int:
    flat = array.reshape(-1).view(np.uint8)
    crc = 0
    for start in range(0, len(flat), CHECK_BYTES):
        crc = zlib.crc32(flat[start : start + CHECK_BYTES].data, crc)
    return crc


def _build(path: Path, fingerprint: str, build: Callable[[ArrayWriter], None]) -> None:
    with whole_file(path) as aside, aside.open("wb") as file:
        writer = ArrayWriter(file)
        build(writer)
        writer.finish(fingerprint)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock named `path` while the block runs. The system lets go of it when the process dies."""
    if sys.platform == "win32":  # without a lock both may build: the same bytes, whole
        yield
        return
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
