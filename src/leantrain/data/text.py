"""Text: the standard library that every Python has, or any file or folder of the user's."""

from __future__ import annotations

from pathlib import Path

from leantrain.data import documents as docs
from leantrain.data.cache import ArrayWriter, cache_folder, cached_arrays
from leantrain.data.tokenizer import make_tokenizer
from leantrain.data.tokens import TokenWindows, check_arguments, write_tokens


class Text(TokenWindows):
    """Next-token prediction over text files.

    A folder is read with everything below it; hidden files and files that are not text (a NUL byte in the first
    8 KiB) are passed over. A tenth of the documents, chosen by the hash of their names, is held out; of a single file
    it is the last tenth. Tokens are made once and kept in the cache; a file that is added, removed or changed makes
    new ones.

    Args:
        path: a file or a folder; None is the source of Python's standard library without its tests.
        context: tokens per window, in [1, tokens of the smaller side).
        tokenizer: None for bytes (vocabulary of 256), or a Hugging Face tokenizer: a file, a folder, a name.
        cache: folder for token files; None is $LEANTRAIN_CACHE, or ~/.cache/leantrain.
        held_out: fraction of the documents to hold out, in (0, 1).
        max_bytes: read only so many bytes, of documents in an order that is random but always the same.

    Raises:
        UsageError: an argument is not allowed, the path is missing or holds no text, or it is shorter than `context`.
        RunError: a file cannot be read, or the cache cannot be written.

    Examples:
        >>> from leantrain.data import Text
        >>> data = Text(context=64, max_bytes=100_000)
        >>> data.train_batch(seed=0, step=0, size=8).inputs.shape
        torch.Size([8, 64])
    """

    def __init__(
        self,
        path: str | None = None,
        context: int = 256,
        tokenizer: str | None = None,
        cache: str | None = None,
        held_out: float = 0.1,
        max_bytes: int | None = None,
    ) -> None:
        check_arguments(context, held_out, max_bytes)
        found = docs.standard_library() if path is None else docs.find_documents(Path(path).expanduser())
        encoder = make_tokenizer(tokenizer)

        def build(writer: ArrayWriter) -> None:
            chosen = docs.at_most(docs.text_only(found), max_bytes)
            train, held = docs.split_documents(chosen, held_out)
            write_tokens(
                writer,
                encoder,
                ((str(document.path), document.pieces()) for document in train),
                ((str(document.path), document.pieces()) for document in held),
            )

        source = {
            "documents": docs.fingerprint(found),
            "tokenizer": encoder.identity,
            "held_out": held_out,
            "max_bytes": max_bytes,
        }
        arrays = cached_arrays(cache_folder(cache), "tokens", source, build)
        super().__init__(arrays, context, encoder.vocab_size, path or "the standard library")
