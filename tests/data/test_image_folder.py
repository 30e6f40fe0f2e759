"""Pictures in folders and archives: classes, parts, sizes, and pictures that are none."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from leantrain.data import ImageFolder
from leantrain.errors import RunError, UsageError

Image = pytest.importorskip("PIL.Image")

COLOURS = {"blue": (0, 0, 250), "green": (0, 250, 0), "red": (250, 0, 0)}


def write(root: Path, part: str = "", count: int = 10, size: tuple[int, int] = (12, 12)) -> Path:
    for name, colour in COLOURS.items():
        folder = root / part / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", size, colour).save(folder / f"{number}.png")
    return root


def open_folder(path: Path, **options: object) -> ImageFolder:
    return ImageFolder(str(path), **{"image_size": 8, "cache": str(path.parent / "cache"), **options})  # type: ignore[arg-type]


def assert_colours_match_classes(data: ImageFolder) -> None:
    batch = data.train_batch(0, 0, data.train_size)
    pixels = (batch.inputs * data.std + data.mean).round()
    for image, label in zip(pixels, batch.targets.tolist(), strict=True):
        colour = COLOURS[data.class_names[label]]
        torch.testing.assert_close(image, torch.tensor(colour).float()[:, None, None].expand(3, 8, 8))


def test_the_folder_is_the_class(tmp_path: Path) -> None:
    data = open_folder(write(tmp_path / "pictures"))
    assert data.class_names == ["blue", "green", "red"]
    assert data.spec == {"channels": 3, "image_size": 8, "features": 192, "classes": 3}
    assert data.train_size == 27
    assert_colours_match_classes(data)


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tar.xz", "w:xz")])
def test_an_archive_gives_the_same_as_its_folder(tmp_path: Path, suffix: str, mode: str) -> None:
    folder = write(tmp_path / "pictures")
    archive = tmp_path / f"pictures{suffix}"
    with tarfile.open(archive, mode) as tar:  # type: ignore[call-overload]
        tar.add(folder, arcname="any/name")
    data = open_folder(archive)
    assert (data.class_names, data.train_size) == (["blue", "green", "red"], 27)
    assert_colours_match_classes(data)


def test_parts_are_trained_on_and_held_out(tmp_path: Path) -> None:
    root = write(write(tmp_path / "pictures", "train", 5), "test", 2)
    data = open_folder(root)
    assert (data.train_size, sum(len(batch) for batch in data.eval_batches(4))) == (15, 6)
    assert_colours_match_classes(data)
    assert open_folder(root, held_out=0.2).train_size == 12


def test_a_validation_part_comes_before_a_test_part(tmp_path: Path) -> None:
    root = write(write(write(tmp_path / "pictures", "train", 5), "test", 2), "val", 1)
    assert sum(len(batch) for batch in open_folder(root).eval_batches(4)) == 3


def test_a_picture_is_cut_to_its_middle_square_and_resized(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    (tmp_path / "pictures" / "b").mkdir(parents=True)
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 8:22] = 200  # wider than the square, because resizing looks a little beyond it
    Image.fromarray(wide).save(tmp_path / "pictures" / "a" / "wide.png")
    Image.new("RGB", (3, 5), (200, 200, 200)).save(tmp_path / "pictures" / "b" / "tall.png")
    data = open_folder(tmp_path / "pictures", held_out=0.5)
    np.testing.assert_array_equal(data.table.inputs, np.full((2, 3, 8, 8), 200, np.uint8))


def test_grey_is_one_channel(tmp_path: Path) -> None:
    data = open_folder(write(tmp_path / "pictures"), channels=1)
    assert data.train_batch(0, 0, 4).inputs.shape == (4, 1, 8, 8)


def test_pictures_are_decoded_once_until_one_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "pictures")
    first = open_folder(root)
    opened = []
    monkeypatch.setattr(Image, "open", lambda *args: opened.append(args))
    again = open_folder(root)
    assert not opened
    np.testing.assert_array_equal(first.table.inputs, again.table.inputs)
    monkeypatch.undo()
    Image.new("RGB", (12, 12), (9, 9, 9)).save(root / "red" / "new.png")
    assert len(open_folder(root).table.inputs) == 31


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"not a picture"])
def test_a_damaged_picture_is_named(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    root = write(tmp_path / "pictures", size=(64, 64))
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(noise, "PNG")
    (root / "green" / "3.png").write_bytes(damage(noise.getvalue()))
    with pytest.raises(RunError, match=r"the picture green/3\.png in .* is damaged"):
        open_folder(root)


def test_a_truncated_archive_is_damaged(tmp_path: Path) -> None:
    archive = tmp_path / "pictures.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(write(tmp_path / "pictures"), arcname=".")
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(RunError, match="damaged or truncated"):
        open_folder(archive)


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pictures.tar").write_text("not an archive" * 100)
    with pytest.raises(RunError, match="is not a tar archive"):
        open_folder(tmp_path / "pictures.tar")


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "readme.txt").write_text("none here")
    with pytest.raises(UsageError, match=r"holds no pictures \(\.png"):
        open_folder(tmp_path / "pictures")


def test_a_picture_outside_all_classes_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "pictures")
    Image.new("RGB", (4, 4)).save(root / "stray.png")
    with pytest.raises(UsageError, match=r"the picture stray\.png in .* lies in no class folder"):
        open_folder(root)


def test_parts_mixed_with_no_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found no part, train"):
        open_folder(write(write(tmp_path / "pictures", "train"), ""))


def test_a_class_that_is_only_evaluated_is_refused(tmp_path: Path) -> None:
    root = write(write(tmp_path / "pictures", "train", 2), "val", 1)
    (root / "val" / "violet").mkdir()
    Image.new("RGB", (4, 4)).save(root / "val" / "violet" / "0.png")
    with pytest.raises(UsageError, match=r"class 'violet' of .* is in val but not in train"):
        open_folder(root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size must be >= 1 pixel, got 0"),
        ({"channels": 2}, r"channels must be 1 \(grey\) or 3 \(colour\), got 2"),
        ({"held_out": 1.0}, "held_out must be a fraction"),
    ],
)
def test_an_argument_that_is_not_allowed_is_refused_by_name(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_folder(write(tmp_path / "pictures", count=2), **options)
