"""Lossless coding: every bit of every float comes back, in fewer bytes where there is something to save."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.exchange.packet import Kind, PacketError, seal, unseal

pytest.importorskip("constriction")

from leantrain.exchange.codecs.entropy import decode, encode
from leantrain.exchange.codecs.lossless import DTYPES

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same_bits(left: Tensor, right: Tensor) -> bool:
    whole = torch.int32 if left.element_size() == 4 else torch.int16
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left.view(whole), right.view(whole))


@each_dtype
def test_every_pattern_of_16_bits_comes_back(dtype: torch.dtype) -> None:
    """NaN with each of its payloads, both zeros, subnormal numbers: all there are."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = patterns.view(dtype) if dtype.itemsize == 2 else patterns.repeat_interleave(2).roll(1).view(dtype)
    assert same_bits(decode(encode(values, "lossless")), values)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=4), st.integers(0, 2**32 - 1), st.booleans())
def test_every_shape_comes_back(dtype: torch.dtype, shape: list[int], seed: int, noise: bool) -> None:
    if noise:  # any bits at all
        random = np.random.default_rng(seed).integers(0, 2 ** (8 * dtype.itemsize), shape, np.uint32)
        values = torch.from_numpy(random.astype(f"u{dtype.itemsize}").view(f"i{dtype.itemsize}")).view(dtype)
    else:
        values = normal(*shape, seed=seed).to(dtype)
    assert same_bits(decode(encode(values, "lossless")), values)


@each_dtype
def test_non_contiguous_tensors_come_back(dtype: torch.dtype) -> None:
    values = normal(6, 8).to(dtype).t()[::2]
    assert same_bits(decode(encode(values, "lossless")), values.contiguous())


def exponent_entropy(values: Tensor) -> float:
    """Bits of the exponents, by the definition, from float64."""
    _, exponents = np.frexp(values.double().numpy())
    counts = Counter(exponents.tolist()).values()
    return -sum(c / len(values) * math.log2(c / len(values)) for c in counts)


@pytest.mark.parametrize(("dtype", "rest"), [(torch.float32, 24), (torch.bfloat16, 8)])
def test_exponents_cost_their_entropy_and_the_rest_its_width(dtype: torch.dtype, rest: int) -> None:
    """Nearly its width: a normal distribution makes the first bits of a mantissa a little uneven."""
    values = (0.02 * normal(200_000)).to(dtype)
    found = 8 * len(encode(values, "lossless")) / len(values)
    wanted = rest + exponent_entropy(values)
    assert wanted - 0.2 < found < wanted + 0.02


def test_bfloat16_numbers_in_float32_cost_what_they_cost_in_bfloat16() -> None:
    values = normal(50_000).bfloat16()
    narrow, wide = (len(encode(v, "lossless")) for v in (values, values.float()))
    assert wide < narrow * 1.01 + 100


def test_constant_tensors_cost_nothing() -> None:
    assert len(encode(torch.full((100_000,), math.pi), "lossless")) < 150


def test_other_types_are_refused() -> None:
    with pytest.raises(UsageError, match="lossless coding takes float32, bfloat16, float16, got float64"):
        encode(torch.ones(3, dtype=torch.float64), "lossless")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_damage_behind_a_valid_checksum_is_refused_or_harmless(data: st.DataObject) -> None:
    values = normal(data.draw(st.sampled_from([1, 40, 300]))).to(data.draw(st.sampled_from(DTYPES)))
    payload = unseal(encode(values, "lossless"), Kind.ENTROPY).payload.clone()
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    payload = payload[: data.draw(st.integers(max(0, len(payload) - 30), len(payload)))]
    try:
        found = decode(seal(Kind.ENTROPY, payload, values.numel()))
    except PacketError:
        return
    assert found.numel() == values.numel()
