"""The feature cache: bit-exact, whole after any interruption, and never of another model or other data."""

from __future__ import annotations

import json
import resource
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leantrain.errors import RunError, UsageError
from leantrain.learn.feature_cache import FeatureCache, fingerprint


class Counting:
    """What computes features, and how often it was asked."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.calls, self.dtype = 0, dtype

    def __call__(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return torch.stack([inputs.float() / 3, inputs.float().exp()], 1).to(self.dtype)


def refuse(inputs: Tensor) -> Tensor:
    raise AssertionError("nothing should be computed")


def examples(ids: list[int]) -> tuple[Tensor, Tensor]:
    """Ids, and inputs that are a function of them."""
    generators = (torch.Generator().manual_seed(number) for number in ids)
    return torch.tensor(ids), torch.stack([torch.randn(3, generator=generator) for generator in generators])


@pytest.fixture(params=["memory", "disk"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "cache" if request.param == "disk" else None


@settings(max_examples=30, deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=6), min_size=1, max_size=8),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    reopened=st.booleans(),
)
def test_every_batch_gets_what_computing_would_give_bit_for_bit(
    batches: list[list[int]], dtype: torch.dtype, reopened: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    in_memory, on_disk = FeatureCache("key"), FeatureCache("key", folder)
    for ids in batches:
        if reopened:
            on_disk.close()
            on_disk = FeatureCache("key", folder)
        expected = Counting(dtype)(examples(ids)[1])
        for cache in (in_memory, on_disk):
            found = cache.features(*examples(ids), Counting(dtype))
            assert found.dtype == dtype
            assert torch.equal(found, expected)
    seen = {number for ids in batches for number in ids}
    assert len(in_memory) == len(on_disk) == len(seen)
    assert in_memory.nbytes == on_disk.nbytes == len(seen) * 6 * dtype.itemsize


def test_an_example_is_computed_once_and_what_is_given_is_a_copy(folder: Path | None) -> None:
    cache, compute = FeatureCache("key", folder), Counting()
    expected = Counting()(examples([5, 2])[1])
    cache.features(*examples([5, 2]), compute).zero_()
    cache.features(*examples([2, 5]), compute).zero_()
    assert torch.equal(cache.features(*examples([5, 2]), compute), expected)
    assert compute.calls == 1
    cache.features(*examples([5, 9]), compute)  # one is missing
    assert compute.calls == 2
    assert len(cache) == 3


def test_another_dtype_rounds_what_was_just_computed_as_what_was_kept(folder: Path | None) -> None:
    cache, compute = FeatureCache("key", folder, dtype=torch.bfloat16), Counting()
    first = cache.features(*examples([1, 2]), compute)
    second = cache.features(*examples([1, 2]), compute)
    assert first.dtype == torch.float32
    assert torch.equal(first, second)
    assert torch.equal(first, Counting()(examples([1, 2])[1]).bfloat16().float())
    assert cache.nbytes == 2 * 6 * 2
    assert compute.calls == 1


@pytest.mark.parametrize("change", [1e-7, -0.0])
def test_an_example_whose_inputs_have_changed_is_refused(change: float, folder: Path | None) -> None:
    cache = FeatureCache("key", folder)
    ids, inputs = examples([7, 8])
    inputs[1, 2] = 0.0
    cache.features(ids, inputs, Counting())
    inputs[1, 2] = change
    with pytest.raises(UsageError, match="example 8 has other inputs"):
        cache.features(ids, inputs, refuse)


@pytest.mark.parametrize("inputs", [torch.arange(24).reshape(4, 6), torch.rand(4, 3) > 0.5, torch.arange(4) / 3])
def test_inputs_of_any_kind_are_told_apart(inputs: Tensor) -> None:
    cache = FeatureCache("key")
    cache.features(torch.arange(4), inputs, lambda batch: torch.zeros(len(batch), 1))
    cache.features(torch.arange(4), inputs.clone(), refuse)
    changed = inputs.clone()
    changed.view(-1)[-1] = 1 - changed.view(-1)[-1].int()
    with pytest.raises(UsageError, match="example 3"):
        cache.features(torch.arange(4), changed, refuse)


def test_a_slice_of_a_batch_is_the_same_example() -> None:
    cache = FeatureCache("key")
    inputs = torch.randn(6, 5)
    whole = cache.features(torch.arange(6), inputs, lambda batch: batch * 2)
    assert torch.equal(cache.features(torch.arange(3, 6), inputs[3:], refuse), whole[3:])
    assert torch.equal(cache.features(torch.arange(6), inputs.t().contiguous().t(), refuse), whole)


def test_features_of_another_shape_are_refused(folder: Path | None) -> None:
    cache = FeatureCache("key", folder)
    cache.features(torch.tensor([1]), torch.zeros(1, 4), lambda batch: batch)
    with pytest.raises(UsageError, match=r"one shape and type, got float32 \[5\] after float32 \[4\]"):
        cache.features(torch.tensor([2]), torch.zeros(1, 5), lambda batch: batch)


def test_a_reopened_cache_goes_on(tmp_path: Path) -> None:
    cache = FeatureCache("key", tmp_path)
    cache.features(*examples([1, 2, 3]), Counting())
    cache.close()
    again, compute = FeatureCache("key", tmp_path), Counting()
    assert len(again) == 3
    again.features(*examples([1, 2]), compute)
    again.features(*examples([3, 1]), refuse)
    assert compute.calls == 1  # by which it learns dtype and device


def test_a_cache_of_another_key_is_refused_or_replaced(tmp_path: Path) -> None:
    FeatureCache("old", tmp_path).features(*examples([1]), Counting())
    with pytest.raises(UsageError, match="is of another model: its key is old, here it is new"):
        FeatureCache("new", tmp_path)
    cache = FeatureCache("new", tmp_path, replace=True)
    assert len(cache) == 0
    cache.features(*examples([1]), Counting())
    cache.close()
    assert len(FeatureCache("new", tmp_path)) == 1


def test_another_dtype_is_refused_and_so_is_a_folder_that_is_no_cache(tmp_path: Path) -> None:
    FeatureCache("key", tmp_path / "a").features(*examples([1]), Counting())
    with pytest.raises(UsageError, match="holds float32, not bfloat16"):
        FeatureCache("key", tmp_path / "a", dtype=torch.bfloat16)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"is no feature cache: it holds thesis\.tex"):
        FeatureCache("key", tmp_path / "b", replace=True)
    assert (tmp_path / "b" / "thesis.tex").read_text() == "years of work"


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    first = FeatureCache("key", tmp_path)
    with pytest.raises(UsageError, match="in use by another run"):
        FeatureCache("key", tmp_path)
    first.close()
    FeatureCache("key", tmp_path)


@pytest.mark.parametrize("lost", [1, 19, 20, 21, 45])
@pytest.mark.parametrize("file", ["features.bin", "index.bin"])
def test_what_a_kill_has_torn_is_computed_again(file: str, lost: int, tmp_path: Path) -> None:
    FeatureCache("key", tmp_path).features(*examples([1, 2, 3]), Counting())
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-lost])
    (tmp_path / ".manifest.json.123.tmp").write_text("half")
    cache = FeatureCache("key", tmp_path)
    row = 24 if file == "features.bin" else 20
    assert len(cache) == 3 - -(-lost // row)
    for ids in ([1, 2, 3], [3, 1, 2]):
        assert torch.equal(cache.features(*examples(ids), Counting()), Counting()(examples(ids)[1]))
    assert len(cache) == 3


def test_a_row_that_has_rotted_is_computed_again(tmp_path: Path) -> None:
    FeatureCache("key", tmp_path).features(*examples([1, 2, 3]), Counting())
    content = bytearray((tmp_path / "features.bin").read_bytes())
    content[24 + 5] ^= 1  # in the second row
    (tmp_path / "features.bin").write_bytes(content)
    cache, compute = FeatureCache("key", tmp_path), Counting()
    cache.features(*examples([1, 3]), compute)
    for _ in range(2):
        assert torch.equal(cache.features(*examples([2, 1]), compute), Counting()(examples([2, 1])[1]))
    assert compute.calls == 2
    assert len(cache) == 3


@pytest.mark.parametrize("manifest", ["", "[]", "null", '{"schema": 1}', '{"dtype": 3}', '{"dtype": "nonsense"}'])
def test_a_cache_whose_manifest_is_damaged_begins_anew(manifest: str, tmp_path: Path) -> None:
    FeatureCache("key", tmp_path).features(*examples([1, 2, 3]), Counting())
    (tmp_path / "manifest.json").write_text(manifest)
    cache = FeatureCache("key", tmp_path)
    assert len(cache) == 0
    cache.features(*examples([4]), Counting())
    assert torch.equal(cache.features(*examples([4]), refuse), Counting()(examples([4])[1]))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """In the block, no file of this process can grow beyond `size` bytes: what a full disk does to a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [100, 120, 130])
