"""A linear layer as a product of two thin ones."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from leantrain.errors import UsageError
from leantrain.nn import num_parameters
from leantrain.nn.factored import FactoredLinear


def best_of_rank(weight: torch.Tensor, rank: int) -> np.ndarray:
    """The truncated decomposition, by NumPy in float64."""
    u, s, vt = np.linalg.svd(weight.detach().double().numpy(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@given(rows=st.integers(1, 20), columns=st.integers(1, 20), share=st.floats(0, 1), bias=st.booleans())
@settings(max_examples=40, deadline=None)
def test_it_is_the_best_layer_of_its_rank(rows: int, columns: int, share: float, bias: bool):
    torch.manual_seed(rows * 31 + columns)
    linear = nn.Linear(columns, rows, bias=bias)
    rank = max(1, round(share * min(rows, columns)))
    factored = FactoredLinear.from_linear(linear, rank)
    merged = factored.merge()
    np.testing.assert_allclose(merged.weight.detach().numpy(), best_of_rank(linear.weight, rank), atol=1e-5)
    error = (merged.weight - linear.weight).norm().item()
    tail = np.linalg.svd(linear.weight.detach().double().numpy(), compute_uv=False)[rank:]
    assert error == pytest.approx(float(np.sqrt((tail**2).sum())), abs=1e-4)
    assert merged.bias is factored.up.bias is linear.bias
    assert num_parameters(factored) == rank * (rows + columns) + (rows if bias else 0)
    x = torch.randn(3, 2, columns)
    torch.testing.assert_close(factored(x), merged(x), atol=1e-5, rtol=1e-5)


def test_at_full_rank_it_computes_what_the_layer_computed():
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 32), torch.randn(5, 48)
    torch.testing.assert_close(FactoredLinear.from_linear(linear, 32)(x), linear(x), atol=1e-5, rtol=1e-5)


def test_both_factors_take_the_same_share_of_the_singular_values():
    torch.manual_seed(0)
    factored = FactoredLinear.from_linear(nn.Linear(20, 12), 5)
    up, down = factored.up.weight.detach(), factored.down.weight.detach()
    torch.testing.assert_close(up.T @ up, down @ down.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_kept_and_half_precision_is_decomposed_in_float32(dtype: torch.dtype):
    torch.manual_seed(0)
    linear = nn.Linear(24, 16).to(dtype)
    factored = FactoredLinear.from_linear(linear, 6)
    assert {p.dtype for p in factored.parameters()} == {dtype}
    error = np.abs(factored.merge().weight.detach().double().numpy() - best_of_rank(linear.weight, 6)).max()
    assert error < {torch.bfloat16: 5e-3, torch.float16: 5e-4, torch.float64: 1e-12}[dtype]


def test_the_layer_itself_is_left_alone_and_its_settings_are_taken_over():
    torch.manual_seed(0)
    linear = nn.Linear(6, 8).eval()
    linear.weight.requires_grad_(False)
    before = copy.deepcopy(linear.state_dict())
    factored = FactoredLinear.from_linear(linear, 2)
    assert [name for name, p in factored.named_parameters() if p.requires_grad] == ["up.bias"]
    assert not factored.training and not factored.up.training
    assert not factored.merge().weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())


def test_hugging_faces_transposed_layer_is_factored_too():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    conv = pytorch_utils.Conv1D(12, 7)  # 7 inputs, 12 outputs
    nn.init.normal_(conv.bias)
    x = torch.randn(4, 7)
    factored = FactoredLinear.from_linear(conv, 7)
    assert (factored.in_features, factored.out_features) == (7, 12)
    torch.testing.assert_close(factored(x), conv(x), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(
        FactoredLinear.from_linear(conv, 3).merge().weight.detach().numpy(), best_of_rank(conv.weight.T, 3), atol=1e-6
    )


def test_a_fresh_one_has_the_variance_of_a_fresh_linear_layer():
    torch.manual_seed(0)
    factored, linear = FactoredLinear(300, 200, rank=20), nn.Linear(300, 200)
    assert factored.merge().weight.std().item() == pytest.approx(linear.weight.std().item(), rel=0.05)
    assert factored.up.bias.std().item() == pytest.approx(linear.bias.std().item(), rel=0.2)


def test_it_saves_numbers_only_below_the_break_even_rank():
    rows, columns = 96, 64
    even = rows * columns / (rows + columns)  # 38.4
    for rank, saves in ((38, True), (39, False)):
        assert (
            (num_parameters(FactoredLinear(columns, rows, rank, bias=False)) < rows * columns) is saves is (rank < even)
        )


def test_its_gradients_are_those_of_the_product():
    torch.manual_seed(0)
    factored = FactoredLinear(7, 5, rank=3, dtype=torch.float64)
    x, towards = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    (factored(x) * towards).sum().backward()
    full = towards.T @ x
    torch.testing.assert_close(factored.up.weight.grad, full @ factored.down.weight.T)
    torch.testing.assert_close(factored.down.weight.grad, factored.up.weight.T @ full)


@pytest.mark.parametrize("rank", [0, 9, -1, 2.0, True])
def test_a_rank_that_cannot_be_is_refused(rank: object):
    with pytest.raises(UsageError, match="rank must be an integer"):
        FactoredLinear(8, 12, rank)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"rank must be an integer in \[1, 8\] for 12 x 8"):
        FactoredLinear.from_linear(nn.Linear(8, 12), rank)  # type: ignore[arg-type]


def test_what_cannot_be_decomposed_is_refused_by_name():
    with pytest.raises(UsageError, match=r"only nn\.Linear .*, got Conv2d"):
        FactoredLinear.from_linear(nn.Conv2d(3, 4, 1), 2)
    linear = nn.Linear(4, 4)
    nn.init.constant_(linear.weight, float("nan"))
    with pytest.raises(UsageError, match=r"shape \[4, 4\] holds numbers that are not finite"):
        FactoredLinear.from_linear(linear, 2)
