"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leantrain.atomic import whole_file, whole_folder, write_text


@given(text=st.text(st.characters(exclude_characters="\r", exclude_categories=["Cs"])))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_written_is_what_is_read_and_nothing_is_left_beside_it(tmp_path: Path, text: str):
    target = tmp_path / "new" / "folder" / "text.txt"
    write_text(target, text)
    assert target.read_text(encoding="utf-8") == text
    assert os.listdir(target.parent) == ["text.txt"]


def test_a_failed_block_leaves_the_old_file_and_no_remains(tmp_path: Path):
    target = tmp_path / "kept.txt"
    write_text(target, "old")
    with pytest.raises(ZeroDivisionError), whole_file(target) as aside:
        aside.write_text("half of the n")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["kept.txt"]


def test_a_file_keeps_its_old_content_until_the_block_ends(tmp_path: Path):
    target = tmp_path / "text.txt"
    write_text(target, "old")
    with whole_file(target) as aside:
        aside.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path):
    target = tmp_path / "checkpoint"
    for names in (["a", "b"], ["b", "c"]):
        with whole_folder(target) as aside:
            for name in names:
                (aside / name).write_text(name)
    assert sorted(os.listdir(target)) == ["b", "c"]
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_a_failed_block_leaves_the_old_folder_and_no_remains(tmp_path: Path):
    target = tmp_path / "checkpoint"
    with whole_folder(target) as aside:
        (aside / "weights").write_text("old")
    with pytest.raises(ZeroDivisionError), whole_folder(target) as aside:
        (aside / "weights").write_text("ne")
        raise ZeroDivisionError
    assert (target / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_remains_of_a_killed_writer_of_the_same_process_id_do_not_leak_into_a_folder(tmp_path: Path):
    target = tmp_path / "checkpoint"
    remains = tmp_path / f".checkpoint.{os.getpid()}.tmp"
    remains.mkdir()
    (remains / "stale").write_text("from a crash")
    with whole_folder(target) as aside:
        (aside / "weights").write_text("new")
    assert os.listdir(target) == ["weights"]


@pytest.mark.parametrize("kind", ["whole_file", "whole_folder"])
def test_a_writer_killed_in_the_middle_leaves_what_was_there(tmp_path: Path, kind: str):
    target = tmp_path / "result"
    with getattr(__import__("leantrain.atomic", fromlist=[kind]), kind)(target) as aside:
        _fill(aside, kind, "old")
    script = (
        f"import os, signal\nfrom leantrain.atomic import {kind}\n"
        f"with {kind}({str(target)!r}) as aside:\n"
        f"    (aside / 'part' if {kind == 'whole_folder'} else aside).write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert (target / "part" if kind == "whole_folder" else target).read_text() == "old"


def _fill(aside: Path, kind: str, text: str) -> None:
    (aside / "part" if kind == "whole_folder" else aside).write_text(text)