def test_a_full_disk_is_one_error_and_costs_no_row_that_was_kept(room: int, tmp_path: Path) -> None:
    cache = FeatureCache("key", tmp_path)
    cache.features(*examples([1, 2, 3, 4]), Counting())  # 96 bytes
    with (
        largest_file(room),
        pytest.raises(RunError, match=r"cannot write the feature cache .* it holds 4 examples \(0\.0 MB\)"),
    ):
        cache.features(*examples([5, 6, 7]), Counting())
    assert torch.equal(cache.features(*examples([4, 1]), refuse), Counting()(examples([4, 1])[1]))
    cache.features(*examples([5, 6]), Counting())  # somebody has made room
    cache.close()
    again = FeatureCache("key", tmp_path)
    assert len(again) == 6
    again.features(*examples([1, 2, 3]), Counting())
    assert torch.equal(again.features(*examples([6, 5, 4]), refuse), Counting()(examples([6, 5, 4])[1]))


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write the feature cache .*file/cache"):
        FeatureCache("key", tmp_path / "file" / "cache")


def test_the_files_are_what_the_docs_say(tmp_path: Path) -> None:
    cache = FeatureCache("key", tmp_path)
    features = cache.features(*examples([11, 12]), Counting())
    cache.close()
    assert json.loads((tmp_path / "manifest.json").read_text()) == {
        "schema": 1, "key": "key", "dtype": "float32", "shape": [2, 3],
    }  # fmt: skip
    stored = np.fromfile(tmp_path / "features.bin", dtype="<f4").reshape(2, 2, 3)
    assert np.array_equal(stored, features.numpy())
    index = np.fromfile(tmp_path / "index.bin", dtype=[("id", "<i8"), ("inputs", "<i8"), ("crc", "<u4")])
    assert index["id"].tolist() == [11, 12]
    assert index["crc"].tolist() == [zlib.crc32(row.tobytes()) for row in stored]


def test_a_fingerprint_tells_names_types_shapes_and_numbers_apart() -> None:
    base = torch.arange(6.0)
    others = [
        ("a", base.reshape(2, 3)), ("b", base), ("a", base.double()), ("a", base.flip(0)), ("a", -base),
        ("a", base[:5]),
    ]  # fmt: skip
    found = {fingerprint([each]) for each in [("a", base), *others]}
    assert len(found) == 7
    assert fingerprint([("a", base)]) == fingerprint([("a", base.clone())])
    assert fingerprint([("a", base)], "bf16") != fingerprint([("a", base)])
    assert fingerprint([("a", torch.tensor(3))]) != fingerprint([("a", torch.tensor(4))])
