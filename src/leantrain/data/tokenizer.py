"""Text to token numbers: bytes as they are, or any Hugging Face tokenizer by name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from leantrain.data.optional import need
from leantrain.errors import RunError, UsageError

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>", "[SEP]", "<|im_end|>")
"""Names that published tokenizers give to the token between two documents, in the order they are tried."""


class Tokenizer(Protocol):
    """Turns one piece of a document into token numbers below `vocab_size`."""

    vocab_size: int
    separator: int
    """The token after each document."""
    identity: str
    """Changes whenever the same text might become other tokens; part of the cache's fingerprint."""

    def encode(self, text: bytes, origin: str) -> NDArray[Any]:
        """[n] token numbers. `origin` names the document in errors."""
        ...


class Bytes:
    """Every byte is its own token: 256 of them, no vocabulary file, any language. NUL, which text lacks, separates."""

    vocab_size = 256
    separator = 0
    identity = "bytes"

    def encode(self, text: bytes, origin: str) -> NDArray[np.uint8]:
        return np.frombuffer(text, dtype=np.uint8)


class HuggingFace:
    """A `tokenizers` tokenizer: a `tokenizer.json`, a folder that holds one, or a name on the Hugging Face hub.

    Raises:
        UsageError: the package is not installed, the tokenizer is not found, or it has no end-of-text token.
    """

    def __init__(self, name: str) -> None:
        self._tokenizer = _load(name)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.separator = _separator(self._tokenizer, name)
        self.identity = hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: bytes, origin: str) -> NDArray[np.uint32]:
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{origin} is not UTF-8 text (byte 0x{text[error.start]:02x}); "
                f"convert it, or use tokenizer=None, which takes bytes as they are"
            ) from None
        return np.array(self._tokenizer.encode(decoded, add_special_tokens=False).ids, dtype=np.uint32)


def make_tokenizer(name: str | None) -> Tokenizer:
    """Bytes for None, else the Hugging Face tokenizer of that name."""
    return Bytes() if name is None else HuggingFace(name)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned integer that holds every token of the vocabulary."""
    return np.min_scalar_type(vocab_size - 1)


def _load(name: str) -> Any:
    tokenizers = need("tokenizers", "tokenizers", f"tokenizer={name!r}")
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if path.exists() and not file.is_file():
        raise UsageError(f"tokenizer={name!r} is a folder without a tokenizer.json")
    load = tokenizers.Tokenizer
    try:
        return load.from_file(str(file)) if path.exists() else load.from_pretrained(name)
    except Exception as error:  # the package raises bare Exception for a damaged file and for an unknown name
        if path.exists():
            raise RunError(f"tokenizer file {file} cannot be read: {error}") from error
        raise UsageError(
            f"tokenizer={name!r} is no file or folder here, and the Hugging Face hub did not give it: {error}"
        ) from error


def _separator(tokenizer: Any, name: str) -> int:
    for token in SEPARATORS:
        number = tokenizer.token_to_id(token)
        if number is not None:
            return int(number)
    raise UsageError(
        f"tokenizer={name!r} has no token to put between documents; one of {', '.join(SEPARATORS)} is needed"
    )
