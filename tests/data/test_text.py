"""Text: packed documents, windows without overlap, tokens that are cached for as long as the source stays the same."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from leantrain.data import Data, Text
from leantrain.errors import RunError, UsageError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty documents, each a repeated word of its own."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"document{number:02} " * 40)
    return folder


def open_corpus(corpus: Path, **options: object) -> Text:
    return Text(str(corpus), cache=str(corpus.parent / "cache"), **{"context": 32, **options})  # type: ignore[arg-type]


def words(tokens: np.ndarray) -> set[str]:
    return set(re.findall(r"document\d\d", tokens.tobytes().decode()))


def token_files(corpus: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (corpus.parent / "cache").glob("*.arrays")}


def test_no_held_out_document_is_trained_on_and_none_is_lost(corpus: Path) -> None:
    data = open_corpus(corpus)
    train, held = words(data.train_tokens), words(data.held_out_tokens)
    assert not train & held
    assert len(train) + len(held) == 40
    assert (data.train_documents, data.held_out_documents) == (len(train), len(held))


def test_documents_are_packed_with_one_separator_after_each(corpus: Path) -> None:
    data = open_corpus(corpus)
    assert (data.train_tokens == 0).sum() == data.train_documents
    assert data.train_tokens[-1] == data.held_out_tokens[-1] == 0
    documents = data.train_tokens.tobytes().split(b"\0")[:-1]
    assert sorted(documents) == sorted(
        text for path in corpus.iterdir() if (text := path.read_bytes())[:10].decode() in words(data.train_tokens)
    )


def test_targets_are_the_inputs_shifted_by_one_and_ids_say_where_they_are_from(corpus: Path) -> None:
    data = open_corpus(corpus)
    batch = data.train_batch(seed=1, step=2, size=8)
    assert batch.inputs.shape == batch.targets.shape == (8, 32)
    assert batch.inputs.dtype == batch.targets.dtype == batch.ids.dtype == torch.int64
    tokens = torch.from_numpy(data.train_tokens.astype(np.int64))
    for row, window in enumerate(batch.ids.tolist()):
        torch.testing.assert_close(batch.inputs[row], tokens[window * 32 : window * 32 + 32])
        torch.testing.assert_close(batch.targets[row], tokens[window * 32 + 1 : window * 32 + 33])
    assert batch.tokens == 8 * 32


def test_one_epoch_predicts_every_token_once(corpus: Path) -> None:
    data = open_corpus(corpus)
    batch = data.train_batch(seed=0, step=0, size=data.train_size)
    targets = batch.targets[batch.ids.argsort()].reshape(-1).numpy()
    np.testing.assert_array_equal(targets, data.train_tokens[1 : len(targets) + 1])
    assert len(data.train_tokens) - 1 - len(targets) < data.context


def test_a_batch_does_not_depend_on_the_batches_asked_for_before(corpus: Path) -> None:
    data, other = open_corpus(corpus), open_corpus(corpus)
    forward = [data.train_batch(3, step, 8) for step in range(20)]
    backward = [other.train_batch(3, step, 8) for step in reversed(range(20))][::-1]
    for left, right in zip(forward, backward, strict=True):
        assert torch.equal(left.inputs, right.inputs) and torch.equal(left.ids, right.ids)
    assert not torch.equal(forward[0].inputs, forward[1].inputs)
    assert not torch.equal(forward[0].inputs, data.train_batch(4, 0, 8).inputs)


def test_evaluation_is_the_held_out_part_in_order(corpus: Path) -> None:
    data = open_corpus(corpus)
    batches = list(data.eval_batches(3))
    seen = torch.cat([batch.inputs for batch in batches]).reshape(-1).numpy()
    np.testing.assert_array_equal(seen, data.held_out_tokens[: len(seen)])
    assert len(data.held_out_tokens) - 1 - len(seen) < 32
    assert [len(batch) for batch in data.eval_batches(3, limit=2)] == [3, 3]


def test_text_is_data_and_tells_a_model_what_it_needs(corpus: Path) -> None:
    data = open_corpus(corpus)
    assert isinstance(data, Data)
    assert (data.task, data.spec) == ("next_token", {"vocab_size": 256, "context": 32})


def test_the_cache_is_reused_while_the_source_stays_the_same(corpus: Path) -> None:
    first = open_corpus(corpus)
    before = token_files(corpus)
    second = open_corpus(corpus, context=16)  # windows are cut from the same tokens
    assert token_files(corpus) == before and len(before) == 1
    np.testing.assert_array_equal(first.train_tokens, second.train_tokens)


@pytest.mark.parametrize("options", [{"held_out": 0.3}, {"max_bytes": 9000}])
def test_another_choice_of_documents_is_another_cache_file(corpus: Path, options: dict[str, object]) -> None:
    open_corpus(corpus)
    open_corpus(corpus, **options)
    assert len(token_files(corpus)) == 2


def a_document_changes(corpus: Path) -> None:
    path = corpus / "7.txt"
    text = path.read_text().replace("document07", "document99")  # the same size
    path.write_text(text)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # clocks of some file systems are coarse


def a_document_arrives(corpus: Path) -> None:
    (corpus / "new.txt").write_text("document99 " * 40)


@pytest.mark.parametrize("change", [a_document_changes, a_document_arrives])
def test_a_changed_source_makes_new_tokens(corpus: Path, change: Callable[[Path], None]) -> None:
    open_corpus(corpus)
    change(corpus)
    data = open_corpus(corpus)
    assert "document99" in words(data.train_tokens) | words(data.held_out_tokens)
    assert len(token_files(corpus)) == 2


def test_a_truncated_cache_is_rebuilt(corpus: Path) -> None:
    expected = np.array(open_corpus(corpus).train_tokens)
    (path,) = token_files(corpus)
    os.truncate(path, path.stat().st_size // 2)
    np.testing.assert_array_equal(open_corpus(corpus).train_tokens, expected)


def test_a_single_file_holds_out_its_end(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("".join(f"{number:04}" for number in range(1000)))
    data = Text(str(path), context=8, cache=str(tmp_path), held_out=0.25)
    assert data.train_tokens.tobytes() + data.held_out_tokens.tobytes() == (
        path.read_bytes()[:3000] + b"\0" + path.read_bytes()[3000:] + b"\0"
    )


def test_max_bytes_bounds_what_is_read(corpus: Path) -> None:
    data = open_corpus(corpus, max_bytes=3000)
    documents = data.train_documents + data.held_out_documents
    assert len(data.train_tokens) + len(data.held_out_tokens) - documents == 3000


def test_the_default_corpus_is_this_pythons_standard_library(tmp_path: Path) -> None:
    data = Text(context=64, cache=str(tmp_path), max_bytes=300_000)
    text = data.train_tokens.tobytes()
    assert text.count(b"import ") > 20
    assert data.train_size == (len(data.train_tokens) - 1) // 64


def test_text_that_is_not_utf8_is_bytes_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("naïve ".encode("latin-1") * 100)
    assert 0xEF in Text(str(path), context=8, cache=str(tmp_path)).train_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context must be >= 1 token, got 0"),
        ({"context": 100_000}, r"training part of .*corpus has \d+ tokens; context=100000 needs at least 100001"),
        ({"held_out": 1.5}, r"held_out must be a fraction in \(0, 1\), got 1.5"),
        ({"max_bytes": 0}, "max_bytes must be >= 1 or None, got 0"),
        ({"tokenizer": "absent/folder/tokenizer.json", "held_out": 2.0}, "held_out"),
    ],
)
def test_an_argument_that_is_not_allowed_is_refused_by_name(corpus: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_corpus(corpus, **options)


def test_a_side_needs_one_token_more_than_a_window(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("x" * 20)  # two sides of 10 and a separator each
    data = Text(str(path), context=10, cache=str(tmp_path), held_out=0.5)
    assert data.train_batch(0, 0, 1).targets[0].tolist() == [ord("x")] * 9 + [0]
    with pytest.raises(UsageError, match="has 11 tokens; context=11 needs at least 12"):
        Text(str(path), context=11, cache=str(tmp_path), held_out=0.5)


def test_a_batch_larger_than_the_corpus_is_refused(corpus: Path) -> None:
    data = open_corpus(corpus)
    with pytest.raises(UsageError, match=f"the {data.train_size} training examples, got {data.train_size + 1}"):
        data.train_batch(0, 0, data.train_size + 1)


def test_a_corpus_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no text at .*absent"):
        Text(str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="empty corpus"):
        Text(str(tmp_path))


# Hugging Face tokenizers, when the package is there.


def write_tokenizer(folder: Path, separator: str = "<eos>") -> Path:
    """A tokenizer of whole words, as a file of the `tokenizers` package."""
    vocabulary = {separator: 0, "[UNK]": 1} | {f"document{number:02}": number + 2 for number in range(40)}
    folder.mkdir(exist_ok=True)
    path = folder / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    content = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []}
    path.write_text(json.dumps(content))
    return path


def test_a_tokenizer_makes_tokens_and_names_the_vocabulary(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    data = open_corpus(corpus, tokenizer=str(write_tokenizer(tmp_path / "words").parent))
    assert data.spec == {"vocab_size": 42, "context": 32}
    assert data.train_tokens.dtype == np.uint8
    assert (data.train_tokens == 0).sum() == data.train_documents
    assert len(data.train_tokens) == 41 * data.train_documents
    by_bytes = open_corpus(corpus)
    assert {f"document{token - 2:02}" for token in set(data.held_out_tokens.tolist()) - {0}} == words(
        by_bytes.held_out_tokens
    )


def test_a_changed_tokenizer_makes_new_tokens(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = write_tokenizer(tmp_path / "words")
    open_corpus(corpus, tokenizer=str(path))
    path.write_text(path.read_text().replace('"document39": 41', '"document39": 300'))
    assert open_corpus(corpus, tokenizer=str(path)).train_tokens.dtype == np.uint16
    assert len(token_files(corpus)) == 2


def test_a_tokenizer_without_a_separator_is_refused(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(UsageError, match="has no token to put between documents"):
        open_corpus(corpus, tokenizer=str(write_tokenizer(tmp_path / "words", separator="word")))


def test_a_damaged_tokenizer_is_an_error_of_the_file(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(RunError, match=r"tokenizer\.json cannot be read"):
        open_corpus(corpus, tokenizer=str(path))


def test_a_folder_without_a_tokenizer_is_refused(corpus: Path) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(UsageError, match=r"a folder without a tokenizer\.json"):
        open_corpus(corpus, tokenizer=str(corpus))


def test_a_tokenizer_refuses_what_is_not_utf8_and_names_the_file(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "latin.txt").write_bytes("naïve ".encode("latin-1") * 100)
    with pytest.raises(UsageError, match=r"latin\.txt is not UTF-8 text \(byte 0xef\)"):
        Text(str(tmp_path / "latin.txt"), cache=str(tmp_path), tokenizer=str(write_tokenizer(tmp_path / "words")))


def test_a_tokenizer_without_the_package_says_what_to_install(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "tokenizers")
    with pytest.raises(UsageError, match="tokenizer='gpt2' needs the package 'tokenizers': pip install tokenizers"):
        open_corpus(corpus, tokenizer="gpt2")


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Make `package` look as if it were not installed."""

    def import_module(name: str) -> object:
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return importlib.import_module(name)

    monkeypatch.setattr("leantrain.data.optional.import_module", import_module)
