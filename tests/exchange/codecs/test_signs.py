"""Packed signs are NumPy's, the vote on them is the sign of the sum of signs, and nothing else changes a bit of it."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leantrain.errors import RunError, UsageError
from leantrain.exchange.codecs import signs
from leantrain.exchange.codecs.signs import OneBit, majority, pack_signs, unpack_signs
from leantrain.exchange.packet import Kind, PacketError, seal

FORMATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LENGTHS = [*range(258), 4095, 4096, 4097, 100_003]
formats = pytest.mark.parametrize("dtype", FORMATS, ids=str)


def numbers(length: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random ones, with zeros of both signs, infinities and the smallest among them."""
    drawn = torch.randn(length, generator=torch.Generator().manual_seed(seed + length)).to(dtype)
    tiny = torch.finfo(dtype).tiny
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, tiny, -tiny, tiny / 4, -tiny / 4], dtype=dtype)
    drawn[::3] = odd.repeat(len(drawn[::3]) // len(odd) + 1)[: len(drawn[::3])]
    return drawn


def signs_of(values: Tensor) -> Tensor:
    """+1 and -1, number by number; zero of either sign is +1."""
    return torch.tensor([1.0 if value >= 0 else -1.0 for value in values.flatten().tolist()])


@formats
def test_signs_come_back_at_every_length(dtype: torch.dtype) -> None:
    for length in LENGTHS if dtype == torch.float32 else LENGTHS[::7]:
        values = numbers(length, dtype)
        packed = pack_signs(values)
        assert packed.dtype == torch.uint8 and packed.shape == (-(-length // 8),)
        assert torch.equal(unpack_signs(packed, length), signs_of(values))


@formats
def test_signs_come_back_in_every_format(dtype: torch.dtype) -> None:
    values = numbers(203)
    back = unpack_signs(pack_signs(values), 203, dtype)
    assert back.dtype == dtype and torch.equal(back.float(), signs_of(values))


def test_the_first_number_is_the_highest_bit_and_the_last_byte_is_filled_with_zeros() -> None:
    assert pack_signs(torch.tensor([1.0, -1, -1, -1, -1, -1, 0, 1, 5, -2])).tolist() == [0b10000011, 0b10000000]
    values = numbers(1001)
    assert pack_signs(values).tolist() == np.packbits(values.numpy() >= 0).tolist()


@formats
def test_tensors_of_any_layout_are_packed_in_their_logical_order(dtype: torch.dtype) -> None:
    values = numbers(12 * 35, dtype).view(12, 35)
    for view in (
        values.T,
        values[::2, 1::3],
        values[:, 3],
        values.expand(2, 12, 35),
        values.view(4, 3, 35).permute(2, 0, 1),
    ):
        assert torch.equal(pack_signs(view), pack_signs(view.contiguous()))
        assert torch.equal(unpack_signs(pack_signs(view), view.numel()), signs_of(view))
    assert pack_signs(torch.tensor(-3.0, requires_grad=True)).tolist() == [0]


def test_a_number_takes_one_bit() -> None:
    assert pack_signs(torch.ones(25_557_032)).numel() == 25_557_032 // 8
    assert 32 * pack_signs(torch.ones(25_557_024)).numel() == 4 * 25_557_024


@formats
@pytest.mark.parametrize("place", [0, 7, 1000])
def test_a_nan_has_no_sign(dtype: torch.dtype, place: int) -> None:
    for nan in (torch.nan, -torch.nan):
        values = numbers(1001, dtype)
        values[place] = nan
        with pytest.raises(RunError, match="NaN"):
            pack_signs(values)


def test_every_bfloat16_and_float16_there_is_has_the_sign_of_its_number() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        some = every[~every.isnan()]
        assert torch.equal(unpack_signs(pack_signs(some), len(some)) > 0, some.double() >= 0)
        for nan in every[every.isnan()].view(-1, 1):
            with pytest.raises(RunError):
                pack_signs(nan)


@formats
def test_the_operations_for_other_devices_give_the_same_bits(dtype: torch.dtype) -> None:
    for length in (1, 8, 203, 4096):
        values = numbers(length, dtype)
        assert torch.equal(signs._pack_in_torch(values), pack_signs(values))
        packed = pack_signs(values)
        table = signs._table(dtype, torch.device("cpu"))
        found = torch.index_select(table, 0, packed.int()).view(-1)[:length]
        assert torch.equal(found, unpack_signs(packed, length, dtype))


@pytest.mark.parametrize("wrong", [torch.ones(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool)])
def test_only_float_numbers_are_packed(wrong: Tensor) -> None:
    with pytest.raises(UsageError, match="pack_signs takes float16, bfloat16, float32 or float64, got torch"):
        pack_signs(wrong)


@pytest.mark.parametrize(
    ("bits", "numel"),
    [
        (torch.zeros(2, dtype=torch.uint8), 17),
        (torch.zeros(2, dtype=torch.uint8), 8),
        (torch.zeros(2, dtype=torch.uint8), -1),
        (torch.zeros(1, 2, dtype=torch.uint8), 16),
        (torch.zeros(2, dtype=torch.int8), 16),
    ],
)
def test_unpacking_another_number_of_bytes_is_refused(bits: Tensor, numel: int) -> None:
    with pytest.raises(UsageError, match=f"^{numel} packed signs are uint8"):
        unpack_signs(bits, numel)


def counted_by_hand(voters: Tensor, tie: Tensor) -> Tensor:
    """The sign of the sum of signs, in float64; `tie` (+1 or -1) where it is zero."""
    total = voters.double().sum(0)
    return torch.where(total == 0, tie.double(), total.sign()).float()


@settings(max_examples=150, deadline=None)
@given(data=st.data(), voters=st.integers(1, 17), length=st.integers(1, 70))
def test_the_vote_is_the_sign_of_the_sum_of_signs(data: st.DataObject, voters: int, length: int) -> None:
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    ballots = torch.randint(0, 2, (voters, length), generator=generator) * 2.0 - 1
    tie = torch.randint(0, 2, (length,), generator=generator) * 2.0 - 1
    stack = torch.stack([pack_signs(ballot) for ballot in ballots])

    plus = majority(stack)
    assert torch.equal(unpack_signs(plus, length), counted_by_hand(ballots, torch.ones(length)))
    decided = majority(stack, pack_signs(tie))
    assert torch.equal(unpack_signs(decided, length), counted_by_hand(ballots, tie))
    for vote in (plus, decided):
        assert not np.unpackbits(vote.numpy())[length:].any()
    order = torch.randperm(voters, generator=generator)
    assert torch.equal(majority(stack[order]), plus)
    if voters % 2:  # no ties: the opposite of all votes is the opposite vote
        opposite = torch.stack([pack_signs(-ballot) for ballot in ballots])
        assert torch.equal(unpack_signs(majority(opposite), length), -unpack_signs(plus, length))


@pytest.mark.parametrize("voters", range(1, 10))
def test_every_combination_of_votes_is_counted_right(voters: int) -> None:
    ballots = torch.tensor(list(itertools.product([1.0, -1.0], repeat=voters))).T
    vote = majority(torch.stack([pack_signs(ballot) for ballot in ballots]))
    assert torch.equal(unpack_signs(vote, 2**voters), counted_by_hand(ballots, torch.ones(2**voters)))


def test_three_hundred_voters_are_counted_without_a_carry_lost() -> None:
    for plus in (0, 127, 128, 149, 150, 151, 255, 256, 300):
        ballots = torch.where(torch.arange(300)[:, None] < plus, 1.0, -1.0).expand(300, 9)
        vote = majority(torch.stack([pack_signs(ballot) for ballot in ballots]))
        assert unpack_signs(vote, 9).tolist() == [1.0 if plus >= 150 else -1.0] * 9


def test_fewer_than_half_change_nothing_where_the_others_agree() -> None:
    honest, liar = pack_signs(numbers(100)), pack_signs(-numbers(100, seed=5))
    for voters in range(1, 10):
        for liars in range((voters - 1) // 2 + 1):
            assert torch.equal(majority(torch.stack([honest] * (voters - liars) + [liar] * liars)), honest)


def test_the_vote_does_not_write_into_what_it_reads() -> None:
    stack = torch.stack([pack_signs(numbers(80, seed=seed)) for seed in range(4)])
    ties = pack_signs(numbers(80, seed=9))
    before = stack.clone(), ties.clone()
    majority(stack, ties)[:] = 0
    majority(stack[:1])[:] = 0
    assert torch.equal(stack, before[0]) and torch.equal(ties, before[1])


@pytest.mark.parametrize(
    "wrong", [torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8)]
)
def test_a_vote_needs_voters(wrong: Tensor) -> None:
    with pytest.raises(UsageError, match=r"majority takes uint8 \[voters, bytes\]"):
        majority(wrong)


def test_ties_of_another_shape_are_refused() -> None:
    with pytest.raises(UsageError, match=r"ties must be uint8 \[3\], got torch.uint8 \[2\]"):
        majority(torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8))


@formats
@settings(max_examples=30, deadline=None)
@given(length=st.integers(0, 90), seed=st.integers(0, 1000))
def test_one_bit_is_the_sign_times_the_mean_magnitude(dtype: torch.dtype, length: int, seed: int) -> None:
    values = torch.randn(length, generator=torch.Generator().manual_seed(seed)).to(dtype)
    packet = OneBit().encode(values)
    assert packet.numel() == 32 + 4 + -(-length // 8)
    scale = values.double().abs().mean().item() if length else 0.0
    expected = signs_of(values).double() * scale
    torch.testing.assert_close(OneBit().decode(packet).double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(OneBit().decode(bytes(packet.numpy())), OneBit().decode(packet))


def test_one_bit_with_a_residual_loses_nothing_in_the_long_run() -> None:
    codec, residual, sent = OneBit(), torch.zeros(50), torch.zeros(50)
    target = torch.randn(50, generator=torch.Generator().manual_seed(3))
    for _ in range(2000):
        wanted = target + residual
        told = codec.decode(codec.encode(wanted))
        residual, sent = wanted - told, sent + told
    torch.testing.assert_close(sent / 2000, target, rtol=0, atol=0.05)
    assert (codec.decode(codec.encode(target)) - target).abs().max() > 0.5  # without one it does


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_one_bit_refuses_what_has_no_mean(odd: float) -> None:
    with pytest.raises(RunError, match="one-bit coding"):
        OneBit().encode(torch.tensor([1.0, odd, 2.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("payload", "numel", "message"),
    [
        ([0, 0, 0, 0], 1, "of 1 numbers has 4 bytes, 5 are expected"),
        ([0, 0, 0, 0, 1, 1], 8, "of 8 numbers has 6 bytes, 5 are expected"),
        ([], 0, "of 0 numbers has 0 bytes, 4 are expected"),
        ([0, 0, 0, 0, 1], 2**60, "are expected"),
        ([0, 0, 0xC0, 0x7F, 1], 1, "the scale nan"),
        ([0, 0, 0x80, 0x7F, 1], 1, "the scale inf"),
        ([0, 0, 0x80, 0xBF, 1], 1, "the scale -1.0"),
    ],
)
def test_a_one_bit_packet_that_contradicts_itself_is_refused(payload: list[int], numel: int, message: str) -> None:
    with pytest.raises(PacketError, match=message):
        OneBit().decode(seal(Kind.SIGNS, torch.tensor(payload, dtype=torch.uint8), numel))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_one_bit_packets_are_refused_whatever_the_damage(data: st.DataObject) -> None:
    packet = bytearray(OneBit().encode(numbers(45, seed=1).nan_to_num(0.0, 1.0, -1.0)).numpy())
    place = data.draw(st.integers(0, len(packet) - 1))
    if data.draw(st.booleans()):
        packet[place] ^= data.draw(st.integers(1, 255))
    else:
        packet = packet[:place]
    with pytest.raises(PacketError):
        OneBit().decode(bytes(packet))


def test_packing_is_an_order_faster_than_in_torch_alone() -> None:
    values = torch.randn(1 << 20)

    def best(work: object) -> float:
        times = []
        for _ in range(15):
            start = time.perf_counter()
            work()  # type: ignore[operator]
            times.append(time.perf_counter() - start)
        return min(times)

    packed = pack_signs(values)
    ours = best(lambda: unpack_signs(pack_signs(values), len(values)))
    plain = best(lambda: signs._pack_in_torch(values)) + best(
        lambda: (packed[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8) & 1).view(-1).float() * 2 - 1
    )
    assert ours < plain / 3, (ours, plain)
