"""Next-token data: documents packed into one long row of tokens, cut into windows of `context`.

Documents of a side (train, held out) stand one after the other, each followed by the tokenizer's separator. Windows
do not overlap and may hold the end of one document and the start of the next: the separator is what tells a model so.
Every token but the last few of a side is a target exactly once per epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from leantrain.data.cache import Arrays, ArrayWriter
from leantrain.data.order import Rows, check_fraction, eval_rows, train_rows
from leantrain.data.protocol import Batch, Spec, Task
from leantrain.data.tokenizer import Tokenizer, token_dtype
from leantrain.errors import UsageError

Text = tuple[str, Iterable[bytes]]
"""One document: its name, for errors, and its bytes in pieces."""


class TokenWindows:
    """Windows of `context` tokens over packed tokens; what `Text` and `HFDataset` are once their tokens exist.

    Args:
        arrays: `train` and `held_out`, each [tokens] of an unsigned integer type, and `documents`, their two counts.
        context: tokens a model sees at once, the length of a window.
        vocab_size: every token is below it.
        name: of the corpus, for errors.

    Raises:
        UsageError: context is below 1, or a side holds no whole window.
    """

    task: Task = "next_token"

    def __init__(self, arrays: Arrays, context: int, vocab_size: int, name: str) -> None:
        self.train_tokens = arrays["train"]
        self.held_out_tokens = arrays["held_out"]
        self.train_documents, self.held_out_documents = map(int, arrays["documents"])
        self.context = context
        self.vocab_size = vocab_size
        for side, tokens in (("training", self.train_tokens), ("held-out", self.held_out_tokens)):
            if len(tokens) <= context:
                raise UsageError(
                    f"the {side} part of {name} has {len(tokens)} tokens; context={context} needs at least "
                    f"{context + 1}: use a shorter context, more text, or another held_out"
                )

    @property
    def spec(self) -> Spec:
        return {"vocab_size": self.vocab_size, "context": self.context}

    @property
    def train_size(self) -> int:
        """Windows of `context` targets that fit into the training tokens without overlap."""
        return (len(self.train_tokens) - 1) // self.context

    def train_batch(self, seed: int, step: int, size: int) -> Batch:
        """Windows [size, context] of `step`; an id is a window's place in the training tokens, in windows.

        Raises:
            UsageError: size is not in [1, train_size], or seed or step is negative.
        """
        return self._batch(self.train_tokens, train_rows(self.train_size, seed, step, size))

    def eval_batches(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out windows in packed order, at most `limit` batches of `size`; the last may be smaller."""
        windows = (len(self.held_out_tokens) - 1) // self.context
        return (self._batch(self.held_out_tokens, rows) for rows in eval_rows(windows, size, limit))

    def _batch(self, tokens: NDArray[Any], rows: Rows) -> Batch:
        width = self.context + 1
        starts = rows * self.context
        windows = np.stack([tokens[start : start + width] for start in starts.tolist()]).astype(np.int64)
        both = torch.from_numpy(windows)
        return Batch(both[:, :-1].contiguous(), both[:, 1:].contiguous(), torch.from_numpy(rows.astype(np.int64)))


def check_arguments(context: int, held_out: float, max_bytes: int | None) -> None:
    """Refuse what no corpus can satisfy, before any text is read."""
    if context < 1:
        raise UsageError(f"context must be >= 1 token, got {context}")
    if max_bytes is not None and max_bytes < 1:
        raise UsageError(f"max_bytes must be >= 1 or None, got {max_bytes}")
    check_fraction(held_out)


def write_tokens(writer: ArrayWriter, tokenizer: Tokenizer, train: Iterable[Text], held_out: Iterable[Text]) -> None:
    """Tokenize both sides into the arrays `train`, `held_out` and `documents` ([2] int64, how many per side)."""
    dtype = token_dtype(tokenizer.vocab_size)
    separator = np.array([tokenizer.separator], dtype=dtype)
    documents = []
    for side, texts in (("train", train), ("held_out", held_out)):
        writer.append(side, np.empty(0, dtype))
        count = 0
        for name, pieces in texts:
            for piece in pieces:
                writer.append(side, tokenizer.encode(piece, name).astype(dtype, copy=False))
            writer.append(side, separator)
            count += 1
        documents.append(count)
    writer.append("documents", np.array(documents, dtype=np.int64))
