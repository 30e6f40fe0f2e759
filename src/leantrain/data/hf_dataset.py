"""Text out of a Hugging Face dataset: the `datasets` package fetches and stores it, this makes windows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from leantrain.data.cache import ArrayWriter, cache_folder, cached_arrays
from leantrain.data.documents import is_held_out
from leantrain.data.optional import need
from leantrain.data.tokenizer import make_tokenizer
from leantrain.data.tokens import Text, TokenWindows, check_arguments, write_tokens
from leantrain.errors import UsageError, nearest


class HFDataset(TokenWindows):
    """Next-token prediction over one text column; every row is a document.

    Args:
        name: a dataset on the Hugging Face hub, a local folder of data files, or one written by `save_to_disk`.
        config: which of the dataset's configurations, where it has several.
        split: the rows to train on.
        held_out_split: the rows to evaluate on; None holds out a fraction of `split`, by the hash of a row's number.
        column: the column with the text.
        context: tokens per window, >= 1.
        tokenizer: None for bytes, or a Hugging Face tokenizer: a file, a folder, a name.
        cache: folder for token files; None is $LEANTRAIN_CACHE, or ~/.cache/leantrain.
        held_out: fraction of the rows to hold out, in (0, 1), when `held_out_split` is None.
        max_bytes: use only the first rows of each split that hold so many bytes of UTF-8 together.

    Raises:
        UsageError: `datasets` is not installed; the dataset, split or column is not found; an argument is not allowed.
        RunError: the cache cannot be written.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        split: str = "train",
        held_out_split: str | None = None,
        column: str = "text",
        context: int = 256,
        tokenizer: str | None = None,
        cache: str | None = None,
        held_out: float = 0.1,
        max_bytes: int | None = None,
    ) -> None:
        check_arguments(context, held_out, max_bytes)
        rows = _load(name, config, split, column)
        held_rows = None if held_out_split is None else _load(name, config, held_out_split, column)
        encoder = make_tokenizer(tokenizer)

        def build(writer: ArrayWriter) -> None:
            train = _texts(rows, column, max_bytes)
            held = _texts(rows if held_rows is None else held_rows, column, max_bytes)
            if held_rows is None:
                train = (text for text in train if not is_held_out(text[0], held_out))
                held = (text for text in held if is_held_out(text[0], held_out))
            write_tokens(writer, encoder, train, held)

        source = {
            "rows": rows._fingerprint,  # the package's own key for its cache: it changes with the rows
            "held_out_rows": held_out if held_rows is None else held_rows._fingerprint,
            "column": column,
            "tokenizer": encoder.identity,
            "max_bytes": max_bytes,
        }
        arrays = cached_arrays(cache_folder(cache), "tokens", source, build)
        super().__init__(arrays, context, encoder.vocab_size, name)


def _load(name: str, config: str | None, split: str, column: str) -> Any:
    """One split as a `datasets.Dataset` that has the text column."""
    datasets = need("datasets", "datasets", f"HFDataset(name={name!r})")
    folder = Path(name).expanduser()
    saved = any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))
    try:
        found = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(name, config)
    except Exception as error:  # anything from a missing name over a lost network to a dataset's own script
        raise UsageError(f"the dataset name={name!r}, config={config!r} could not be loaded: {error}") from error
    if isinstance(found, dict):
        if split not in found:
            raise UsageError(f"the dataset {name!r} has no split {split!r}{nearest(split, found)}")
        found = found[split]
    if column not in found.column_names:
        raise UsageError(f"the dataset {name!r} has no column {column!r}{nearest(column, found.column_names)}")
    return found


def _texts(rows: Any, column: str, max_bytes: int | None) -> Iterator[Text]:
    """Rows that hold text, named by their number, until `max_bytes` is reached."""
    used = 0
    for number, row in enumerate(_column(rows, column)):
        if not isinstance(row, str):
            raise UsageError(f"column {column!r} must hold text, but row {number} holds {type(row).__name__}")
        text = row.encode()
        used += len(text)
        if max_bytes is not None and used > max_bytes:
            return
        if text:
            yield str(number), [text]


def _column(rows: Any, column: str) -> Iterable[object]:
    return (row[column] for row in rows.select_columns([column]))
