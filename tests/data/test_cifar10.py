"""CIFAR-10's binary batches, plain and compressed, and the archive of pictures."""

from __future__ import annotations

import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from leantrain.data import Cifar10
from leantrain.data.cifar10 import CLASSES
from leantrain.errors import RunError, UsageError


def records(count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).integers(0, 256, (count, 3073), dtype=np.uint8)
    rows[:, 0] = np.arange(count) % 10
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(1, 4):
        (tmp_path / f"data_batch_{number}.bin").write_bytes(records(20, number).tobytes())
    (tmp_path / "test_batch.bin").write_bytes(records(10, 9).tobytes())
    return tmp_path


def test_batches_are_read_in_order_and_the_test_batch_is_held_out(folder: Path) -> None:
    data = Cifar10(str(folder))
    assert data.train_size == 60
    assert data.spec == {"channels": 3, "image_size": 32, "features": 3072, "classes": 10}
    expected = np.concatenate([records(20, 1), records(20, 2), records(20, 3), records(10, 9)])
    np.testing.assert_array_equal(data.table.inputs.reshape(70, -1), expected[:, 1:])
    np.testing.assert_array_equal(data.table.targets, expected[:, 0])
    assert data.table.held_out.tolist() == list(range(60, 70))


def test_planes_are_red_green_blue(tmp_path: Path) -> None:
    rows = records(10)
    rows[:, 1:1025], rows[:, 1025:2049], rows[:, 2049:] = 200, 100, 50
    (tmp_path / "data_batch_1.bin").write_bytes(rows.tobytes())
    data = Cifar10(str(tmp_path))
    torch.testing.assert_close(data.mean.flatten(), torch.tensor([200.0, 100.0, 50.0]))


def test_compressed_batches_are_read_once_and_a_part_is_split(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1.bin.xz").write_bytes(lzma.compress(records(20).tobytes()))
    assert Cifar10(str(tmp_path)).train_size == 18
    assert Cifar10(str(tmp_path / "data_batch_1.bin.xz"), held_out=0.5).train_size == 10
    (tmp_path / "data_batch_1.bin").write_bytes(records(20).tobytes())
    assert Cifar10(str(tmp_path)).train_size == 18


def test_augmentation_changes_training_images_only(folder: Path) -> None:
    plain, augmented = Cifar10(str(folder)), Cifar10(str(folder), augment=True)
    assert not torch.equal(plain.train_batch(0, 0, 8).inputs, augmented.train_batch(0, 0, 8).inputs)
    assert torch.equal(next(plain.eval_batches(8)).inputs, next(augmented.eval_batches(8)).inputs)


def write_pictures(root: Path, classes: list[str]) -> Path:
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "test"):
        for number, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            image.new("RGB", (32, 32), (number, 0, 0)).save(root / part / name / "0.png")
    archive = root.with_suffix(".tar.xz")
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(root, arcname=".")
    return archive


def test_an_archive_of_pictures_is_numbered_like_the_published_labels(tmp_path: Path) -> None:
    data = Cifar10(str(write_pictures(tmp_path / "pictures", CLASSES)), cache=str(tmp_path))
    assert data.train_size == 10
    batch = data.train_batch(0, 0, 10)
    red = (batch.inputs * data.std + data.mean)[:, 0, 0, 0].round().long()
    assert torch.equal(red, batch.targets)


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not those of CIFAR-10"):
        Cifar10(str(write_pictures(tmp_path / "pictures", ["cat", "dog"])), cache=str(tmp_path))


def test_a_truncated_batch_is_damaged(folder: Path) -> None:
    path = folder / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"data_batch_2\.bin is damaged or truncated: 61459 bytes"):
        Cifar10(str(folder))


def test_a_truncated_compressed_batch_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1.bin.xz").write_bytes(lzma.compress(records(20).tobytes())[:-50])
    with pytest.raises(RunError, match=r"data_batch_1\.bin\.xz is damaged or truncated"):
        Cifar10(str(tmp_path))


def test_a_label_out_of_range_is_damaged(tmp_path: Path) -> None:
    rows = records(20)
    rows[3, 0] = 10
    (tmp_path / "data_batch_1.bin").write_bytes(rows.tobytes())
    with pytest.raises(RunError, match=r"example 3 of .* has class 10, but classes are 0 to 9"):
        Cifar10(str(tmp_path))


def test_pickles_are_refused_and_never_opened(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x02}")
    with pytest.raises(UsageError, match="Python pickles, which are never opened"):
        Cifar10(str(tmp_path))


def test_a_missing_or_wrong_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no CIFAR-10 at path='.*absent'"):
        Cifar10(str(tmp_path / "absent"))
    with pytest.raises(UsageError, match=r"holds no data_batch_\*\.bin"):
        Cifar10(str(tmp_path))
