"""Momentum against `torch.optim.SGD`, and what a linear rule must not notice: a rotation of its coordinates."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leantrain.optim import Chain, LowRank, Momentum, state_bytes

SHAPES = [(12, 8), (12, 8), (8,)]


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    for step in range(20):
        generator = torch.Generator().manual_seed(1000 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"momentum": 0.0},
        {"momentum": 0.5, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
    ],
)
def test_follows_pytorchs_sgd_over_twenty_steps(options: Mapping[str, float]) -> None:
    expected, params = weights(), weights()
    train(torch.optim.SGD(expected, lr=0.05, **options), expected)
    train(Chain(params, Momentum(**options), lr=0.05), params)
    for a, b in zip(expected, params, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


@given(st.integers(3, 8), st.integers(3, 8), st.sampled_from(["std", "reverse_std", "left", "right"]))
@settings(max_examples=20, deadline=None)
def test_what_lies_in_the_subspace_is_stepped_as_without_it(m: int, n: int, side: str) -> None:
    """Gradients of rank 2, whose span stays, projected to rank 2: the basis that is found anew may not show."""
    generator = torch.Generator().manual_seed(10 * m + n)
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, 2), (2, n)))
    start = torch.randn(m, n, generator=generator, dtype=torch.float64)

    def run(rule: object) -> Tensor:
        param = nn.Parameter(start.clone())
        optimizer = Chain([param], rule, lr=0.1)
        for step in range(9):
            mix = torch.randn(2, 2, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            param.grad = left @ mix @ right
            optimizer.step()
        return param.detach()

    low_rank = LowRank(Momentum(), 2, refresh=2, scale=1.0, on_refresh="rotate", side=side)
    torch.testing.assert_close(run(low_rank), run(Momentum()), rtol=0, atol=1e-10)


def test_state_is_one_number_per_number() -> None:
    params = weights()
    optimizer = Chain(params, Momentum())
    train(optimizer, params)
    assert state_bytes(optimizer) == 4 * sum(param.numel() for param in params)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"dampening": 1.0}, "dampening=1.0"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov needs momentum > 0"),
        ({"nesterov": True, "dampening": 0.1}, "dampening=0.1"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(setting: Mapping[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Momentum(**setting)
