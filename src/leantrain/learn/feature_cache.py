"""Features of examples, computed once and kept: what frozen layers make of an example does not change.

Saves every later forward pass through the frozen layers; costs, for N examples with features of F bytes, N * F bytes of
main memory or disk. What is given back is bit for bit what was kept.

    folder/manifest.json   the key, dtype and shape
    folder/features.bin    one example's features after the other's
    folder/index.bin       for each: its id, a fingerprint of its inputs, the CRC-32 of its features; 20 bytes
    folder/lock            held while the cache is open

A row counts once its index entry is there, so whatever a kill leaves behind is whole rows and half an entry at most.
Rows of an earlier process are checked when they are first read; one that does not hold is computed again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leantrain.atomic import write_text
from leantrain.errors import RunError, UsageError

if sys.platform != "win32":
    import fcntl

SCHEMA = 1


class FeatureCache:
    """What `compute` makes of examples, kept by their ids.

    Args:
        key: of all that the features depend on beside the example: `fingerprint` of the frozen layers' tensors, say.
        folder: where to keep them; None: in main memory. Of one cache alone, and of one process at a time.
        dtype: what to keep them in. None: their own, bit for bit. Another one rounds them, also those just computed, so
            that an example's features do not depend on whether they were there.
        replace: whether a cache of another key in `folder` is thrown away rather than refused.

    Raises:
        UsageError: `folder` holds a cache of another key, something that is no cache, or is in use.
        RunError: the folder cannot be written.

    Examples:
        cache = FeatureCache(fingerprint(frozen.state_dict().items()), folder="features")
        features = cache.features(batch.ids, batch.inputs, frozen)
    """

    def __init__(
        self, key: str, folder: Path | str | None = None, *, dtype: torch.dtype | None = None, replace: bool = False
    ) -> None:
        self._dtype = dtype
        self._rows: _Rows = _InMemory() if folder is None else _OnDisk(Path(folder), key, dtype, replace)
        self._like: Tensor | None = None
        """[0, ...] what `compute` returns, for its dtype and device."""
        self._multipliers = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        """The number of examples that are kept."""
        return len(self._rows.place)

    @property
    def nbytes(self) -> int:
        """What their features take."""
        return self._rows.nbytes

    def features(self, ids: Tensor, inputs: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """The features of a batch, from the cache if it has all of them.

        If not, all are computed, so that every kernel sees the shapes it would see without a cache, and the missing
        ones are kept.

        Args:
            ids: [B] int64, which examples these are.
            inputs: [B, ...] what they are.
            compute: called with `inputs`, returns [B, ...] floating-point features.

        Returns:
            [B, ...] features in the dtype and on the device that `compute` returns them in: a copy.

        Raises:
            UsageError: an example has other inputs than when it was kept, as with augmentation or another data set;
                or features of another shape than those before.
            RunError: the disk is full or otherwise unwilling. The rows that were kept before are still there.
        """
        numbers, prints = ids.tolist(), self._prints(inputs)
        rows = self._rows
        known = [rows.place.get(number, -1) for number in numbers]
        for number, place, found in zip(numbers, known, prints, strict=True):
            if place >= 0 and rows.prints[place] != found:
                raise UsageError(
                    f"example {number} has other inputs than when its features were kept: features of augmented "
                    'examples cannot be cached, nor of another data set in the same folder; use cache="recompute"'
                )
        kept = self._kept(numbers)
        if kept is None or self._like is None:  # which a reopened cache learns from its first batch
            computed = compute(inputs).detach()
            self._like = computed[:0]
            stored = computed.to("cpu", self._dtype or computed.dtype)
            first = {number: at for at, number in reversed(list(enumerate(numbers)))}
            missing = sorted(at for number, at in first.items() if number not in rows.place)
            if missing:
                rows.append([numbers[at] for at in missing], [prints[at] for at in missing], stored[missing])
            kept = self._kept(numbers)
            assert kept is not None
        return kept.to(self._like.device).to(self._like.dtype)

    def close(self) -> None:
        """Let go of files and memory. What is on the disk stays."""
        self._rows.close()
        self._rows = _InMemory()

    def _kept(self, numbers: Sequence[int]) -> Tensor | None:
        """[B, ...] rows that are all there and hold, or None."""
        places = [self._rows.place.get(number, -1) for number in numbers]
        if -1 in places:
            return None
        for number, place in zip(numbers, places, strict=True):
            if not self._rows.holds(place):
                self._rows.place.pop(number, None)
        return None if any(number not in self._rows.place for number in numbers) else self._rows.read(places)

    def _prints(self, inputs: Tensor) -> list[int]:
        """A 64-bit number for every example's inputs: their words times random odd numbers, modulo 2^64. Two examples
        that differ have the same one with a probability of at most 2^-31."""
        flat = inputs.detach().contiguous().reshape(len(inputs), -1).view(torch.uint8)
        wide = flat.shape[1] % 4 == 0 and flat.storage_offset() % 4 == 0
        words = (flat.view(torch.int32) if wide else flat).long()
        if self._multipliers.shape != words.shape[1:] or self._multipliers.device != words.device:
            drawn = torch.randint(-(2**62), 2**62, words.shape[1:], generator=torch.Generator().manual_seed(0))
            self._multipliers = (2 * drawn + 1).to(words.device)
        prints: list[int] = (words * self._multipliers).sum(1).tolist()
        return prints


def fingerprint(tensors: Iterable[tuple[str, Tensor]], *more: str) -> str:
    """A hash of tensors with their names, dtypes and shapes, and of further words: 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name}/{tensor.dtype}/{list(tensor.shape)}/".encode())
        digest.update(_bytes_of(tensor).data)
    digest.update("/".join(more).encode())
    return digest.hexdigest()


