"""Which documents a corpus has, which are held out, and that no byte of them is lost or doubled."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leantrain.data import documents as docs
from leantrain.data.documents import Document
from leantrain.errors import RunError, UsageError


def named(*names: str) -> list[Document]:
    return [Document(name, Path(name), 0, 10) for name in names]


def names(documents: list[Document]) -> set[str]:
    return {document.name for document in documents}


NAMES = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), min_size=2, max_size=40, unique=True)


@settings(deadline=None, max_examples=40)
@given(NAMES, st.floats(0.01, 0.99))
def test_every_document_is_on_exactly_one_side_and_no_side_is_empty(words: list[str], held_out: float) -> None:
    train, held = docs.split_documents(named(*words), held_out)
    assert train and held
    assert len(train) + len(held) == len(words)
    assert names(train) | names(held) == set(words)


def test_adding_documents_moves_none_from_one_side_to_the_other() -> None:
    few = [f"package/module_{number}.py" for number in range(50)]
    more = [f"another/{number}.txt" for number in range(200)]
    train, held = docs.split_documents(named(*few), 0.2)
    wider_train, wider_held = docs.split_documents(named(*few, *more), 0.2)
    assert names(train) <= names(wider_train)
    assert names(held) <= names(wider_held)


def test_the_split_does_not_depend_on_the_order_of_the_files() -> None:
    words = [str(number) for number in range(30)]
    assert docs.split_documents(named(*words), 0.3) == docs.split_documents(named(*reversed(words)), 0.3)


def test_about_the_fraction_asked_for_is_held_out() -> None:
    held = sum(docs.is_held_out(f"document {number}", 0.1) for number in range(10_000))
    assert 900 < held < 1100  # 3.3 standard deviations


def test_a_larger_fraction_only_adds_to_what_is_held_out() -> None:
    words = [str(number) for number in range(100)]
    assert names(docs.split_documents(named(*words), 0.1)[1]) < names(docs.split_documents(named(*words), 0.3)[1])


@settings(deadline=None, max_examples=40)
@given(text=st.text(max_size=60), held_out=st.floats(0.05, 0.95))
def test_a_single_document_is_cut_between_two_characters(
    tmp_path_factory: pytest.TempPathFactory, text: str, held_out: float
) -> None:
    path = tmp_path_factory.mktemp("corpus") / "one.txt"
    path.write_bytes(text.encode())
    (train,), (held,) = docs.split_documents([Document("one.txt", path, 0, len(text.encode()))], held_out)
    first, second = b"".join(train.pieces()), b"".join(held.pieces())
    assert first.decode() + second.decode() == text
    assert 0 <= int(len(text.encode()) * (1 - held_out)) - len(first) < 4


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 20])
def test_pieces_are_the_file_and_end_where_lines_end(
    tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docs, "PIECE_BYTES", piece)
    path = tmp_path / "lines.txt"
    path.write_text("one\ntwö\n\nfour without an end", encoding="utf-8")
    pieces = list(docs.find_documents(path)[0].pieces())
    assert b"".join(pieces) == path.read_bytes()
    assert all(part.endswith(b"\n") for part in pieces[:-1])


@pytest.mark.parametrize("piece", [1, 5, 1 << 20])
def test_a_cut_document_ends_at_its_cut(tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "PIECE_BYTES", piece)
    path = tmp_path / "long.txt"
    path.write_text("one line that goes on and on\n" * 3)
    assert b"".join(Document("long.txt", path, 4, 40).pieces()) == path.read_bytes()[4:40]


def test_a_folder_gives_its_text_files_by_relative_name(tmp_path: Path) -> None:
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "deep/a.md", "deep/deeper/c.py", ".hidden", ".git/config"):
        (tmp_path / name).write_text("text")
    (tmp_path / "binary.bin").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "empty.txt").touch()
    found = docs.find_documents(tmp_path)
    assert names(docs.text_only(found)) == {"b.txt", "deep/a.md", "deep/deeper/c.py"}


def test_the_standard_library_is_found_without_tests_and_other_peoples_packages() -> None:
    found = names(docs.standard_library())
    assert {"json/decoder.py", "pydoc_data/topics.py", "argparse.py"} <= found
    assert all(name.endswith(".py") for name in found)
    assert not any(part in {"test", "tests", "site-packages"} for name in found for part in name.split("/"))


def test_a_missing_path_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no text at .*absent"):
        docs.find_documents(tmp_path / "absent")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nothing.txt").touch()
    with pytest.raises(UsageError, match="empty corpus"):
        docs.find_documents(tmp_path)


def test_a_folder_of_binary_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0\1\2")
    with pytest.raises(UsageError, match=r"no text among 1 files such as .*a\.bin"):
        docs.text_only(docs.find_documents(tmp_path))


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("a long line\n" * 10)
    (document,) = docs.find_documents(path)
    path.write_text("short")
    with pytest.raises(RunError, match=r"log\.txt became shorter"):
        list(document.pieces())


@pytest.mark.parametrize("budget", [1, 2, 3, 99, 100, 101, 250, 10_000])
def test_max_bytes_is_never_exceeded_and_wastes_less_than_a_character(tmp_path: Path, budget: int) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("ö" * 50, encoding="utf-8")
    found = docs.find_documents(tmp_path)
    chosen = docs.at_most(found, budget)
    texts = [b"".join(document.pieces()).decode() for document in chosen]
    used = sum(len(text.encode()) for text in texts)
    assert min(budget, 500) - 1 <= used <= budget


def test_documents_are_packed_in_the_order_in_which_max_bytes_takes_them() -> None:
    documents = named(*(str(number) for number in range(300)))
    order = docs.at_most(documents, 10 * 300)
    train, held = docs.split_documents(documents, 0.5)
    assert train == [document for document in order if document in train]
    assert held == [document for document in order if document in held]
    first = docs.at_most(documents, 10 * 100)
    assert first == order[:100]
    # A sample like any other: being taken early has nothing to do with being held out.
    assert 30 < sum(document in held for document in first) < 70


def test_the_fingerprint_notices_names_sizes_and_times(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    seen = {docs.fingerprint(docs.find_documents(tmp_path))}
    path.write_text("texts")
    seen.add(docs.fingerprint(docs.find_documents(tmp_path)))
    path.rename(tmp_path / "b.txt")
    seen.add(docs.fingerprint(docs.find_documents(tmp_path)))
    os.utime(tmp_path / "b.txt", ns=(1, 1))
    seen.add(docs.fingerprint(docs.find_documents(tmp_path)))
    assert len(seen) == 4
