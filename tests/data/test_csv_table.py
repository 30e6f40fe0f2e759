"""CSV tables: every kind of column, and every way in which a file can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leantrain.data import Csv
from leantrain.errors import RunError, UsageError


def write(folder: Path, text: str, name: str = "table.csv") -> str:
    path = folder / name
    path.write_bytes(text.encode())
    return str(path)


def a_table(rows: int = 20, header: str = "size,colour,age,kind") -> str:
    colours = ("red", "green", "blue")
    lines = [f"{i},{colours[i % 3]},{i * 0.5},{'big' if i % 2 else 'small'}" for i in range(rows)]
    return "\n".join([header] * bool(header) + lines) + "\n"


def whole(data: Csv) -> np.ndarray:
    return np.asarray(data.table.inputs)


def test_numbers_are_standardised_words_are_one_hot_and_the_target_is_numbered(tmp_path: Path) -> None:
    data = Csv(write(tmp_path, a_table()))
    assert data.feature_names == ["size", "colour=blue", "colour=green", "colour=red", "age"]
    assert data.class_names == ["big", "small"]
    assert data.spec == {"features": 5, "classes": 2}
    rows = np.arange(20)
    train = data.table.train
    expected = (rows - train.mean()) / train.std()
    np.testing.assert_allclose(whole(data)[:, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(whole(data)[:, 4], expected, rtol=1e-5)
    np.testing.assert_array_equal(whole(data)[:, 3], rows % 3 == 0)
    np.testing.assert_array_equal(data.table.targets, 1 - rows % 2)
    batch = data.train_batch(0, 0, 8)
    assert (batch.inputs.dtype, batch.targets.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("target", ["colour", 1, -3])
def test_the_target_is_a_column_by_name_or_place(tmp_path: Path, target: str | int) -> None:
    data = Csv(write(tmp_path, a_table()), target=target)
    assert data.class_names == ["blue", "green", "red"]
    assert data.feature_names == ["size", "age", "kind=big", "kind=small"]


def test_a_file_without_names_is_recognised_by_its_first_row(tmp_path: Path) -> None:
    data = Csv(write(tmp_path, a_table(header="")))
    assert len(whole(data)) == 20
    assert data.feature_names[0] == "0"


def test_header_says_what_the_first_row_is_where_guessing_would_fail(tmp_path: Path) -> None:
    words = "\n".join(f"{'xy'[i % 2]},{'ab'[i % 2]}" for i in range(10))
    assert len(whole(Csv(write(tmp_path, words)))) == 9
    assert len(whole(Csv(write(tmp_path, words), header=False))) == 10
    years = "2019,2020,kind\n" + "\n".join(f"{i},{i},{'ab'[i % 2]}" for i in range(10))
    assert Csv(write(tmp_path, years), header=True).feature_names == ["2019", "2020"]


def test_regression_standardises_the_target_and_leads_back_to_its_unit(tmp_path: Path) -> None:
    data = Csv(write(tmp_path, a_table()), target="age", task="regression")
    assert data.task == "regression"
    assert data.spec == {"features": 6, "outputs": 1}
    assert data.table.targets.shape == (20, 1) and data.table.targets.dtype == np.float32
    np.testing.assert_allclose(data.table.targets[data.table.train].mean(), 0, atol=1e-6)
    restored = data.table.targets * data.target_std + data.target_mean
    np.testing.assert_allclose(restored[:, 0], np.arange(20) * 0.5, rtol=1e-5, atol=1e-6)


def test_held_out_rows_have_no_influence_on_the_training_rows(tmp_path: Path) -> None:
    before = Csv(write(tmp_path, a_table()))
    lines = a_table().splitlines()
    for row in before.table.held_out:
        lines[row + 1] = f"{1000 + row},violet,-7,big"
    after = Csv(write(tmp_path, "\n".join(lines)))
    train = before.table.train
    assert after.feature_names == before.feature_names
    np.testing.assert_array_equal(whole(after)[train], whole(before)[train])
    np.testing.assert_array_equal(whole(after)[before.table.held_out, 1:4], 0)  # violet was never seen in training


@pytest.mark.parametrize("missing", ["", "?", "NA", "n/a", "NaN", "null"])
def test_missing_cells_become_the_mean_or_zeros(tmp_path: Path, missing: str) -> None:
    lines = a_table().splitlines()
    lines[4] = f"{missing}, {missing} ,1,big"
    data = Csv(write(tmp_path, "\n".join(lines)))
    np.testing.assert_array_equal(whole(data)[3, :4], 0)
    assert data.feature_names == ["size", "colour=blue", "colour=green", "colour=red", "age"]


def test_ignored_columns_are_left_out(tmp_path: Path) -> None:
    assert Csv(write(tmp_path, a_table()), ignore=["colour", 0]).feature_names == ["age"]


def test_numeric_classes_are_in_order_of_value(tmp_path: Path) -> None:
    text = "\n".join(f"{i},{(2, 10, 9)[i % 3]}" for i in range(12))
    assert Csv(write(tmp_path, text)).class_names == ["2", "9", "10"]


def test_spaces_empty_lines_quotes_byte_order_marks_and_other_delimiters_are_read(tmp_path: Path) -> None:
    text = "\ufeffa; b; kind\r\n\r\n" + "".join(f' {i} ; "x;{i % 2}"; {"uv"[i % 2]}\r\n' for i in range(10)) + "\r\n"
    data = Csv(write(tmp_path, text), delimiter=";")
    assert data.feature_names == ["a", "b=x;0", "b=x;1"]
    assert len(whole(data)) == 10


def test_a_second_file_is_held_out_whole_and_teaches_nothing(tmp_path: Path) -> None:
    train = write(tmp_path, a_table(20), "train.csv")
    test = write(tmp_path, a_table(8).replace("green", "violet").replace("big", "big."), "test.csv")
    data = Csv(train, held_out_path=test)
    assert (data.train_size, sum(len(batch) for batch in data.eval_batches(3))) == (20, 8)
    assert data.class_names == ["big", "small"]  # the full stop of UCI's Adult is no class of its own
    assert "colour=violet" not in data.feature_names
    np.testing.assert_allclose(whole(data)[:20, 0].mean(), 0, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (a_table(), {"target": "knd"}, r"target='knd' is not a column of .*; did you mean 'kind'\?"),
        (a_table(), {"target": 4}, "target=4 is not a column of .*, which has 4"),
        (a_table(), {"ignore": ["sise"]}, r"ignore='sise' is not a column .*did you mean 'size'"),
        (a_table(), {"ignore": ["size", "colour", "age"]}, "has no column besides the target"),
        (a_table(), {"task": "clasification"}, "unknown task 'clasification'; did you mean 'classification'"),
        (a_table(), {"held_out": 0.0}, "held_out must be a fraction"),
        (a_table(), {"delimiter": ", "}, "delimiter must be one character, got ', '"),
        (a_table(), {"target": "kind", "task": "regression"}, "line 2, column 'kind' must be a finite number, got 'sm"),
        (a_table(header="a,a,b,c"), {"target": "a"}, "target='a' names 2 columns"),
        (a_table().replace("9.5", "inf"), {}, "line 21, column 'age' must be a finite number, got 'inf'"),
        (a_table().replace("9.5,big", "9.5,?"), {}, r"the target is missing at .*line 21, column 'kind': '\?'"),
        (a_table().replace("9.5", ""), {"target": "age", "task": "regression"}, "the target is missing at .*line 21"),
        (a_table().replace("big", "small"), {}, "the target 'kind' of .* is always 'small'"),
        (a_table(), {"target": "age"}, "20 distinct values in 20 rows, too many for classes; use task='regression'"),
        (a_table(0), {}, "holds no rows below its header"),
        ("", {}, "holds no rows"),
        (a_table(1), {}, "needs at least 2 of them, got 1"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    tmp_path: Path, text: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Csv(write(tmp_path, text), **options)


def test_a_column_of_texts_is_refused_with_the_first_of_them(tmp_path: Path) -> None:
    text = "".join(f"sentence {i},{i % 2}\n" for i in range(400))
    with pytest.raises(UsageError, match=r"column '0' .*\('sentence 0' is no number\) .* use ignore=\['0'\]"):
        Csv(write(tmp_path, text))


def test_a_number_that_turns_up_as_a_word_in_the_held_out_rows_is_refused(tmp_path: Path) -> None:
    train = write(tmp_path, a_table(20), "train.csv")
    test = write(tmp_path, a_table(8).replace("3.5", "three"), "test.csv")
    with pytest.raises(UsageError, match=r"test\.csv, line 9, column 'age' must be a finite number, got 'three'"):
        Csv(train, held_out_path=test)


def test_a_second_file_with_other_columns_or_classes_is_refused(tmp_path: Path) -> None:
    train = write(tmp_path, a_table(20), "train.csv")
    with pytest.raises(UsageError, match="has the columns"):
        Csv(train, held_out_path=write(tmp_path, a_table(8, header="a,b,c,d"), "test.csv"))
    with pytest.raises(
        UsageError, match=r"test\.csv, line 3, column 'kind': class 'bigg' is not in .*did you mean 'big'"
    ):
        Csv(train, held_out_path=write(tmp_path, a_table(8).replace("big", "bigg"), "test.csv"))
    with pytest.raises(UsageError, match="exclude each other"):
        Csv(train, held_out=0.5, held_out_path=train)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-8], "line 21 has 3 cells, expected 4; is the file truncated"),
        (lambda data: data.replace(b"blue", b'"blue', 1), "is damaged"),
        (lambda data: data.replace(b"blue", b"bl\xfce", 1), r"is not UTF-8 text \(byte 0xfc\)"),
        (lambda data: data.replace(b"blue", b"blue,", 1), "line 4 has 5 cells, expected 4"),
    ],
)
def test_a_damaged_file_is_named_with_the_line(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "table.csv"
    path.write_bytes(damage(a_table().encode()))
    with pytest.raises(RunError, match=message):
        Csv(str(path))


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no CSV file at .*absent\.csv"):
        Csv(str(tmp_path / "absent.csv"))
