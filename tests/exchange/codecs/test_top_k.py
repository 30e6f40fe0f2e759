"""The largest entries are found whatever a sample says of them; packets of them are believed only where they can be."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.exchange.codecs.top_k import Form, TopK, at_least, kept, largest, sampled_threshold, unpack
from leantrain.exchange.packet import HEADER, Kind, PacketError, seal

SHAPES: dict[str, Callable[[torch.Generator, int], Tensor]] = {
    "normal": lambda random, n: torch.randn(n, generator=random),
    "heavy tails": lambda random, n: torch.empty(n).cauchy_(generator=random),
    "few values": lambda random, n: torch.randint(-3, 4, (n,), generator=random).float(),
    "one value": lambda random, n: torch.full((n,), -2.5),
    "zeros": lambda random, n: torch.zeros(n),
    "mostly zeros": lambda random, n: torch.randn(n, generator=random) * (torch.rand(n, generator=random) < 0.02),
    "sorted": lambda random, n: torch.randn(n, generator=random).sort().values,
    "rows": lambda random, n: torch.randn(n, generator=random) * (torch.arange(n) // 97 % 7 == 0),
    "columns": lambda random, n: torch.randn(n, generator=random) * (torch.arange(n) % 17 == 3),
}


@settings(max_examples=100)
@given(
    shape=st.sampled_from(sorted(SHAPES)), n=st.integers(1, 30_000), share=st.floats(0, 1), seed=st.integers(0, 2**20)
)
def test_exactly_the_largest_entries_are_found(shape: str, n: int, share: float, seed: int):
    values = SHAPES[shape](torch.Generator().manual_seed(seed), n)
    k = min(n, int(share**3 * n))  # cubed: mostly few
    found = largest(values, k)
    assert found.dtype == torch.int64 and found.numel() == k
    assert (found.diff() > 0).all()
    assert np.array_equal(np.sort(values[found].abs().numpy()), np.sort(np.abs(values.numpy()))[n - k :])


@pytest.mark.parametrize("shape", ["normal", "heavy tails", "sorted"])
@pytest.mark.parametrize("keep", [0.001, 0.01])
def test_a_sample_finds_between_four_fifths_and_thirteen_tenths_as_many_candidates(shape: str, keep: float):
    n = 500_000
    counts = []
    for seed in range(20):
        values = SHAPES[shape](torch.Generator().manual_seed(seed), n)
        counts.append(at_least(values, sampled_threshold(values, kept(n, keep))).numel() / kept(n, keep))
    assert np.mean([0.8 <= count <= 1.3 for count in counts]) >= 0.9
    assert 1.05 < np.mean(counts) < 1.25
    assert min(counts) > 0.7
    assert max(counts) < 1.6


@pytest.mark.parametrize("blind", [True, False], ids=["sample sees only small ones", "sample sees only large ones"])
def test_a_misleading_sample_changes_nothing_but_the_time(blind: bool):
    n, k = 100_000, 1000
    stride = (k // 128) | 1
    values = torch.rand(n, generator=torch.Generator().manual_seed(0))
    seen = torch.zeros(n, dtype=torch.bool)
    seen[stride // 2 :: stride] = True
    values[seen] += -values[seen] + 1e-3 if blind else 10.0
    candidates = at_least(values, sampled_threshold(values, k)).numel()
    assert candidates > 50 * k if blind else candidates < 0.2 * k
    assert set(largest(values, k).tolist()) == set(np.argsort(-values.numpy(), kind="stable")[:k].tolist())


@pytest.mark.parametrize("n", [100, 100_000])
def test_of_equal_entries_those_at_low_indices_are_not_preferred(n: int):
    found = largest(torch.ones(n), n // 10).double()
    assert found.mean() == pytest.approx(n / 2, rel=0.1)
    mixed = torch.ones(n)
    mixed[: n // 20] = 2.0
    found = largest(mixed, n // 10)
    assert (found < n // 20).sum() == n // 20
    assert found[n // 20 :].double().mean() == pytest.approx(n * 1.05 / 2, rel=0.1)


def test_searching_gives_the_same_entries_for_the_same_numbers():
    values = torch.randn(300_000, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    assert torch.equal(largest(values, 3000), largest(values.clone(), 3000))


def test_the_kept_share_is_rounded_up_but_not_by_rounding_errors():
    assert [kept(n, 0.1) for n in (0, 1, 10, 11, 30)] == [0, 1, 1, 2, 3]
    assert kept(3000, 0.001) == 3 and kept(7, 1.0) == 7


def read(packet: Tensor) -> dict[int, float]:
    """The entries of a packet, number by number."""
    data = bytes(packet.numpy())[HEADER:]
    count, exponent, value_bytes, index_bytes = struct.unpack_from("<IhBB", data)
    place, at, entries = 8, -1, []
    while len(entries) < count:
        (code,) = struct.unpack_from("<i" if index_bytes == 4 else "<H", data, place)
        place += index_bytes
        if index_bytes == 4:
            entries.append(code)
        elif code == 65535:
            at += 65535
        else:
            at += code + 1
            entries.append(at)
    values = struct.unpack_from(f"<{count}{'e' if value_bytes == 2 else 'f'}", data, place)
    assert place + count * value_bytes == len(data)
    scale = 2.0 ** (exponent - 15) if value_bytes == 2 else 1.0
    return {index: value * scale for index, value in zip(entries, values, strict=True)}


@pytest.mark.parametrize("values", ["float16", "float32"])
@pytest.mark.parametrize("indices", ["int32", "gaps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_packet_holds_the_largest_entries_of_a_tensor(values: str, indices: str, dtype: torch.dtype):
    tensor = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    codec = TopK(0.02, values, indices)
    packet = codec.encode(tensor)
    flat = tensor.flatten().double().numpy()
    expected = np.zeros(2000)
    for index in np.argsort(-np.abs(flat), kind="stable")[:40]:
        expected[index] = flat[index]
    precision = 2**-11 if values == "float16" else 2**-24
    decoded = codec.decode(packet)
    assert decoded.dtype == torch.float32
    np.testing.assert_allclose(decoded.double(), expected, rtol=precision, atol=0)
    assert {index: pytest.approx(value, rel=1e-6) for index, value in read(packet).items()} == {
        index: decoded[index].item() for index in np.flatnonzero(expected)
    }


@pytest.mark.parametrize(("indices", "values", "expected"), [
    ("int32", "float16", 6), ("gaps", "float16", 4), ("int32", "float32", 8), ("gaps", "float32", 6),
])  # fmt: skip
def test_an_entry_takes_as_many_bytes_as_promised(indices: str, values: str, expected: int):
    tensor = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    packet = TopK(0.001, values, indices).encode(tensor)
    assert packet.numel() == HEADER + Form(values, indices).payload_bytes(1000)
    assert expected <= packet.numel() / 1000 <= expected + 0.1


@given(steps=st.lists(st.one_of(st.integers(1, 9), st.integers(65_530, 65_545), st.integers(1, 300_000)), max_size=40))
def test_gaps_of_any_length_find_back_to_their_indices(steps: list[int]):
    positions = torch.tensor(steps, dtype=torch.int64).cumsum(0) - 1
    values = torch.arange(1.0, len(steps) + 1)
    numel = sum(steps)
    for form in (Form("float32", "gaps"), Form("float16", "gaps"), Form("float32", "int32")):
        payload = form.pack(values, positions, numel)
        back, where = unpack(payload, numel)
        assert torch.equal(where, positions) and torch.equal(back, values)
        assert list(read(torch.cat([torch.zeros(HEADER, dtype=torch.uint8), payload]))) == positions.tolist()


@pytest.mark.parametrize("size", [1e-38, 1e-12, 1.0, 7e4, 3e38])
def test_values_of_any_size_survive_in_16_bits(size: float):
    values = torch.tensor([1.0, -0.3, 0.9, 1e-4], dtype=torch.float64) * size
    back, _ = unpack(Form().pack(values.float(), torch.arange(4), 4), 4)
    np.testing.assert_allclose(back.double(), values.float().double(), rtol=2**-11)


@settings(max_examples=300)
@given(data=st.data())
def test_an_intact_packet_with_any_contents_is_read_or_refused(data: st.DataObject):
    numel = data.draw(st.integers(1, 200))
    count = data.draw(st.integers(0, min(numel, 20)))
    form = Form(data.draw(st.sampled_from(["float16", "float32"])), data.draw(st.sampled_from(["int32", "gaps"])))
    positions = torch.randperm(numel, generator=torch.Generator().manual_seed(count))[:count].sort().values
    payload = form.pack(torch.ones(count), positions, numel)
    payload = payload[: data.draw(st.integers(0, payload.numel()))] if data.draw(st.booleans()) else payload.clone()
    for _ in range(data.draw(st.integers(0, 4)) if payload.numel() else 0):
        payload[data.draw(st.integers(0, payload.numel() - 1))] = data.draw(st.integers(0, 255))
    packet = seal(Kind.TOP_K, payload, numel)
    try:
        values, where = unpack(payload, numel)
        TopK(1e-9).decode(packet)
    except PacketError:
        return
    assert values.numel() == where.numel() <= numel
    assert values.isfinite().all()
    assert (where >= 0).all() and (where < numel).all() and (where.diff() > 0).all()


@pytest.mark.parametrize(
    ("indices", "message"),
    [([3, 100], "ascend from 0 to 99"), ([-1, 4], "ascend"), ([5, 5], "ascend"), ([7, 2], "ascend")],
)
def test_indices_that_cannot_be_are_refused_behind_a_valid_checksum(indices: list[int], message: str):
    payload = struct.pack("<IhBB2i2e", 2, 0, 2, 4, *indices, 1.0, 1.0)
    packet = seal(Kind.TOP_K, torch.frombuffer(bytearray(payload), dtype=torch.uint8), 100)
    with pytest.raises(PacketError, match=message):
        TopK(0.01).decode(packet)


def test_a_packet_that_contradicts_itself_is_refused():
    def decoded(payload: bytes, numel: int = 100) -> Tensor:
        return TopK(0.01).decode(seal(Kind.TOP_K, torch.frombuffer(bytearray(payload), dtype=torch.uint8), numel))

    with pytest.raises(PacketError, match="begins with 8 bytes, and there are 2"):
        decoded(b"ab")
    with pytest.raises(PacketError, match="2 of 100 entries cannot have 24 bytes"):
        decoded(struct.pack("<IhBB4I", 2, 0, 2, 4, 0, 1, 1, 1))
    with pytest.raises(PacketError, match="not finite"):
        decoded(struct.pack("<IhBBIe", 1, 0, 2, 4, 0, float("inf")))
    with pytest.raises(PacketError, match="values of 3"):
        decoded(struct.pack("<IhBBIe", 1, 0, 3, 4, 0, 1.0))
    with pytest.raises(PacketError, match="1 entries has indices of 0"):
        decoded(struct.pack("<IhBBHe", 1, 0, 2, 2, 65535, 1.0))
    with pytest.raises(PacketError, match="1 of 1152921504606846976 entries"):  # and no memory is filled with zeros
        decoded(struct.pack("<IhBBIe", 1, 0, 2, 4, 0, 1.0), 2**60)


def test_what_cannot_be_packed_is_refused_by_name():
    with pytest.raises(UsageError, match="not finite"):
        TopK().encode(torch.tensor([1.0, float("nan")]))
    with pytest.raises(UsageError, match='too many for int32 indices; use indices="gaps"'):
        Form().pack(torch.ones(1), torch.tensor([0]), 2**31 + 1)
    with pytest.raises(UsageError, match="keep must be a share above 0 and at most 1, got 0"):
        TopK(0)
    with pytest.raises(UsageError, match=r"values must be .* got 'int8'"):
        TopK(values="int8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="indices must be"):
        TopK(indices="int64")  # type: ignore[arg-type]


def test_an_empty_tensor_is_a_packet_of_nothing():
    assert TopK().decode(TopK().encode(torch.empty(0, 3))).shape == (0,)