class _Rows(Protocol):
    """Where features are kept, in the order in which they came."""

    place: dict[int, int]
    """Of an id: the number of its row."""
    prints: list[int]
    """Of every row: the fingerprint of the inputs."""

    @property
    def nbytes(self) -> int: ...
    def append(self, ids: Sequence[int], prints: Sequence[int], rows: Tensor) -> None: ...
    def holds(self, place: int) -> bool: ...
    def read(self, places: Sequence[int]) -> Tensor: ...
    def close(self) -> None: ...


class _InMemory:
    def __init__(self) -> None:
        self.place: dict[int, int] = {}
        self.prints: list[int] = []
        self._rows: list[Tensor] = []  # views of one tensor per batch that came

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self._rows)

    def append(self, ids: Sequence[int], prints: Sequence[int], rows: Tensor) -> None:
        if self._rows:
            _must_be_alike(rows[0].dtype, rows.shape[1:], self._rows[0].dtype, self._rows[0].shape)
        self.place.update(zip(ids, range(len(self._rows), len(self._rows) + len(ids)), strict=True))
        self.prints += prints
        self._rows += rows.unbind()

    def holds(self, place: int) -> bool:
        return True

    def read(self, places: Sequence[int]) -> Tensor:
        return torch.stack([self._rows[place] for place in places])

    def close(self) -> None:
        pass


_FILES = {"manifest.json", "features.bin", "index.bin", "lock"}
_ENTRY = np.dtype([("id", "<i8"), ("inputs", "<i8"), ("crc", "<u4")])


