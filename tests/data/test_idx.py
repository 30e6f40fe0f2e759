"""The four files of MNIST, whole, gzipped and damaged."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from leantrain.data import Idx
from leantrain.data.idx import FILES, read_idx
from leantrain.errors import RunError, UsageError


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(folder: Path, part: str, images: np.ndarray, labels: np.ndarray, compress: bool = False) -> None:
    for name, array in zip(FILES[part], (images, labels), strict=True):
        data = idx_bytes(array)
        path = folder / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(data) if compress else data)


def pictures(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 6, 6), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "train", *pictures(40))
    write(tmp_path, "test", *pictures(12, seed=1))
    return tmp_path


@pytest.mark.parametrize("compress", [False, True])
def test_files_are_read_plain_or_gzipped(tmp_path: Path, compress: bool) -> None:
    write(tmp_path, "train", *pictures(40), compress)
    write(tmp_path, "test", *pictures(12, seed=1), compress)
    data = Idx(str(tmp_path))
    assert data.train_size == 40
    assert data.spec == {"channels": 1, "image_size": 6, "features": 36, "classes": 4}
    batch = data.train_batch(0, 0, 40)
    images = pictures(40)[0][batch.ids][:, None]
    restored = (batch.inputs * data.std + data.mean).round().to(torch.uint8)
    np.testing.assert_array_equal(restored, images)
    torch.testing.assert_close(batch.targets, batch.ids % 4)


def test_the_test_files_are_held_out(folder: Path) -> None:
    data = Idx(str(folder))
    (batch,) = data.eval_batches(100)
    restored = (batch.inputs * data.std + data.mean).round().to(torch.uint8)
    np.testing.assert_array_equal(restored[:, 0], pictures(12, seed=1)[0])


def test_a_fraction_holds_out_training_images_and_leaves_the_test_files_alone(folder: Path) -> None:
    data = Idx(str(folder), held_out=0.25)
    (batch,) = data.eval_batches(100)
    assert (data.train_size, len(batch)) == (30, 10)
    assert batch.ids.max() < 40


def test_without_test_files_a_tenth_of_the_training_images_is_held_out(tmp_path: Path) -> None:
    write(tmp_path, "train", *pictures(40))
    assert Idx(str(tmp_path)).train_size == 36


def test_a_missing_folder_or_file_is_refused_by_name(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"no idx files at path='.*absent'"):
        Idx(str(tmp_path / "absent"))
    (folder / FILES["train"][1]).unlink()
    with pytest.raises(UsageError, match="lacks train-images-idx3-ubyte and train-labels-idx1-ubyte"):
        Idx(str(folder))


def test_a_truncated_file_is_damaged(folder: Path) -> None:
    path = folder / FILES["train"][0]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RunError, match=r"train-images-idx3-ubyte is damaged: .*\(40, 6, 6\) = 1440 bytes.* holds 1435"):
        Idx(str(folder))


@pytest.mark.parametrize("keep", [0, 5, 20, -1])
def test_a_truncated_gzip_file_is_damaged(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx_bytes(pictures(40)[0]))[:keep])
    with pytest.raises(RunError, match=r"images\.gz is"):
        read_idx(path)


@pytest.mark.parametrize("data", [b"", b"\0\0\x0d\x01\0\0\0\0", b"PNG.....", b"\0\0\x08\x03\0\0"])
def test_a_file_that_is_not_idx_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(RunError, match="is not an idx file of uint8: it begins with"):
        read_idx(path)


def test_images_and_labels_that_differ_in_number_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "train", pictures(40)[0], pictures(39)[1])
    with pytest.raises(RunError, match=r"do not match: shapes \(40, 6, 6\) and \(39,\)"):
        Idx(str(tmp_path))


def test_test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "train", *pictures(40))
    write(tmp_path, "test", np.zeros((3, 5, 5), np.uint8), np.zeros(3, np.uint8))
    with pytest.raises(RunError, match=r"training images are \(6, 6\), test images \(5, 5\)"):
        Idx(str(tmp_path))
