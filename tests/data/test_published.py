"""The published data sets themselves: counts, statistics and splits as their authors state them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from leantrain.data import Cifar10, Csv, Idx, Text


@pytest.mark.parametrize(("name", "mean", "std"), [("mnist", 0.1307, 0.3081), ("fashion-mnist", 0.2860, 0.3530)])
def test_mnist_and_fashion_mnist_have_their_published_statistics(
    data_folder: Path, name: str, mean: float, std: float
) -> None:
    data = Idx(str(data_folder / name))
    assert data.train_size == 60_000
    assert data.spec == {"channels": 1, "image_size": 28, "features": 784, "classes": 10}
    assert len(data.table.held_out) == 10_000
    assert data.mean.item() / 255 == pytest.approx(mean, abs=5e-5)
    assert data.std.item() / 255 == pytest.approx(std, abs=5e-5)
    assert torch.bincount(torch.from_numpy(data.table.targets)).min() > 6000


def test_the_first_cifar10_images_have_the_published_labels(data_folder: Path) -> None:
    data = Cifar10(str(data_folder / "cifar10"))
    assert data.table.targets[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert (data.train_size, len(data.table.held_out)) == (3600, 400)
    torch.testing.assert_close(data.mean.flatten() / 255, torch.tensor([0.491, 0.482, 0.447]), rtol=0, atol=5e-3)


def test_tiny_shakespeare_is_cut_at_nine_tenths(data_folder: Path, tmp_path: Path) -> None:
    data = Text(str(data_folder / "tinyshakespeare"), cache=str(tmp_path))
    assert len(data.train_tokens) - 1 == 1_003_854
    assert len(data.held_out_tokens) - 1 == 1_115_394 - 1_003_854
    assert data.train_tokens[:14].tobytes() == b"First Citizen:"


def test_wikitext_is_split_by_file(data_folder: Path, tmp_path: Path) -> None:
    data = Text(str(data_folder / "wikitext-2"), cache=str(tmp_path))
    sizes = {1_121_681 + 1, 1_256_449 + 1}
    assert {len(data.train_tokens), len(data.held_out_tokens)} == sizes


def test_abalone_is_a_regression_on_ten_features(data_folder: Path) -> None:
    data = Csv(str(data_folder / "tabular" / "abalone.csv"), task="regression")
    assert data.spec == {"features": 10, "outputs": 1}
    assert len(data.table.inputs) == 4177


def test_adult_is_read_from_its_two_files(data_folder: Path) -> None:
    folder = data_folder / "tabular"
    data = Csv(str(folder / "adult-train.csv"), held_out_path=str(folder / "adult-test.csv"))
    assert data.class_names == ["<=50K", ">50K"]
    assert torch.bincount(torch.from_numpy(data.table.targets[data.table.train])).tolist() == [24_720, 7_841]
    assert torch.bincount(torch.from_numpy(data.table.targets[data.table.held_out])).tolist() == [12_435, 3_846]
