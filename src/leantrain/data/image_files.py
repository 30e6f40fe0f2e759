"""Pictures in a folder or a tar archive: found, decoded by Pillow, brought to one size, kept in the cache."""

from __future__ import annotations

import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from leantrain.data.cache import ArrayWriter, cache_folder, cached_arrays
from leantrain.data.documents import Document, find_documents, fingerprint
from leantrain.data.optional import need
from leantrain.errors import RunError, UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff")
PARTS = ("train", "val", "valid", "validation", "test")
NO_PART = len(PARTS)


class Pictures(NamedTuple):
    """Decoded pictures by row.

    pixels: [N, C, S, S] uint8. labels: [N] int64, the place of the class in `classes`. parts: [N] uint8, the place
    of the part in `PARTS`, or `NO_PART`. classes: names, sorted.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    parts: NDArray[np.uint8]
    classes: list[str]


def read_pictures(path: Path, image_size: int, channels: int, cache: str | None) -> Pictures:
    """Every picture below `path`, a folder or a tar archive (`.tar`, `.tar.gz`, `.tar.xz`, ...), made square.

    The folder that a picture lies in is its class; if that one lies in a folder of `PARTS`, this is its part.

    Raises:
        UsageError: nothing is at `path`, it is not a folder or an archive, or it holds no pictures.
        RunError: a picture or the archive is damaged, or the cache cannot be written.
    """
    files = find_documents(path)
    if path.is_dir():
        files = [file for file in files if _is_picture(file.name)]
    image = need("PIL.Image", "pillow", "reading pictures")
    fit = need("PIL.ImageOps", "pillow", "reading pictures").fit

    def decode(name: str, data: bytes) -> NDArray[np.uint8]:
        """[1, C, S, S]: the middle of the picture, as large a square as it has, in the size asked for."""
        try:
            with image.open(io.BytesIO(data)) as picture:
                square = fit(picture.convert("L" if channels == 1 else "RGB"), (image_size, image_size))
        except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:  # all that Pillow raises
            raise RunError(f"the picture {name} in {path} is damaged or of an unknown kind: {error}") from error
        pixels: NDArray[np.uint8] = np.asarray(square, np.uint8)
        return pixels.reshape(1, image_size, image_size, channels).transpose(0, 3, 1, 2)

    def build(writer: ArrayWriter) -> None:
        names: list[PurePosixPath] = []
        for name, data in _folder(files) if path.is_dir() else _archive(path):
            writer.append("pixels", decode(name, data))
            names.append(PurePosixPath(name))
        if not names:
            raise UsageError(f"{path} holds no pictures ({', '.join(SUFFIXES)})")
        classes = sorted({_class(name, path) for name in names})
        numbers = {name: number for number, name in enumerate(classes)}
        writer.append("labels", np.array([numbers[_class(name, path)] for name in names], np.int64))
        writer.append("parts", np.array([_part(name) for name in names], np.uint8))
        writer.append("classes", np.frombuffer("\n".join(classes).encode(), np.uint8))

    source = {"files": fingerprint(files), "image_size": image_size, "channels": channels}
    arrays = cached_arrays(cache_folder(cache), "pictures", source, build)
    names = arrays["classes"].tobytes().decode().split("\n")
    return Pictures(arrays["pixels"], arrays["labels"], arrays["parts"], names)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not PurePosixPath(name).name.startswith(".")


def _class(name: PurePosixPath, path: Path) -> str:
    if len(name.parts) < 2:
        raise UsageError(f"the picture {name} in {path} lies in no class folder; CLASS/{name} is expected")
    return name.parts[-2]


def _part(name: PurePosixPath) -> int:
    above = name.parts[-3] if len(name.parts) > 2 else ""
    return PARTS.index(above) if above in PARTS else NO_PART


def _folder(files: list[Document]) -> Iterator[tuple[str, bytes]]:
    return ((file.name, b"".join(file.pieces())) for file in files)


def _archive(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each picture in the archive's own order: compressed ones can only be read front to back."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                file: Any = archive.extractfile(member) if member.isfile() and _is_picture(member.name) else None
                if file is not None:
                    yield member.name, file.read()
    except tarfile.ReadError as error:
        raise RunError(f"{path} is not a tar archive, or it is truncated: {error}") from error
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise RunError(f"the archive {path} is damaged or truncated: {error}") from error
