"""Rows of a Hugging Face dataset as documents. Local files only: no test asks the network for anything."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from leantrain.data import Data, HFDataset
from leantrain.errors import UsageError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of two splits, written by `save_to_disk`; each row says which it is."""
    datasets = pytest.importorskip("datasets")
    rows = {split: {"text": [f"[{split} {row:03}]" * 5 for row in range(100)]} for split in ("train", "validation")}
    folder = tmp_path_factory.mktemp("dataset") / "saved"
    datasets.DatasetDict({split: datasets.Dataset.from_dict(columns) for split, columns in rows.items()}).save_to_disk(
        str(folder)
    )
    return str(folder)


def documents(tokens: Any) -> set[str]:
    return {text.split("]")[0] + "]" for text in tokens.tobytes().decode().split("\0") if text}


def test_rows_are_documents_and_a_tenth_is_held_out(saved: str, tmp_path: Path) -> None:
    data = HFDataset(saved, context=16, cache=str(tmp_path))
    train, held = documents(data.train_tokens), documents(data.held_out_tokens)
    assert len(train) + len(held) == 100
    assert not train & held
    assert 3 <= len(held) <= 20
    assert isinstance(data, Data)
    assert data.train_batch(0, 0, 4).inputs.shape == (4, 16)


def test_a_held_out_split_is_used_whole(saved: str, tmp_path: Path) -> None:
    data = HFDataset(saved, held_out_split="validation", context=16, cache=str(tmp_path))
    assert documents(data.train_tokens) == {f"[train {row:03}]" for row in range(100)}
    assert documents(data.held_out_tokens) == {f"[validation {row:03}]" for row in range(100)}


def test_tokens_are_cached(saved: str, tmp_path: Path) -> None:
    for _ in range(2):
        HFDataset(saved, context=16, cache=str(tmp_path))
    assert len(list(tmp_path.glob("*.arrays"))) == 1


def test_other_rows_make_other_tokens(saved: str, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        data = HFDataset(saved, split=split, context=16, cache=str(tmp_path))
        assert all(name.startswith(f"[{split} ") for name in documents(data.train_tokens))


def test_max_bytes_takes_the_first_rows(saved: str, tmp_path: Path) -> None:
    data = HFDataset(saved, held_out_split="validation", context=16, cache=str(tmp_path), max_bytes=600)
    assert documents(data.train_tokens) == {f"[train {row:03}]" for row in range(600 // 55)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "trian"}, r"no split 'trian'; did you mean 'train'\? \(allowed: train, validation\)"),
        ({"column": "txt"}, r"no column 'txt'; did you mean 'text'\?"),
        ({"context": 0}, "context must be >= 1"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(saved: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        HFDataset(saved, **options)


def test_a_folder_that_is_no_dataset_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(UsageError, match="could not be loaded"):
        HFDataset(str(tmp_path))


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> object:
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return importlib.import_module(name)

    monkeypatch.setattr("leantrain.data.optional.import_module", import_module)
    with pytest.raises(UsageError, match=r"HFDataset\(name='a/b'\) needs the package 'datasets': pip install datasets"):
        HFDataset("a/b")
