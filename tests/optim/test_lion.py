"""Lion against bitsandbytes' own, and its laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from leantrain.optim import Chain, Lion, state_bytes

SHAPES = [(12, 8), (12, 8), (8,)]


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], factor: float = 1.0) -> None:
    for step in range(20):
        generator = torch.Generator().manual_seed(1000 + step)
        for param in params:
            param.grad = factor * torch.randn(param.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.8)])
def test_follows_bitsandbytes_over_twenty_steps(betas: tuple[float, float]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    expected, params = weights(), weights()
    train(bitsandbytes.optim.Lion32bit(expected, lr=1e-2, betas=betas, weight_decay=0.1), expected)
    train(Chain(params, Lion(betas), lr=1e-2, weight_decay=0.1), params)
    for a, b in zip(expected, params, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


@given(st.integers(-20, 20))
@settings(max_examples=10, deadline=None)
def test_the_size_of_the_gradients_does_not_matter(power: int) -> None:
    plain, scaled = weights(), weights()
    train(Chain(plain, Lion()), plain)
    train(Chain(scaled, Lion()), scaled, factor=2.0**power)
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))


def test_every_number_moves_by_the_learning_rate() -> None:
    params = weights()
    start = [param.detach().clone() for param in params]
    optimizer = Chain(params, Lion(), lr=0.125)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    for before, after in zip(start, params, strict=True):
        torch.testing.assert_close(before - after, torch.full_like(before, 0.125))


def test_state_is_one_number_per_number() -> None:
    params = weights()
    optimizer = Chain(params, Lion())
    train(optimizer, params)
    assert state_bytes(optimizer) == 4 * sum(param.numel() for param in params)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, -0.1), (0.9,)])
def test_a_wrong_setting_is_named_with_its_value(betas: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="betas") as error:
        Lion(betas)
    assert str(betas) in str(error.value)
