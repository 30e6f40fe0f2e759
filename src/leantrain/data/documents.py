"""Documents of a text corpus: which files they are, which are held out, and their bytes in pieces.

Two hashes of a document's *name* (its path below the corpus, with `/`) decide its fate: one says whether it is held
out, the other where it stands in the packed order. So adding or removing a file moves no other from one side to the
other, and the first documents, which a short evaluation or a small `max_bytes` sees, are a fair sample of all.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from leantrain.errors import RunError, UsageError

PIECE_BYTES = 1 << 20
SNIFF_BYTES = 8192
# Tests are left out of the standard library because many installations lack them; the others differ by machine.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class Document:
    """Bytes [start, stop) of the file at `path`, known to the corpus as `name`."""

    name: str
    path: Path
    start: int
    stop: int
    modified_ns: int = 0

    @property
    def size(self) -> int:
        return self.stop - self.start

    def pieces(self) -> Iterator[bytes]:
        """The text in order, in pieces of about a megabyte that end where a line ends.

        Raises:
            RunError: the file cannot be read, or has become shorter since it was listed.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                left = self.size
                while left:
                    piece = file.read(min(PIECE_BYTES, left))
                    piece += file.readline(left - len(piece)) if len(piece) < left else b""
                    if not piece:
                        raise RunError(f"{self.path} became shorter while it was read; start again")
                    left -= len(piece)
                    yield piece
        except OSError as error:
            raise _unreadable(error) from error


def standard_library() -> list[Document]:
    """Every `.py` source of the running Python's standard library, tests aside: about 12 MB of code and prose.

    `pydoc_data/topics.py`, the language reference as plain text, is among them. Names are relative to the library's
    folder, so two machines with the same Python hold out the same documents.
    """
    root = Path(sysconfig.get_path("stdlib"))
    return [
        document
        for document in _files_below(root, SKIPPED_FOLDERS)
        if document.path.suffix == ".py" and not document.path.name.startswith(SKIPPED_PREFIXES)
    ]


def find_documents(path: Path) -> list[Document]:
    """The file at `path`, or all files below the folder `path` except hidden ones, sorted by name.

    Raises:
        UsageError: nothing is there, or the folder holds no file with anything in it.
    """
    if path.is_file():
        documents = [_document(path.name, path)]
    elif path.is_dir():
        documents = _files_below(path, {"__pycache__"})
    else:
        raise UsageError(f"no text at {path}: there is no such file or folder")
    if not any(document.size for document in documents):
        raise UsageError(f"empty corpus: {path} holds no text file with anything in it")
    return documents


def text_only(documents: Sequence[Document]) -> list[Document]:
    """The documents that are text by git's rule: not empty, and no NUL byte in the first 8 KiB.

    Raises:
        UsageError: none is.
        RunError: one cannot be read.
    """
    texts = [document for document in documents if document.size and b"\0" not in _read(document.path, 0, SNIFF_BYTES)]
    if not texts:
        raise UsageError(f"no text among {len(documents)} files such as {documents[0].path}: all hold NUL bytes")
    return texts


def split_documents(documents: Sequence[Document], held_out: float) -> tuple[list[Document], list[Document]]:
    """Documents to train on and documents held out, each in packed order.

    Each document is held out with probability `held_out`, by the hash of its name. Where that leaves one side
    empty, the document with the lowest hash alone is held out. A single document is cut instead: its last
    `held_out` part is held out.
    """
    if len(documents) == 1:
        return _cut(documents[0], held_out)
    ordered = sorted(documents, key=lambda document: _draws(document.name)[1])
    held = {document.name for document in ordered if is_held_out(document.name, held_out)}
    if not held or len(held) == len(ordered):
        held = {min(ordered, key=lambda document: _draws(document.name)[0]).name}
    train = [document for document in ordered if document.name not in held]
    return train, [document for document in ordered if document.name in held]


def is_held_out(name: str, held_out: float) -> bool:
    """Whether the hash of a document's name falls into the held-out fraction."""
    return _draws(name)[0] < held_out


def at_most(documents: Sequence[Document], max_bytes: int | None) -> list[Document]:
    """Documents in packed order until they hold `max_bytes` together; the last one is cut at a character."""
    if max_bytes is None:
        return list(documents)
    chosen: list[Document] = []
    left = max_bytes
    for document in sorted(documents, key=lambda document: _draws(document.name)[1]):
        if left <= 0:
            break
        if document.size > left:
            document = replace(document, stop=_character_start(document.path, document.start + left))
        left -= document.size
        if document.size == 0:  # not even its first character fits
            break
        chosen.append(document)
    return chosen


def fingerprint(documents: Sequence[Document]) -> str:
    """A hash of all names, sizes and times of change: what a cache made from these documents depends on."""
    lines = [f"{document.name}\0{document.size}\0{document.modified_ns}" for document in documents]
    return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()


def _files_below(root: Path, skipped: set[str]) -> list[Document]:
    def refuse(error: OSError) -> None:
        raise _unreadable(error) from error

    documents = []
    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        for file in files:
            path = Path(folder, file)
            if not file.startswith(".") and path.is_file():
                documents.append(_document(path.relative_to(root).as_posix(), path))
    return sorted(documents, key=lambda document: document.name)


def _document(name: str, path: Path) -> Document:
    status = path.stat()
    return Document(name, path, 0, status.st_size, status.st_mtime_ns)


def _draws(name: str) -> tuple[float, float]:
    """Two numbers in [0, 1) from a document's name: one for the split, one for the order."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48, int.from_bytes(digest[6:12], "big") / 2**48


def _cut(document: Document, held_out: float) -> tuple[list[Document], list[Document]]:
    middle = _character_start(document.path, document.start + int(document.size * (1 - held_out)))
    return [replace(document, stop=middle)], [replace(document, start=middle)]


def _read(path: Path, position: int, count: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(position)
            return file.read(count)
    except OSError as error:
        raise _unreadable(error) from error


def _unreadable(error: OSError) -> RunError:
    return RunError(f"cannot read {error.filename}: {error.strerror}")


def _character_start(path: Path, position: int) -> int:
    """The last position <= `position` at which no UTF-8 character is cut."""
    first = max(position - 3, 0)
    nearby = _read(path, first, position - first + 1)
    for at in range(position, first - 1, -1):
        here = nearby[at - first : at - first + 1]
        if not here or here[0] & 0xC0 != 0x80:  # the end of the file, or not 10xxxxxx, which continues a character
            return at
    return position  # not UTF-8
