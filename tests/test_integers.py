"""Real numbers as small integers on grids of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leantrain.errors import UsageError
from leantrain.integers import Integers, decode, encode, pack, unpack


@given(
    count=st.integers(0, 40),
    bits=st.integers(1, 8),
    group=st.integers(1, 16),
    centre=st.sampled_from([0.0, 5.5, -300.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_every_number_takes_the_nearest_value_of_its_groups_grid(
    count: int, bits: int, group: int, centre: float, seed: int
):
    values = centre + torch.randn(count, generator=torch.Generator().manual_seed(seed))
    stored = encode(values, bits, group)
    decoded = decode(stored, group)
    assert stored.codes.shape == values.shape and stored.codes.dtype == torch.uint8
    assert len(stored.scale) == len(stored.low) == -(-count // group)
    for start in range(0, count, group):
        part = values[start : start + group].double().numpy()
        grid = np.linspace(part.min(), part.max(), 2**bits)
        nearest = np.abs(part[:, None] - grid).min(1)
        found = np.abs(part - decoded[start : start + group].double().numpy())
        np.testing.assert_allclose(found, nearest, atol=1e-6 * (1 + abs(centre)) * 2)


def test_stochastic_rounding_is_right_on_average_and_never_off_by_a_step():
    values = torch.rand(32)
    values[0], values[1] = 0.0, 1.0
    draws = torch.stack([
        decode(encode(values, 4, 32, torch.Generator().manual_seed(number)), 32) for number in range(2000)
    ])  # fmt: skip
    step = 1 / 15
    assert (draws - values).abs().max() < step
    assert (draws.mean(0) - values).abs().max() < 5 * step / 2 / 2000**0.5
    assert torch.equal(draws[:, :2], torch.tensor([0.0, 1.0]).expand(2000, 2))


def test_shape_and_dtype_are_kept_and_nothing_more_is_held():
    values = torch.randn(3, 5, 7)
    stored = encode(values, group=16)
    assert decode(stored, 16, torch.bfloat16).shape == values.shape
    assert decode(stored, 16, torch.bfloat16).dtype == torch.bfloat16
    assert stored.codes.untyped_storage().nbytes() == 105
    noncontiguous = encode(values.mT, group=16)
    torch.testing.assert_close(decode(noncontiguous, 16), values.mT, atol=0.02, rtol=0)


def test_a_constant_group_is_exact():
    assert torch.equal(decode(encode(torch.full((300,), 0.1))), torch.full((300,), 0.1))


@given(count=st.integers(0, 33), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_packing_puts_two_codes_into_a_byte_and_loses_none(count: int, seed: int):
    codes = torch.randint(16, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes)
    assert packed.dtype == torch.uint8 and len(packed) == -(-count // 2)
    assert torch.equal(unpack(packed, codes.shape), codes)
    if count > 1:
        assert packed[0].item() == codes[0].item() + 16 * codes[1].item()


def test_a_packed_matrix_comes_back_as_one():
    codes = torch.arange(15, dtype=torch.uint8).view(3, 5)
    assert torch.equal(unpack(pack(codes), (3, 5)), codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"bits": 0}, "bits must be in .* bits=0"), ({"bits": 9}, "bits=9"), ({"group": 0}, "group must be >= 1")],
)
def test_sizes_that_cannot_be_are_refused(arguments: dict[str, int], message: str):
    with pytest.raises(UsageError, match=message):
        encode(torch.zeros(4), **arguments)


def test_a_number_that_is_not_finite_spoils_its_own_group_only():
    values = torch.zeros(8)
    values[1] = float("inf")
    decoded = decode(Integers(*encode(values, group=4)), 4)
    assert not torch.isfinite(decoded[1]) and torch.equal(decoded[4:], torch.zeros(4))
