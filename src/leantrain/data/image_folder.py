"""Pictures sorted into one folder per class, loose or in a tar archive."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from leantrain.data.examples import Table
from leantrain.data.image_files import NO_PART, PARTS, Pictures, read_pictures
from leantrain.data.images import Images
from leantrain.data.order import split_rows
from leantrain.errors import UsageError


class ImageFolder(Images):
    """`CLASS/PICTURE`, or `train/CLASS/PICTURE` beside `val/` or `test/`, in a folder or a tar archive.

    Pictures are decoded once (by Pillow), cut to their middle square, resized, and kept in the cache as bytes.

    Args:
        path: the folder or archive.
        image_size: side of the square in pixels, >= 1.
        channels: 3 (colour) or 1 (grey).
        held_out: None evaluates on the part `val` (`valid`, `validation`), or on `test` where there is no such part,
            or on a tenth of the pictures where there are no parts. A fraction in (0, 1) evaluates on that part of the
            training pictures.
        augment: crop and mirror training pictures at random.
        cache: folder for the decoded pictures; None is $LEANTRAIN_CACHE, or ~/.cache/leantrain.

    Raises:
        UsageError: an argument is not allowed, there are no pictures, the parts are not as above, or Pillow is not
            installed.
        RunError: a picture or the archive is damaged, or the cache cannot be written.
    """

    def __init__(
        self,
        path: str,
        image_size: int = 64,
        channels: int = 3,
        held_out: float | None = None,
        augment: bool = False,
        cache: str | None = None,
    ) -> None:
        if image_size < 1:
            raise UsageError(f"image_size must be >= 1 pixel, got {image_size}")
        if channels not in (1, 3):
            raise UsageError(f"channels must be 1 (grey) or 3 (colour), got {channels}")
        pictures = read_pictures(Path(path).expanduser(), image_size, channels, cache)
        super().__init__(picture_table(pictures, held_out, path), pictures.classes, path, augment)


def picture_table(pictures: Pictures, held_out: float | None, name: str) -> Table:
    """Decide by their parts which pictures are trained on and which are held out. See `ImageFolder`.

    Raises:
        UsageError: only some pictures lie in a part, there is no part `train`, or a held-out class is never trained.
    """
    found = {PARTS[part] if part != NO_PART else "" for part in np.unique(pictures.parts).tolist()}
    if found != {""} and ("" in found or "train" not in found):
        parts = ", ".join(sorted(part or "no part" for part in found))
        raise UsageError(f"all pictures of {name} must lie in parts, with train among them, or none; found {parts}")
    train = np.flatnonzero((pictures.parts == NO_PART) | (pictures.parts == PARTS.index("train")))
    evaluated = next((part for part in PARTS[1:] if part in found), None)
    if held_out is None and evaluated is not None:
        held = np.flatnonzero(pictures.parts == PARTS.index(evaluated))
        unknown = np.setdiff1d(pictures.labels[held], pictures.labels[train])
        if len(unknown):
            raise UsageError(f"class {pictures.classes[unknown[0]]!r} of {name} is in {evaluated} but not in train")
    else:
        chosen, rest = split_rows(len(train), 0.1 if held_out is None else held_out)
        train, held = train[chosen], train[rest]
    return Table(pictures.pixels, pictures.labels, train, held)
