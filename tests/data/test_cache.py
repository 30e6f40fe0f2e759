"""Cached arrays: built once, whole or not at all, checked whenever they are opened."""

from __future__ import annotations

import multiprocessing
import os
import time
from contextlib import nullcontext
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leantrain.data.cache import ArrayWriter, cache_folder, cached_arrays
from leantrain.errors import RunError


class Builder:
    """Writes two arrays and counts how often it was asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, writer: ArrayWriter) -> None:
        self.calls += 1
        for start in range(0, 1000, 100):
            writer.append("numbers", np.arange(start, start + 100, dtype=np.uint16))
        writer.append("pairs", np.array([[1.5, 2.5]], np.float32))


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.arrays")
    return path


def assert_intact(arrays: dict[str, np.ndarray]) -> None:
    assert list(arrays) == ["numbers", "pairs"]
    np.testing.assert_array_equal(arrays["numbers"], np.arange(1000, dtype=np.uint16))
    np.testing.assert_array_equal(arrays["pairs"], np.array([[1.5, 2.5]], np.float32))
    assert (arrays["numbers"].dtype, arrays["pairs"].dtype) == (np.uint16, np.float32)


def test_a_second_opening_reads_what_the_first_built(tmp_path: Path) -> None:
    build = Builder()
    assert_intact(cached_arrays(tmp_path, "kind", {"a": 1}, build))
    assert_intact(cached_arrays(tmp_path, "kind", {"a": 1}, build))
    assert build.calls == 1


def test_another_source_is_another_file(tmp_path: Path) -> None:
    build = Builder()
    cached_arrays(tmp_path, "kind", {"a": 1}, build)
    cached_arrays(tmp_path, "kind", {"a": 2}, build)
    assert build.calls == 2
    assert len(list(tmp_path.glob("kind-*.arrays"))) == 2


def test_arrays_cannot_be_written_to(tmp_path: Path) -> None:
    arrays = cached_arrays(tmp_path, "kind", {}, Builder())
    with pytest.raises(ValueError, match="read-only"):
        arrays["numbers"][0] = 1


def cut_off(data: bytes) -> bytes:
    return data[:-1]


def longer(data: bytes) -> bytes:
    return data + b"\0"


def changed_in_an_array(data: bytes) -> bytes:
    return data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]


def changed_in_the_header(data: bytes) -> bytes:
    return data.replace(b'"shape": [1000]', b'"shape": [9999]')


def header_only(data: bytes) -> bytes:
    return data[:100]


def empty(data: bytes) -> bytes:
    return b""


def not_ours(data: bytes) -> bytes:
    return b"[1, 2, 3]".ljust(len(data))


@pytest.mark.parametrize(
    "damage", [cut_off, longer, changed_in_an_array, changed_in_the_header, header_only, empty, not_ours]
)
def test_a_damaged_file_is_built_again(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    build = Builder()
    cached_arrays(tmp_path, "kind", {}, build)
    path = only_file(tmp_path)
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before
    assert_intact(cached_arrays(tmp_path, "kind", {}, build))
    assert build.calls == 2
    assert path.read_bytes() == before


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5))
def test_any_lengths_survive_the_round_trip(tmp_path_factory: pytest.TempPathFactory, lengths: list[int]) -> None:
    expected = {f"a{i}": np.arange(3 * n, dtype=np.uint8).reshape(n, 3) for i, n in enumerate(lengths)}

    def build(writer: ArrayWriter) -> None:
        for name, array in expected.items():
            writer.append(name, array)

    arrays = cached_arrays(tmp_path_factory.mktemp("cache"), "kind", {}, build)
    assert list(arrays) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array)


def test_a_build_that_fails_leaves_no_file_behind(tmp_path: Path) -> None:
    def build(writer: ArrayWriter) -> None:
        writer.append("numbers", np.arange(10))
        raise RunError("the source is gone")

    with pytest.raises(RunError, match="the source is gone"):
        cached_arrays(tmp_path, "kind", {}, build)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_names_the_folder_and_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot write the data cache .*file/sub.*LEANTRAIN_CACHE"):
        cached_arrays(tmp_path / "file" / "sub", "kind", {}, Builder())


def test_the_folder_is_the_argument_then_the_environment_then_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANTRAIN_CACHE", "/from/environment")
    assert cache_folder("/from/argument") == Path("/from/argument")
    assert cache_folder(None) == Path("/from/environment")
    monkeypatch.delenv("LEANTRAIN_CACHE")
    assert cache_folder(None) == Path.home() / ".cache" / "leantrain"


def build_slowly(writer: ArrayWriter) -> None:
    for start in range(0, 1000, 100):
        time.sleep(0.02)
        writer.append("numbers", np.arange(start, start + 100, dtype=np.uint16))
    writer.append("pairs", np.array([[1.5, 2.5]], np.float32))


def build_when_all_are_ready(folder: Path, ready: Barrier, built: Queue[int]) -> None:
    """What each process of the test below does."""

    def build(writer: ArrayWriter) -> None:
        built.put(os.getpid())
        build_slowly(writer)

    ready.wait(timeout=30)
    assert_intact(cached_arrays(folder, "kind", {}, build))


def test_processes_that_build_at_the_same_time_share_one_intact_file(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ready, built = fork.Barrier(3), fork.Queue()
    workers = [fork.Process(target=build_when_all_are_ready, args=(tmp_path, ready, built)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert built.get(timeout=5) in [worker.pid for worker in workers]
    assert built.empty()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".arrays", ".lock"]


def test_without_a_lock_the_last_to_finish_leaves_an_intact_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leantrain.data.cache._locked", lambda path: nullcontext())
    build = Builder()

    def overtaken(writer: ArrayWriter) -> None:
        monkeypatch.setattr(os, "getpid", lambda: 0)  # another process, with another temporary file
        assert_intact(cached_arrays(tmp_path, "kind", {}, build))
        build(writer)

    assert_intact(cached_arrays(tmp_path, "kind", {}, overtaken))
    assert build.calls == 2
    assert [path.suffix for path in tmp_path.iterdir()] == [".arrays"]
