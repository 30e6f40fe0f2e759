"""Images in memory as bytes, given out as float32 with mean 0 and variance 1 over the training part."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leantrain.data.examples import Examples, Table
from leantrain.data.order import Rows, Stream, raw
from leantrain.data.protocol import Spec

CHUNK = 2048


class Images(Examples):
    """Classified images. Inputs are [B, C, H, W] float32: (pixel - mean) / std of their channel.

    Args:
        table: pixels [N, C, H, W] uint8 and classes [N] int64.
        classes: names of the classes in the order of their numbers.
        name: of the data, for errors.
        augment: crop training images at random after padding them with the mean colour by an eighth of their
            size, and mirror every second one; a pure function of (seed, step). Held-out images stay as they are.
    """

    def __init__(self, table: Table, classes: list[str], name: str, augment: bool = False) -> None:
        _, channels, height, width = table.inputs.shape
        spec: Spec = {
            "channels": channels,
            "image_size": height if height == width else (height, width),
            "features": channels * height * width,
            "classes": len(classes),
        }
        super().__init__(table, "classification", spec, name)
        self.class_names = classes
        self.augment = augment
        self.mean, self.std = channel_statistics(table.inputs, table.train)

    def prepared(self, inputs: NDArray[Any]) -> Tensor:
        """[B, C, H, W] uint8 to normalised float32."""
        return torch.from_numpy(inputs).float().sub_(self.mean).div_(self.std)

    def augmented(self, inputs: Tensor, seed: int, step: int) -> Tensor:
        """[B, C, H, W] to the same shape: cropped and mirrored where `augment` is set."""
        return crop_and_flip(inputs, seed, step) if self.augment else inputs


def channel_statistics(pixels: NDArray[np.uint8], rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over the given rows, as [C, 1, 1] float32.

    The sums are exact integers, so the result depends neither on the order of rows nor on the machine. The deviation
    of a constant channel is given as 1.
    """
    channels = pixels.shape[1]
    total, squares, count = np.zeros(channels, np.int64), np.zeros(channels, np.int64), 0
    for start in range(0, len(rows), CHUNK):
        chunk = pixels[rows[start : start + CHUNK]]
        total += chunk.sum(axis=(0, 2, 3), dtype=np.int64)
        squares += np.square(chunk, dtype=np.uint16).sum(axis=(0, 2, 3), dtype=np.int64)
        count += chunk[:, 0].size
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    std[std < 1e-6] = 1
    return _per_channel(mean), _per_channel(std)


def crop_and_flip(images: Tensor, seed: int, step: int) -> Tensor:
    """[B, C, H, W] to the same shape: each image shifted by up to H // 8 and W // 8 pixels, and maybe mirrored."""
    count, channels, height, width = images.shape
    pad_y, pad_x = height // 8, width // 8
    draws = raw(Stream.AUGMENT, seed, step, 3 * count).reshape(3, count)
    choices = np.array([[2 * pad_y + 1], [2 * pad_x + 1], [2]], np.uint64)
    top, left, flip = torch.from_numpy((draws % choices).astype(np.int64))
    padded = torch.nn.functional.pad(images, (pad_x, pad_x, pad_y, pad_y))
    across = torch.arange(width)
    columns = left[:, None] + torch.where(flip[:, None] == 1, width - 1 - across, across)
    lines = top[:, None] + torch.arange(height)
    image, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)[:, None, None]
    return padded[image, channel, lines[:, None, :, None], columns[:, None, None, :]]


def _per_channel(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))[:, None, None]
