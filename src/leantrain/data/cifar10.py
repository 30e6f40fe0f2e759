"""CIFAR-10, in its published binary files or as a tar archive of pictures."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from leantrain.data.examples import Table
from leantrain.data.image_files import read_pictures
from leantrain.data.image_folder import picture_table
from leantrain.data.images import Images
from leantrain.errors import RunError, UsageError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SIDE = 32
RECORD_BYTES = 1 + 3 * SIDE * SIDE
"""A label, then the red, green and blue planes, each row by row."""

Part = tuple[NDArray[np.uint8], NDArray[np.int64]]


class Cifar10(Images):
    """60,000 colour images of 32 x 32 in ten classes, or what part of them there is.

    Args:
        path: the folder with `data_batch_*.bin` and `test_batch.bin` (the published "binary version"; each may be
            compressed to `.bin.xz`), one such file, or a tar archive of `train/CLASS/PICTURE`, `test/CLASS/PICTURE`.
        held_out: None evaluates on the test images (on a tenth of the training images where there are none); a
            fraction in (0, 1) evaluates on that part of the training images and leaves the test images alone.
        augment: crop and mirror training images at random, as is usual for this set.
        cache: folder for decoded pictures (archives only); None is $LEANTRAIN_CACHE, or ~/.cache/leantrain.

    Raises:
        UsageError: nothing usable is at `path`, or an argument is not allowed.
        RunError: a file is damaged or truncated.
    """

    def __init__(
        self, path: str, held_out: float | None = None, augment: bool = False, cache: str | None = None
    ) -> None:
        place = Path(path).expanduser()
        if place.is_file() and ".tar" in place.suffixes:
            pictures = read_pictures(place, SIDE, 3, cache)
            if pictures.classes != CLASSES:
                raise UsageError(f"{path} holds the classes {pictures.classes}, not those of CIFAR-10")
            table = picture_table(pictures, held_out, path)
        else:
            train, test = _batch_files(place)
            table = Table.of_parts(*_joined(train), _joined(test) if test else None, held_out)
        super().__init__(table, CLASSES, path, augment)


def read_batch(path: Path) -> Part:
    """Images [N, 3, 32, 32] uint8 and labels [N] int64 of one binary batch file, plain or `.xz`.

    Raises:
        RunError: it is damaged, truncated, or not such a file.
    """
    try:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except (lzma.LZMAError, EOFError, OSError) as error:
        raise RunError(f"{path} is damaged or truncated: {error}") from error
    if not data or len(data) % RECORD_BYTES:
        raise RunError(f"{path} is damaged or truncated: {len(data)} bytes are not a multiple of {RECORD_BYTES}")
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD_BYTES)
    return records[:, 1:].reshape(-1, 3, SIDE, SIDE), records[:, 0].astype(np.int64)


def _batch_files(place: Path) -> tuple[list[Path], list[Path]]:
    """The training and the test files at `place`."""
    if place.is_file():
        return [place], []
    if not place.is_dir():
        raise UsageError(f"no CIFAR-10 at path={str(place)!r}: there is no such file or folder")
    train, test = (_plain_or_xz(place, f"{name}*") for name in ("data_batch", "test_batch"))
    if train:
        return train, test
    if (place / "data_batch_1").exists():
        raise UsageError(f"{place} holds Python pickles, which are never opened; use CIFAR-10's binary version (.bin)")
    raise UsageError(f"{place} holds no data_batch_*.bin (or .bin.xz); an archive must be named itself")


def _plain_or_xz(place: Path, pattern: str) -> list[Path]:
    """One file per batch: the plain one where both are there."""
    by_name = {path.name.removesuffix(".xz"): path for path in sorted(place.glob(f"{pattern}.bin.xz"))}
    by_name |= {path.name: path for path in sorted(place.glob(f"{pattern}.bin"))}
    return [by_name[name] for name in sorted(by_name)]


def _joined(paths: list[Path]) -> Part:
    images, labels = zip(*map(read_batch, paths), strict=True)
    return np.concatenate(images), np.concatenate(labels)