class _OnDisk:
    """Rows in a file that is written by appending, where a full disk is an error, and read through a memory map."""

    def __init__(self, folder: Path, key: str, dtype: torch.dtype | None, replace: bool) -> None:
        self._folder, self._key, self._files = folder, key, list[BinaryIO]()
        self.place: dict[int, int] = {}
        self.prints: list[int] = []
        self._crcs: list[int] = []
        self._unchecked: set[int] = set()
        self._dtype: torch.dtype | None = None
        self._shape: tuple[int, ...] = ()
        self._map: NDArray[np.uint8] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            self._open(dtype, replace)
        except OSError as error:
            self.close()
            raise self._unwilling(error) from error
        except UsageError:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        return len(self.prints) * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self._shape)) * self._dtype.itemsize if self._dtype is not None else 0

    def append(self, ids: Sequence[int], prints: Sequence[int], rows: Tensor) -> None:
        if self._dtype is None:
            self._describe(rows.dtype, tuple(rows.shape[1:]))
        _must_be_alike(rows.dtype, rows.shape[1:], self._dtype, self._shape)
        content = _bytes_of(rows).reshape(len(rows), -1)
        crcs = [zlib.crc32(row.data) for row in content]
        entries = np.array(list(zip(ids, prints, crcs, strict=True)), dtype=_ENTRY)
        features, index = self._files[1:]
        try:
            _write_all(features, content)
            _write_all(index, entries.view(np.uint8))
        except OSError as error:
            with suppress(OSError):
                self._cut_off(len(self.prints))
            raise self._unwilling(error) from error
        self._take(entries)

    def holds(self, place: int) -> bool:
        if place in self._unchecked:
            if zlib.crc32(self._mapped(place + 1)[place].data) != self._crcs[place]:
                return False
            self._unchecked.remove(place)
        return True

    def read(self, places: Sequence[int]) -> Tensor:
        assert self._dtype is not None
        rows = torch.from_numpy(self._mapped(max(places) + 1)[list(places)])
        return rows.view(self._dtype).reshape(len(places), *self._shape)

    def close(self) -> None:
        self._map = None
        for file in self._files:
            file.close()
        self._files.clear()

    def _lock(self) -> None:
        """One process at a time. The system lets go of the lock when the process dies."""
        file = (self._folder / "lock").open("wb")
        self._files.append(file)
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"the feature cache {self._folder} is in use by another run; give each a folder of its own"
                ) from None

    def _open(self, dtype: torch.dtype | None, replace: bool) -> None:
        """Take over the rows that are there, if they are of this key."""
        manifest = self._folder / "manifest.json"
        for leftover in self._folder.glob(".manifest.json.*.tmp"):  # of a process that was killed while writing
            leftover.unlink()
        if strange := {file.name for file in self._folder.iterdir()} - _FILES:
            raise UsageError(f"{self._folder} is no feature cache: it holds {min(strange)}; give an empty folder")
        known = _read_manifest(manifest)
        same = known is not None and (known["schema"], known["key"]) == (SCHEMA, self._key)
        if known is not None and not same and not replace:
            raise UsageError(
                f"the feature cache {self._folder} is of another model: its key is {known['key']}, here it is "
                f"{self._key}; remove it or give another folder"
            )
        for name in ("features.bin", "index.bin"):
            self._files.append((self._folder / name).open("ab", buffering=0))
        if known is None or not same:
            manifest.unlink(missing_ok=True)
            self._cut_off(0)
        else:
            self._dtype, self._shape = getattr(torch, known["dtype"]), tuple(known["shape"])
            if dtype not in (None, self._dtype):
                raise UsageError(
                    f"the feature cache {self._folder} holds {known['dtype']}, not {_name(dtype)}; remove it or give "
                    "another folder"
                )
            self._take_over()

    def _take_over(self) -> None:
        """The rows that are there with their entries, and no more."""
        features, index = self._files[1:]
        whole = index.seek(0, 2) // _ENTRY.itemsize
        if self._row_bytes:
            whole = min(whole, features.seek(0, 2) // self._row_bytes)
        self._cut_off(whole)
        self._take(np.fromfile(self._folder / "index.bin", dtype=_ENTRY, count=whole))
        self._unchecked = set(range(whole))

    def _cut_off(self, rows: int) -> None:
        """Leave only the first `rows`."""
        features, index = self._files[1:]
        features.truncate(rows * self._row_bytes)
        index.truncate(rows * _ENTRY.itemsize)

    def _take(self, entries: NDArray[np.void]) -> None:
        first = len(self.prints)
        self.place.update(zip(entries["id"].tolist(), range(first, first + len(entries)), strict=True))
        self.prints += entries["inputs"].tolist()
        self._crcs += entries["crc"].tolist()

    def _describe(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._dtype, self._shape = dtype, shape
        described = {"schema": SCHEMA, "key": self._key, "dtype": _name(dtype), "shape": list(shape)}
        try:
            write_text(self._folder / "manifest.json", json.dumps(described) + "\n")
        except OSError as error:
            raise self._unwilling(error) from error

    def _mapped(self, rows: int) -> NDArray[np.uint8]:
        """[rows or more, bytes of a row]."""
        if self._map is None or len(self._map) < rows:
            shape = (len(self.prints), self._row_bytes)
            path = self._folder / "features.bin"
            mapped = np.memmap(path, np.uint8, "r", shape=shape) if self._row_bytes else np.empty(shape, np.uint8)
            self._map = mapped.view(np.ndarray)  # the plain class slices several times faster
        return self._map

    def _unwilling(self, error: OSError) -> RunError:
        return RunError(
            f"cannot write the feature cache {self._folder}: {error.strerror or error}; it holds {len(self.place)} "
            f"examples ({self.nbytes / 1e6:.1f} MB), which a run with more room goes on with"
        )


def _must_be_alike(
    dtype: torch.dtype, shape: Sequence[int], kept_dtype: torch.dtype | None, kept_shape: Sequence[int]
) -> None:
    if (dtype, tuple(shape)) != (kept_dtype, tuple(kept_shape)):
        raise UsageError(
            f"a feature cache needs features of one shape and type, got {_name(dtype)} {list(shape)} after "
            f"{_name(kept_dtype)} {list(kept_shape)}"
        )


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """None where there is none that can be read: what it belonged to is begun anew."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        usable = isinstance(getattr(torch, known["dtype"]), torch.dtype) and {"schema", "key", "shape"} <= known.keys()
        return known if usable else None
    except (FileNotFoundError, ValueError, AttributeError, KeyError, TypeError):
        return None


def _write_all(file: BinaryIO, content: NDArray[np.uint8]) -> None:
    left = np.ascontiguousarray(content).reshape(-1).data
    while left:
        left = left[file.write(left) :]


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """[bytes], without a copy where the tensor is contiguous and on the CPU."""
    flat: NDArray[np.uint8] = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
