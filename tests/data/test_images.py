"""Images: normalised by the training part, and augmented as a pure function of (seed, step)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from leantrain.data.examples import Table
from leantrain.data.images import Images, channel_statistics, crop_and_flip


def pixels(count: int = 60, size: tuple[int, int, int] = (3, 8, 8)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *size), dtype=np.uint8)


def images(augment: bool = False) -> Images:
    labels = np.arange(60) % 2
    return Images(Table(pixels(), labels, np.arange(50), np.arange(50, 60)), ["a", "b"], "noise", augment)


def test_training_images_have_mean_zero_and_variance_one_in_every_channel() -> None:
    batch = images().train_batch(0, 0, 50)
    assert batch.inputs.dtype == torch.float32
    torch.testing.assert_close(batch.inputs.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(batch.inputs.std((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-6)


def test_statistics_are_of_the_rows_given_and_equal_numpys_however_they_are_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = np.array([3, 4, 59, 7, 11])
    for chunk in (1, 2, 100):
        monkeypatch.setattr("leantrain.data.images.CHUNK", chunk)
        mean, std = channel_statistics(pixels(), rows)
        np.testing.assert_allclose(mean.flatten(), pixels()[rows].mean((0, 2, 3)), rtol=1e-6)
        np.testing.assert_allclose(std.flatten(), pixels()[rows].std((0, 2, 3)), rtol=1e-6)


def test_a_constant_channel_is_not_divided_by_zero() -> None:
    _, std = channel_statistics(np.full((4, 1, 2, 2), 7, np.uint8), np.arange(4))
    assert std.item() == 1


def test_a_model_learns_the_shape_from_the_spec() -> None:
    assert images().spec == {"channels": 3, "image_size": 8, "features": 192, "classes": 2}
    table = Table(pixels(4, (1, 6, 8)), np.array([0, 1, 0, 1]), np.arange(3), np.array([3]))
    assert Images(table, ["a", "b"], "flat").spec["image_size"] == (6, 8)


def test_augmentation_is_a_pure_function_of_seed_and_step() -> None:
    data, other = images(augment=True), images(augment=True)
    forward = [data.train_batch(1, step, 10).inputs for step in range(6)]
    backward = [other.train_batch(1, step, 10).inputs for step in reversed(range(6))][::-1]
    assert all(torch.equal(left, right) for left, right in zip(forward, backward, strict=True))
    batch = torch.randn(10, 3, 8, 8)
    assert not torch.equal(crop_and_flip(batch, 1, 0), crop_and_flip(batch, 2, 0))
    assert not torch.equal(crop_and_flip(batch, 1, 0), crop_and_flip(batch, 1, 1))


def test_augmentation_leaves_order_targets_and_held_out_images_alone() -> None:
    plain, augmented = images().train_batch(0, 0, 50), images(augment=True).train_batch(0, 0, 50)
    assert torch.equal(plain.ids, augmented.ids) and torch.equal(plain.targets, augmented.targets)
    assert not torch.equal(plain.inputs, augmented.inputs)
    for left, right in zip(images().eval_batches(4), images(augment=True).eval_batches(4), strict=True):
        assert torch.equal(left.inputs, right.inputs)


def test_every_augmented_image_is_a_shift_of_itself_or_of_its_mirror_image() -> None:
    batch = torch.randn(200, 2, 8, 8)
    seen = set()
    for before, after in zip(batch, crop_and_flip(batch, 0, 0), strict=True):
        shifts = {}
        for flip in (False, True):
            padded = torch.nn.functional.pad(before, (1, 1, 1, 1))
            for top in range(3):
                for left in range(3):
                    crop = padded[:, top : top + 8, left : left + 8]
                    shifts[top, left, flip] = crop.flip(-1) if flip else crop
        matches = [shift for shift, image in shifts.items() if torch.equal(image, after)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 18  # 200 draws miss one of 18 with probability 2e-4, and the draw is fixed
