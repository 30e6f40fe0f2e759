"""Rotary positions against complex arithmetic, and attention against PyTorch's own module."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from leantrain.nn.attention import Attention, rotary_table, rotate

CPU = torch.device("cpu")


def table(length: int, head_dim: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_table(length, head_dim, 10_000.0, device=CPU, dtype=dtype)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(pairs=st.integers(1, 9), length=st.integers(1, 40), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_rotation_is_a_complex_multiplication_of_each_pair(pairs: int, length: int, seed: int) -> None:
    x = drawn(seed, 2, 3, length, 2 * pairs)
    frequency = torch.tensor([10_000.0 ** (-2 * i / (2 * pairs)) for i in range(pairs)], dtype=torch.float64)
    turn = torch.polar(torch.ones(length, pairs, dtype=torch.float64), torch.arange(length)[:, None] * frequency)
    expected = torch.complex(x[..., :pairs], x[..., pairs:]) * turn
    result = rotate(x, table(length, 2 * pairs))
    torch.testing.assert_close(result, torch.cat((expected.real, expected.imag), -1), rtol=0, atol=1e-12)


@given(pairs=st.integers(1, 9), a=st.integers(0, 60), b=st.integers(0, 60), by=st.integers(0, 60))
@settings(max_examples=50, deadline=None)
def test_a_rotated_dot_product_depends_on_the_distance_only(pairs: int, a: int, b: int, by: int) -> None:
    q, k = drawn(1, 2 * pairs), drawn(2, 2 * pairs)
    length = max(a, b) + by + 1
    rotary = table(length, 2 * pairs)
    q_at, k_at = (rotate(x.expand(1, 1, length, -1), rotary)[0, 0] for x in (q, k))
    torch.testing.assert_close(q_at[a] @ k_at[b], q_at[a + by] @ k_at[b + by], rtol=0, atol=1e-11)


def test_distances_differ_from_one_another() -> None:
    q_at = rotate(torch.ones(1, 1, 8, 6, dtype=torch.float64), table(8, 6))[0, 0]
    products = q_at[0] @ q_at.T
    assert products.unique().numel() == 8


def test_the_first_position_is_not_turned() -> None:
    x = drawn(0, 1, 1, 1, 10)
    assert torch.equal(rotate(x, table(1, 10)), x)


def test_a_bfloat16_input_is_turned_in_float32_and_rounded_once() -> None:
    x = drawn(0, 1, 2, 4000, 64).to(torch.bfloat16)
    result = rotate(x, table(4000, 64, torch.float32))
    assert result.dtype == torch.bfloat16
    exact = rotate(x.double(), table(4000, 64))
    # One rounding to 8 bits is 2^-9 of the value; 1e-2 leaves room for float32 angles at position 4000.
    torch.testing.assert_close(result.double(), exact, rtol=2**-8, atol=1e-2)
    assert (result.double() - exact).abs().mean() < 2**-9


def test_attention_equals_pytorchs_multihead_attention_with_the_same_weights() -> None:
    torch.manual_seed(0)
    ours = Attention(24, 3, causal=False, bias=True).double()
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in (ours.q_proj, ours.k_proj, ours.v_proj)]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in (ours.q_proj, ours.k_proj, ours.v_proj)]))
        theirs.out_proj.load_state_dict(ours.o_proj.state_dict())
    x = drawn(0, 2, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0], rtol=1e-12, atol=1e-12)
