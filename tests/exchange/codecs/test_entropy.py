"""The entropy codec: whole numbers come back as they were, in as many bits as their entropy, or not at all."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.exchange.codecs.codec import named
from leantrain.exchange.packet import HEADER, Kind, PacketError, seal, unseal

pytest.importorskip("constriction")

from leantrain.exchange.codecs import integer_coder, symbol_coders
from leantrain.exchange.codecs.entropy import FURTHEST, MODES, Entropy, decode, encode
from leantrain.exchange.codecs.integer_coder import decode_integers, encode_integers
from leantrain.exchange.codecs.key_frames import WeightReceiver, WeightSender
from leantrain.exchange.codecs.symbol_coders import Ans, Huffman

SLOW = {"deadline": None, "derandomize": True}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def entropy(values: np.ndarray) -> float:
    """Bits a value, by the definition."""
    counts = Counter(values.tolist()).values()
    return -sum(c / len(values) * math.log2(c / len(values)) for c in counts)


def there_and_back(integers: np.ndarray) -> bytes:
    coded = encode_integers(integers)
    found = decode_integers(np.frombuffer(coded, np.uint8), len(integers))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, integers)
    return coded


# Whole numbers.

EDGES = {
    "none": [],
    "one": [7],
    "one, most negative": [-(2**31)],
    "constant": [-3] * 1000,
    "two symbols": [0, 1] * 500,
    "two symbols far apart": [-(2**31), 2**31 - 1] * 500,
    "all of 16 bits": list(range(-(2**15), 2**15)),
    "one of many": [0] * 99_999 + [32767],
    "17 bits, as differences have": [-65534, 65534, 0] * 100,
}


@contextmanager
def only(coder: type[Ans | Huffman]) -> Iterator[None]:
    """In the block all symbols are written by this coder, as far as it takes so many of them."""
    before = integer_coder.TOLERATED
    integer_coder.TOLERATED = 0.0 if coder is Ans else math.inf
    try:
        yield
    finally:
        integer_coder.TOLERATED = before


each_coder = pytest.mark.parametrize("coder", [Ans, Huffman])


@each_coder
@pytest.mark.parametrize("integers", EDGES.values(), ids=EDGES)
def test_edges_come_back_exactly(integers: list[int], coder: type[Ans | Huffman]) -> None:
    with only(coder):
        there_and_back(np.array(integers, np.int32))


@settings(max_examples=200, **SLOW)
@given(
    st.integers(0, 3000),
    st.integers(0, 32),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.1, 1.0, 8.0]),
    st.sampled_from([Ans, Huffman]),
)
def test_random_integers_come_back_exactly(
    n: int, width: int, seed: int, tails: float, coder: type[Ans | Huffman]
) -> None:
    draw = np.random.default_rng(seed)
    spread = np.abs(draw.standard_t(2, n)) ** tails * draw.choice([-1, 1], n) * 2.0 ** (width - 4)
    with only(coder):
        there_and_back(np.clip(np.rint(spread), -(2**31), 2**31 - 1).astype(np.int32))


@settings(max_examples=100, **SLOW)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50))
def test_any_list_of_integers_comes_back(integers: list[int]) -> None:
    there_and_back(np.array(integers, np.int32))


@pytest.mark.parametrize("step", [0.02, 0.25, 0.5, 1, 2, 3, 6])
def test_code_is_as_long_as_the_entropy(step: float) -> None:
    """Two per cent and the table is what is allowed; numeral systems need a thousandth."""
    integers = np.rint(np.random.default_rng(0).standard_normal(300_000) / step).astype(np.int32)
    table, least = 9 + 4 * len(np.unique(integers)), len(integers) * entropy(integers) / 8
    assert len(there_and_back(integers)) <= 1.02 * least + table + 64
    with only(Ans):
        assert len(there_and_back(integers)) <= 1.001 * least + table + 64


def test_the_fast_coder_writes_what_it_can_and_the_other_one_the_rest() -> None:
    dense, sparse = (np.rint(np.random.default_rng(0).standard_normal(100_000) / c).astype(np.int32) for c in (1, 5))
    assert encode_integers(dense)[5] == 1 and encode_integers(sparse)[5] == 0


@pytest.mark.parametrize("symbols", [2, 3, 5, 6, 15, 16, 17, 256])
def test_a_byte_holds_as_many_symbols_as_fit(symbols: int) -> None:
    coder = Huffman(np.ones(symbols, np.int64))
    assert symbols**coder.group <= 256 < symbols ** (coder.group + 1)
    values = np.random.default_rng(0).integers(0, symbols, 1001).astype(np.int32)
    np.testing.assert_array_equal(coder.decode(coder.encode(values), 1001), values)


def test_random_bits_cost_their_width() -> None:
    integers = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.int32)
    assert len(there_and_back(integers)) <= 100_000 + 32


def test_few_numbers_do_not_carry_a_table() -> None:
    integers = np.array([3, -1, 4, 1, -5, 9, 2, -6, 5, 3], np.int32)
    assert len(there_and_back(integers)) <= 9 + 3 + 5


def test_more_symbols_than_a_table_holds_leave_bits_as_they_are() -> None:
    integers = np.arange(40_000, dtype=np.int32) % (2 * Ans.most_symbols + 1)
    coded = there_and_back(integers)
    assert coded[4] >= 1  # shift
    assert len(coded) <= 40_000 * math.log2(2 * Ans.most_symbols + 1) / 8 * 1.03 + 4 * Ans.most_symbols


@each_coder
def test_what_was_coded_once_can_be_read_for_ever(coder: type[Ans | Huffman]) -> None:
    integers = [0, 0, 1, 0, -1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 1, 0] * 8
    found = decode_integers(np.frombuffer(bytes.fromhex(RECORDED[coder]), np.uint8), len(integers))
    assert found.tolist() == integers


RECORDED = {
    Ans: "ffffffff00001004000007005f000f0007180000000fc24d7c49816015733e8db21bc45ef394c8b83c8b55821340110000",
    Huffman: "ffffffff00011004000007005f000f0007180000000fc24d7c05c13101000000c2a0184be641ff228246a3d168341acd01",
}


# Quantisers.


@settings(max_examples=120, **SLOW)
@given(
    st.sampled_from(["rel", "abs", "snapshot"]),
    st.lists(st.integers(0, 12), max_size=4),
    st.integers(0, 2**32 - 1),
    st.floats(-30, 30),
)
def test_error_is_at_most_half_a_step(mode: str, shape: list[int], seed: int, exponent: float) -> None:
    values = normal(*shape, seed=seed) * 10.0**exponent
    codec = Entropy(mode, step=0.1 if mode != "snapshot" else None)
    grid = codec.quantised(values, reference=10.0**exponent)
    found = decode(codec.encode(values, reference=10.0**exponent))
    assert found.shape == values.shape and found.dtype == torch.float32
    wanted = grid.low + grid.integers.double() * grid.step  # in float64, and rounded once
    assert torch.equal(found, wanted.float())
    assert ((found - values).abs() <= 0.502 * grid.step + 1e-6 * values.abs()).all()
    if mode != "snapshot":
        torch.testing.assert_close(grid.integers.double(), (values.double() / grid.step).round(), atol=1, rtol=0)


def test_steps_are_what_they_are_said_to_be() -> None:
    values = normal(1000) * 3
    rms = values.double().square().mean().sqrt().item()
    assert Entropy("rel", step=0.5).quantised(values).step == pytest.approx(0.5 * rms, rel=1e-6)
    assert Entropy("rel").quantised(values).step == pytest.approx(rms, rel=1e-6)
    assert Entropy("abs").quantised(values, reference=0.32).step == pytest.approx(0.005, rel=1e-6)
    low, step = Entropy("snapshot", bits=5).quantised(values)[1:]
    assert low == values.min() and low + 31 * step == pytest.approx(values.max().item(), rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.0, -0.3, 1e-45, 3e38])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5, 3)])
def test_constant_empty_and_single_tensors(mode: str, value: float, shape: tuple[int, ...]) -> None:
    values = torch.full(shape, value)
    found = decode(encode(values, mode, reference=max(abs(value), 0.1)))
    assert found.shape == shape
    torch.testing.assert_close(found, values, rtol=1e-2, atol=1e-30)


@settings(max_examples=50, **SLOW)
@given(st.integers(0, 2**32 - 1), st.integers(-60, 60), st.floats(0.1, 4))
def test_relative_steps_do_not_see_the_scale(seed: int, power: int, step: float) -> None:
    values = normal(257, seed=seed)
    small, large = (unseal(encode(v, "rel", step=step), Kind.ENTROPY).payload for v in (values, values * 2.0**power))
    grid = slice(10, 18)  # behind the mode and one size
    assert torch.equal(small[18:], large[18:]) and torch.equal(small[:10], large[:10])
    steps = [payload[grid].clone().view(torch.float32)[1].item() for payload in (small, large)]
    assert steps[1] == steps[0] * 2.0**power


def test_absolute_bits_fall_with_the_numbers() -> None:
    sizes = [len(encode(normal(100_000) * scale, "abs")) * 8 / 100_000 for scale in (1.0, 0.1, 0.01, 0.001)]
    assert sizes[0] == pytest.approx(8.05, abs=0.1) and sizes[1] == pytest.approx(4.73, abs=0.1)
    assert sizes[2] < 1.6 and sizes[3] < 0.02


def test_what_is_too_far_away_is_cut_off() -> None:
    values = torch.zeros(10)
    values[3], values[4] = 1e9, -1e9
    found = decode(encode(values, "abs", step=0.5))
    assert found[3] == FURTHEST / 2 and found[4] == -FURTHEST / 2


def test_a_snapshot_may_leave_out_outliers() -> None:
    values = torch.cat([normal(10_000), torch.tensor([1000.0, -1000.0])])
    whole, cut = (decode(encode(values, "snapshot", outliers=part)) for part in (0.0, 0.001))
    assert (whole - values).abs()[:10_000].mean() > 50 * (cut - values).abs()[:10_000].mean()
    assert 2.5 < cut.max() < 4 and -4 < cut.min() < -2.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_are_rounded_too(dtype: torch.dtype) -> None:
    values = normal(100).to(dtype)
    assert torch.equal(decode(encode(values)), decode(encode(values.float())))


def test_non_contiguous_tensors_and_parameters() -> None:
    values = torch.nn.Parameter(normal(6, 8).t())
    assert torch.equal(decode(encode(values)), decode(encode(values.detach().contiguous())))


def test_bad_arguments_are_named() -> None:
    values = torch.ones(3)
    for wrong, message in [
        (
            {"mode": "relative"},
            "mode 'relative' of the entropy codec is unknown .allowed: abs, lossless, rel, snapshot",
        ),
        ({"step": 0.0}, "step must be a positive number.*step=0.0"),
        ({"step": math.inf}, "step=inf"),
        ({"mode": "snapshot", "step": 1.0}, "with mode 'rel' or 'abs', got step=1.0 with 'snapshot'"),
        ({"bits": 17}, "bits=17"),
        ({"outliers": 0.5}, "outliers=0.5"),
        ({"mode": "abs", "reference": 0.0}, "reference=0.0"),
    ]:
        with pytest.raises(UsageError, match=message):
            encode(values, **wrong)
    with pytest.raises(UsageError, match=r"only tensors of floats.*int64"):
        encode(torch.arange(3))


@pytest.mark.parametrize("mode", ["rel", "abs", "snapshot"])
def test_what_is_not_finite_is_refused_and_counted(mode: str) -> None:
    with pytest.raises(UsageError, match="a tensor with 2 NaN and 1 infinite numbers"):
        encode(torch.tensor([1.0, math.nan, math.inf, math.nan]), mode)


def test_without_the_package_the_fast_coder_does_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal(5000)
    with only(Ans):
        packet = encode(values)
    monkeypatch.setitem(sys.modules, "constriction", None)
    symbol_coders.constriction.cache_clear()
    for step in (0.01, 1.0, 5.0):
        assert decode(encode(values, step=step)).shape == values.shape
    with pytest.raises(UsageError, match=r"needs the package constriction: pip install 'leantrain\[entropy\]'"):
        decode(packet)


# Packets.


def test_it_is_a_codec() -> None:
    codec, values = named("entropy"), normal(4, 5)
    packet = codec.encode(values)
    assert codec.name == "entropy" and packet.dtype == torch.uint8
    assert torch.equal(codec.decode(packet), decode(packet.numpy().tobytes()).view(-1))
    assert torch.equal(codec.encode(values), packet)


@pytest.mark.parametrize("mode", MODES)
def test_every_damaged_byte_is_noticed(mode: str) -> None:
    packet = bytearray(encode(normal(40), mode))
    for place in range(len(packet)):
        for bit in (1, 128):
            packet[place] ^= bit
            with pytest.raises(PacketError):
                decode(bytes(packet))
            packet[place] ^= bit
    decode(bytes(packet))


@settings(max_examples=300, **SLOW)
@given(st.data())
def test_damage_behind_a_valid_checksum_is_refused_or_harmless(data: st.DataObject) -> None:
    """A sender of another version, or a broken one: its packets are intact and mean nothing."""
    mode = data.draw(st.sampled_from(MODES))
    values = normal(data.draw(st.sampled_from([1, 3, 50, 700])), seed=1)
    with only(data.draw(st.sampled_from([Ans, Huffman]))):
        payload = bytearray(unseal(encode(values, mode), Kind.ENTROPY).payload.numpy().tobytes())
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    payload = payload[: data.draw(st.integers(max(0, len(payload) - 5), len(payload)))]
    forged = seal(Kind.ENTROPY, torch.tensor(list(payload), dtype=torch.uint8), values.numel())
    try:
        found = decode(forged)
    except PacketError:
        return
    assert found.numel() == values.numel()


@settings(max_examples=300, **SLOW)
@given(st.binary(max_size=200), st.integers(0, 100))
def test_noise_in_an_intact_packet_is_refused_or_harmless(noise: bytes, numel: int) -> None:
    packet = seal(Kind.ENTROPY, torch.tensor(list(noise), dtype=torch.uint8), numel)
    with suppress(PacketError):
        assert decode(packet).numel() == numel


def test_a_decoder_that_reads_otherwise_is_noticed() -> None:
    """The checksum of a chunk is of the symbols: swap two counts of the table, and all else still adds up."""
    integers = np.array([0] * 300 + [1] * 200 + [5] * 100, np.int32)
    np.random.default_rng(0).shuffle(integers)
    with only(Ans):
        coded = bytearray(encode_integers(integers))
    assert coded[9:17] == bytes([0, 299 & 127 | 128, 2, 0, 199 & 127 | 128, 1, 3, 99])
    coded[10:12], coded[13:15] = coded[13:15], coded[10:12]
    with pytest.raises(PacketError, match=r"chunk 1 of 1 of coded integers is damaged"):
        decode_integers(np.frombuffer(bytes(coded), np.uint8), len(integers))


@each_coder
def test_each_chunk_is_checked_by_itself(coder: type[Ans | Huffman]) -> None:
    integers = np.random.default_rng(0).integers(0, 3, 200_000).astype(np.int32) ** 2
    with only(coder):
        coded = bytearray(encode_integers(integers))
    coded[-10] ^= 4
    with pytest.raises(PacketError, match="chunk 4 of 4"):
        decode_integers(np.frombuffer(bytes(coded), np.uint8), len(integers))


# Streams of weights.


def test_a_stream_gives_the_grid_of_each_moment_without_drift() -> None:
    sender, receiver = WeightSender(step=1 / 8, key_every=7, reference=0.5), WeightReceiver()
    weights = normal(300)
    for _ in range(20):
        weights = weights + 0.02 * normal(300, seed=int(weights.sum() * 1e3) % 1000)
        found = receiver.receive(sender.send(weights))
        assert found is not None
        assert torch.equal(found, (weights / 0.0625).round() * 0.0625)


def test_changes_are_short() -> None:
    sender, weights = WeightSender(), normal(10_000)
    key = sender.send(weights)
    assert len(sender.send(weights + 1e-4)) < len(key) / 10


def test_who_joins_late_waits_for_a_key_frame() -> None:
    sender, late = WeightSender(key_every=3), WeightReceiver()
    packets = [sender.send(normal(50, seed=seed)) for seed in range(5)]
    assert late.receive(packets[1]) is None and late.receive(packets[2]) is None
    third = late.receive(packets[3])
    assert third is not None and (third - normal(50, seed=3)).abs().max() <= 1 / 128 + 1e-6
    assert late.receive(packets[4]) is not None


def test_a_missed_frame_is_noticed_until_the_next_key_frame() -> None:
    sender, receiver = WeightSender(key_every=4), WeightReceiver()
    packets = [sender.send(normal(50, seed=seed)) for seed in range(6)]
    receiver.receive(packets[0])
    for number in (2, 3):  # 1 was lost
        with pytest.raises(PacketError, match=f"frame {number} of weights does not continue what was received last"):
            receiver.receive(packets[number])
    assert receiver.receive(packets[4]) is not None and receiver.receive(packets[5]) is not None


def test_a_sender_goes_on_from_its_state() -> None:
    first, second, receiver = WeightSender(), WeightSender(), WeightReceiver()
    second.load_state_dict(first.state_dict())
    receiver.receive(first.send(normal(50)))
    second.load_state_dict(first.state_dict())
    packet = second.send(normal(50, seed=1))
    assert torch.equal(packet, first.send(normal(50, seed=1)))
    assert receiver.receive(packet) is not None


def test_frames_and_coded_tensors_are_not_confused() -> None:
    frame = WeightSender().send(torch.ones(1))
    with pytest.raises(PacketError):
        decode(frame)
    with pytest.raises(PacketError):
        WeightReceiver().receive(encode(torch.ones(1)))
    with pytest.raises(UsageError, match="key_every=0"):
        WeightSender(key_every=0)
    sender = WeightSender()
    sender.send(torch.ones(3))
    with pytest.raises(UsageError, match="a stream of 3 weights cannot go on with 4"):
        sender.send(torch.ones(4))


@settings(max_examples=150, **SLOW)
@given(st.data())
def test_forged_frames_are_refused_or_harmless(data: st.DataObject) -> None:
    sender, receiver = WeightSender(), WeightReceiver()
    receiver.receive(sender.send(normal(30)))
    packet = sender.send(normal(30, seed=1))
    payload = packet[HEADER:].clone()
    payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = receiver.receive(seal(Kind.ENTROPY, payload, 30, tag=1))
    except PacketError:
        assert receiver.receive(packet) is not None  # it stayed as it was
        return
    assert found is not None and found.numel() == 30
