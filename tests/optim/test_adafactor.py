"""Adafactor against Transformers' own, and the laws of a second moment that is kept as row and column means."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leantrain.optim import SVD, Adafactor, Chain, LowRank, state_bytes
from leantrain.optim.rules import State

SHAPES = [(24, 16), (16, 24), (16, 16), (16, 16), (1, 8), (8, 1), (16,), ()]


def weights(shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int = 20, size: float = 1.0) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 + step)
        for param in params:
            param.grad = (size * torch.randn(param.shape, generator=generator)).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("options", [{}, {"decay": -0.5, "eps": 1e-2, "clip": 0.5}])
def test_follows_transformers_to_1e5_over_twenty_steps(beta1: float | None, options: dict[str, float]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    decay, eps, clip = (options.get(name, default) for name, default in (("decay", -0.8), ("eps", 1e-30), ("clip", 1)))
    expected, params = weights(), weights()
    reference = transformers.Adafactor(
        expected, lr=1e-2, eps=(eps, 1e-3), clip_threshold=clip, decay_rate=decay, beta1=beta1,
        scale_parameter=False, relative_step=False,
    )  # fmt: skip
    train(reference, expected)
    train(Chain(params, Adafactor(decay, eps, clip, beta1), lr=1e-2), params)
    for a, b in zip(expected, params, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_a_tensor_is_stepped_as_the_matrix_of_its_first_axis() -> None:
    folded, flat = weights([(6, 2, 4)]), weights([(6, 8)])
    for params in (folded, flat):
        train(Chain(params, Adafactor(beta1=0.9)), params)
    assert torch.equal(folded[0].view(6, 8), flat[0])


def test_state_is_one_number_per_row_and_one_per_column() -> None:
    params = weights([(24, 16), (16,), (4, 3, 3)])
    optimizer = Chain(params, Adafactor())
    train(optimizer, params, 2)
    assert state_bytes(optimizer) == 4 * ((24 + 16) + (1 + 16) + (4 + 9))
    params = weights([(24, 16)])
    optimizer = Chain(params, Adafactor(beta1=0.9))
    train(optimizer, params, 2)
    assert state_bytes(optimizer) == 4 * (24 * 16 + 24 + 16)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_where_squares_are_a_product_of_rows_and_columns_every_number_moves_alike(m: int, n: int, seed: int) -> None:
    """Then nothing is lost in the means, and as in Adam's first step the update is the gradient's sign."""
    generator = torch.Generator().manual_seed(seed)
    row, column = (0.1 + torch.rand(k, generator=generator, dtype=torch.float64) for k in (m, n))
    sign = torch.randint(2, (m, n), generator=generator) * 2 - 1
    grad = (row[:, None] * column * sign).unsqueeze(0)
    rule = Adafactor()
    state = {name: value.unsqueeze(0) for name, value in rule.init(grad[0]).items()}
    update = rule.update(grad, state, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(update[0], sign.double())


@given(st.floats(1e-3, 3.0), st.floats(-3, 6))
@settings(max_examples=20, deadline=None)
def test_an_updates_root_mean_square_is_never_above_the_threshold(threshold: float, power: float) -> None:
    rule = Adafactor(clip_threshold=threshold)
    param = torch.zeros(6, 4)
    state = {name: value.unsqueeze(0) for name, value in rule.init(param).items()}
    for step in range(4):
        # Sudden growth is what the threshold is there for.
        grad = 10.0 ** (power * step) * torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(step))
        update = rule.update(grad, state, torch.tensor([float(step)], dtype=torch.float64))
        assert update.square().mean().sqrt() <= threshold * (1 + 1e-5)


def test_half_precision_weights_keep_means_in_float32() -> None:
    wide, narrow = weights(), weights(dtype=torch.float16)
    optimizer = Chain(narrow, Adafactor(beta1=0.9), lr=1e-2)
    train(optimizer, narrow, 5)
    train(Chain(wide, Adafactor(beta1=0.9), lr=1e-2), wide, 5)
    for a, b in zip(wide, narrow, strict=True):
        torch.testing.assert_close(b.float(), a, rtol=1e-2, atol=1e-2)
    state = optimizer.state[narrow[0]]
    assert state["exp_avg_sq_row"].dtype == torch.float32 and state["exp_avg"].dtype == torch.float16


def test_a_gradient_of_zeros_is_survived_in_half_precision() -> None:
    params = weights([(6, 4), (4,)], torch.float16)
    train(Chain(params, Adafactor()), params, 2, size=0.0)
    assert all(param.isfinite().all() for param in params)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_turning_with_the_basis_it_does_not_notice_the_order_or_sign_of_directions(shape: tuple[int, int]) -> None:
    @dataclass(frozen=True)
    class Shuffled(SVD):
        def fit(
            self, grad: Tensor, stored: State, fresh: bool, rank: int, right: bool, *args: object
        ) -> dict[str, Tensor]:
            basis = super().fit(grad, stored, fresh, rank, right)["basis"]
            signs = torch.tensor([1.0, -1.0, 1.0], dtype=grad.dtype)
            return {"basis": basis if fresh else (basis * signs).roll(1, dims=-1)}

    def run(basis: SVD, on_refresh: str) -> Tensor:
        params = weights([shape], torch.float64)
        rule = LowRank(Adafactor(beta1=0.9), 3, refresh=3, basis=basis, on_refresh=on_refresh)
        train(Chain(params, rule, lr=0.1), params, 9)
        return params[0].detach()

    torch.testing.assert_close(run(SVD(), "rotate"), run(Shuffled(), "rotate"), rtol=0, atol=1e-12)
    assert (run(SVD(), "keep") - run(Shuffled(), "keep")).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"decay_exponent": 0.0}, "decay_exponent=0.0"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"clip_threshold": 0.0}, "clip_threshold=0.0"),
        ({"beta1": 1.0}, "beta1=1.0"),
        ({"beta1": -0.1}, "beta1=-0.1"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(setting: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adafactor(**setting)
