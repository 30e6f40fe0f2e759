"""The idx format of MNIST and of all that imitates it: Fashion-MNIST, KMNIST, EMNIST, QMNIST."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leantrain.data.examples import Table
from leantrain.data.images import Images
from leantrain.errors import RunError, UsageError

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
UINT8 = 8


class Idx(Images):
    """Images and labels in the four files of MNIST, each plain or gzipped (`.gz`).

    Args:
        path: the folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and, for evaluation,
            `t10k-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`.
        held_out: None evaluates on the test files (on a tenth of the training images where there are none); a
            fraction in (0, 1) evaluates on that part of the training images and leaves the test files alone, as
            tuning should.

    Raises:
        UsageError: the folder or a training file is missing, or `held_out` is not allowed.
        RunError: a file is damaged, truncated or not idx, or images and labels differ in number.
    """

    def __init__(self, path: str, held_out: float | None = None) -> None:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise UsageError(f"no idx files at path={path!r}: there is no such folder")
        train = _part(folder, "train")
        if train is None:
            raise UsageError(f"path={path!r} lacks {' and '.join(FILES['train'])} (each may end in .gz)")
        test = _part(folder, "test")
        if test is not None and test[0].shape[1:] != train[0].shape[1:]:
            raise RunError(f"{path}: training images are {train[0].shape[2:]}, test images {test[0].shape[2:]}")
        table = Table.of_parts(*train, test, held_out)
        classes = int(max(labels.max(initial=0) for _, labels in (train, test or train))) + 1
        super().__init__(table, [str(number) for number in range(classes)], path)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of bytes in an idx file, gzipped if its name ends in `.gz`.

    Raises:
        RunError: it cannot be read, is not an idx file of uint8, or does not have the size its header says.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, OSError) as error:
        raise RunError(f"{path} is damaged or truncated: {error}") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != UINT8 or len(data) < 4 + 4 * data[3]:
        raise RunError(f"{path} is not an idx file of uint8: it begins with {data[:4].hex(' ') or 'nothing'}")
    axes = data[3]
    shape = struct.unpack(f">{axes}I", data[4 : 4 + 4 * axes])
    found, expected = len(data) - 4 - 4 * axes, math.prod(shape)
    if found != expected:
        raise RunError(f"{path} is damaged: its header promises {shape} = {expected} bytes, it holds {found}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _part(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[Any]] | None:
    """Images [N, 1, H, W] uint8 and labels [N] int64, or None if one of the two files is not there."""
    paths = [_plain_or_gz(folder, name) for name in FILES[part]]
    if paths[0] is None or paths[1] is None:
        return None
    images, labels = read_idx(paths[0]), read_idx(paths[1])
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise RunError(f"{paths[0]} and {paths[1]} do not match: shapes {images.shape} and {labels.shape}")
    return images[:, None], labels.astype(np.int64)


def _plain_or_gz(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
