"""Packets: what was sealed comes out, and nothing else ever does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.exchange.codecs.codec import CODECS, Codec, named
from leantrain.exchange.codecs.entropy import Entropy
from leantrain.exchange.packet import HEADER, Flag, Kind, PacketError, seal, split, unseal

ALL: dict[str, Codec] = {name: named(name) for name in CODECS} | {"lossless": Entropy(mode="lossless")}
FUZZED, AT_ONCE = 100_000, 250


@given(
    payload=st.binary(max_size=300), kind=st.sampled_from(list(Kind)), numel=st.integers(0, 2**63),
    tag=st.integers(0, 2**32 - 1),
    flag=st.sampled_from(list(Flag)), padding=st.integers(0, 40),
)  # fmt: skip
def test_what_was_sealed_comes_out(payload: bytes, kind: Kind, numel: int, tag: int, flag: Flag, padding: int) -> None:
    contents = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)
    packet = seal(kind, contents, numel, tag, flag)
    assert packet.numel() == HEADER + len(payload)
    padded = torch.cat([packet, torch.zeros(padding, dtype=torch.uint8)])
    for arrived in (padded, bytes(padded.tolist())):
        found = unseal(arrived, kind, numel, tag)
        assert torch.equal(found.payload, contents)
        assert (found.numel, found.tag, found.flags) == (numel, tag, flag)


@given(payload=st.binary(max_size=60), data=st.data())
def test_a_bit_that_was_flipped_is_noticed_wherever_it_is(payload: bytes, data: st.DataObject) -> None:
    contents = torch.tensor(list(payload), dtype=torch.uint8)
    packet = seal(Kind.DENSE, contents, 5, tag=7)
    bit = data.draw(st.integers(0, 8 * packet.numel() - 1))
    packet[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PacketError):
        unseal(packet, Kind.DENSE)


@given(payload=st.binary(max_size=60), data=st.data())
def test_a_packet_that_was_cut_off_is_refused(payload: bytes, data: st.DataObject) -> None:
    packet = seal(Kind.SIGNS, torch.tensor(list(payload), dtype=torch.uint8), 3)
    length = data.draw(st.integers(0, packet.numel() - 1))
    with pytest.raises(PacketError, match=r"cut off|its header alone"):
        unseal(packet[:length], Kind.SIGNS)


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({"kind": Kind.TOP_K}, "of kind SIGNS, and TOP_K is expected"),
        ({"kind": Kind.SIGNS, "numel": 4}, "stands for 3 numbers, and 4 are expected"),
        ({"kind": Kind.SIGNS, "tag": 1}, "has tag 0x9, and 0x1 is expected: the processes are out of step"),
    ],
)
def test_a_foreign_packet_is_refused_with_the_difference(expected: dict[str, int], words: str) -> None:
    packet = seal(Kind.SIGNS, torch.ones(1, dtype=torch.uint8), 3, tag=9)
    with pytest.raises(PacketError, match=words):
        unseal(packet, **expected)


def test_numbers_outside_of_the_payload_are_refused() -> None:
    found = unseal(seal(Kind.DENSE, torch.arange(9, dtype=torch.uint8), 2), Kind.DENSE)
    assert found.numbers(torch.float32, 1, 2).numel() == 2  # not aligned: copied
    for start, count in ((0, 3), (8, 1), (-4, 1), (0, -1)):
        with pytest.raises(PacketError, match="has no bytes"):
            found.numbers(torch.float32, start, count)
    with pytest.raises(PacketError, match="has no bytes"):
        found.numbers(torch.float32)  # 9 bytes are not a whole number of floats


@given(st.lists(st.binary(max_size=20), max_size=5), st.integers(1, 20))
def test_a_message_is_split_into_its_packets(payloads: list[bytes], missing: int) -> None:
    packets = [seal(Kind.DENSE, torch.tensor(list(each), dtype=torch.uint8), 1) for each in payloads]
    message = torch.cat([*packets, torch.empty(0, dtype=torch.uint8)])
    assert all(torch.equal(a, b) for a, b in zip(split(message), packets, strict=True))
    if packets:
        with pytest.raises(PacketError, match=r"cut off|has no packet"):
            split(message[:-missing] if missing % HEADER else torch.cat([message, message[:5]]))


@pytest.mark.parametrize("name", ALL)
def test_a_codec_gives_back_as_many_numbers_as_it_was_given(name: str) -> None:
    for shape in ((), (1,), (7,), (33, 5), (2, 3, 4)):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        decoded = ALL[name].decode(ALL[name].encode(values, 1.0))
        assert decoded.shape == (values.numel(),)
        assert decoded.dtype == torch.float32


def test_an_unknown_codec_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="codec 'one_bit' is unknown; did you mean 'one-bit'"):
        named("one_bit")


@settings(max_examples=FUZZED // AT_ONCE, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(sorted(ALL)), numel=st.integers(0, 300))
def test_a_hundred_thousand_damaged_packets_are_all_refused_or_harmless(seed: int, name: str, numel: int) -> None:
    """Cut, flipped, swapped, random; and with a valid header and checksum around a damaged payload, as a liar would
    make it: such a packet may be read as other numbers, but nothing else may happen."""
    random, codec = np.random.default_rng(seed), ALL[name]
    whole = codec.encode(torch.from_numpy(random.standard_normal(numel).astype(np.float32)), 1.0)
    for _ in range(AT_ONCE):
        damaged, resealed = _damage(whole, random)
        if torch.equal(damaged, whole):
            continue
        try:
            decoded = codec.decode(damaged)
        except PacketError as error:
            assert str(error)
            continue
        assert resealed, "a packet with a wrong checksum was believed"
        assert decoded.dtype == torch.float32
        assert decoded.numel() <= 2**20


def _damage(packet: Tensor, random: np.random.Generator) -> tuple[Tensor, bool]:
    """Another packet, and whether its header and checksum are in order again."""
    damaged, kind = packet.clone(), random.integers(6)
    if kind == 0:
        return damaged[: random.integers(packet.numel())], False
    if kind == 1:
        return torch.from_numpy(random.integers(0, 256, packet.numel(), dtype=np.uint8)), False
    if kind == 2:
        for place in random.integers(packet.numel(), size=random.integers(1, 4)):
            damaged[place] ^= int(random.integers(1, 256))
        return damaged, False
    found = unseal(packet)
    payload, numel = found.payload.clone(), found.numel
    if kind == 3 and payload.numel():
        for place in random.integers(payload.numel(), size=random.integers(1, 9)):
            payload[place] = int(random.integers(256))
    elif kind == 4:
        payload = payload[: random.integers(payload.numel() + 1)]
    else:
        numel = int(random.choice([0, 1, numel + 1, max(0, numel - 1), 2**16, 2**20, 2**40, 2**63]))
    return seal(Kind(int(packet[5])), payload, numel), True
