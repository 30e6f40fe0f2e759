"""DCT-AdamW against a slow transcription of it, and the laws of moments that belong to columns."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leantrain.errors import UsageError
from leantrain.optim import state_bytes
from leantrain.optim.dct_adamw import DCTAdamW
from tests.optim.cases_dct_adamw import SlowDCTAdamW

SHAPES: list[tuple[int, ...]] = [(12, 8), (8, 12), (9, 9), (7, 3, 4), (5,)]


def weights(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    """Gradients whose directions drift, so that at every step some columns stay and some do not."""
    fixed, fresh = (torch.Generator().manual_seed(seed) for seed in (99, 1000 + step))
    for param in params:
        still, moving = (torch.randn(param.shape, generator=g, dtype=torch.float64) for g in (fixed, fresh))
        param.grad = (still + 0.7 * moving).to(param.dtype)


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm": "l2"},
        {"refresh": 3},
        {"scale": 0.25, "weight_decay": 0.1},
        {"betas": (0.5, 0.9), "eps": 1e-3},
        {"side": "reverse_std"},
        {"side": "left"},
        {"side": "right"},
    ],
    ids=str,
)
def test_every_step_is_that_of_the_slow_twin(settings: dict[str, Any]) -> None:
    params = weights(SHAPES)
    expected = [param.detach().clone() for param in params]
    twin = SlowDCTAdamW(lr=0.05, rank=3, stagger=False, **settings)
    optimizer = DCTAdamW(params, lr=0.05, rank=3, stagger=False, **settings)
    for step in range(12):
        train(optimizer, params, range(step, step + 1))
        twin.step(expected, [param.grad for param in params if param.grad is not None])
        for param, weight, averages in zip(params[:4], expected, twin.memory, strict=False):
            torch.testing.assert_close(param.detach(), weight, rtol=0, atol=1e-11)
            assert optimizer.state[param]["columns"].tolist() == sorted(averages)


def test_the_gradients_of_these_tests_make_some_columns_stay_and_some_go() -> None:
    params = weights(SHAPES[:1])
    optimizer, stayed = DCTAdamW(params, rank=3), []
    for step in range(12):
        before = set(optimizer.state[params[0]]["columns"].tolist()) if step else set()
        train(optimizer, params, range(step, step + 1))
        stayed.append(len(before & set(optimizer.state[params[0]]["columns"].tolist())))
    assert 0 < sum(stayed[1:]) < 3 * 11


def test_with_all_but_one_column_it_is_adamw_on_the_transformed_weight() -> None:
    """The gradients have nothing in the last cosine, so what is left out is nothing."""
    fft = pytest.importorskip("scipy.fft")
    (param,) = weights([(10, 6)])

    def transformed(matrix: Tensor) -> Tensor:
        return torch.from_numpy(fft.dct(matrix.detach().numpy(), type=2, norm="ortho", axis=-1))

    plain = nn.Parameter(transformed(param))
    ours = DCTAdamW([param], lr=0.1, rank=5)
    theirs = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.0)
    for step in range(8):
        plain.grad = torch.randn(10, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        plain.grad[:, 5] = 0
        param.grad = torch.from_numpy(fft.idct(plain.grad.numpy(), type=2, norm="ortho", axis=-1))
        ours.step(), theirs.step()
    torch.testing.assert_close(transformed(param), plain.detach(), rtol=0, atol=1e-11)


def test_moments_stay_as_they_are_while_the_same_columns_are_chosen() -> None:
    params = [weights([(12, 8)], torch.float32)[0] for _ in range(2)]
    every, once = DCTAdamW(params[:1], rank=3, refresh=1), DCTAdamW(params[1:], rank=3, refresh=1000)
    for step in range(20):
        for param in params:
            give_gradients([param], 0)  # the same columns at every step
            assert param.grad is not None
            param.grad *= 1 + step
        every.step(), once.step()
    for name in ("columns", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(every.state[params[0]][name], once.state[params[1]][name], rtol=1e-5, atol=1e-7)


def test_the_second_moment_never_becomes_negative() -> None:
    params = weights(SHAPES, torch.float32)
    optimizer = DCTAdamW(params, rank=3)
    for step in range(30):
        train(optimizer, params, range(step, step + 1))
        assert all((optimizer.state[param]["exp_avg_sq"] >= 0).all() for param in params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_two_averages_and_four_bytes_a_column(dtype: torch.dtype) -> None:
    params = weights(SHAPES, dtype)
    optimizer = DCTAdamW(params, rank=3)
    train(optimizer, params, range(3))
    averages = 3 * 2 * (12 + 12 + 9 + 12) + 2 * 5
    assert state_bytes(optimizer) == params[0].element_size() * averages + 4 * (4 * 3)
    assert "basis" not in optimizer.state[params[0]]


def test_matrices_of_different_sizes_each_have_their_own_cosines() -> None:
    """The released code builds one cosine matrix, from the first weight it meets."""
    shapes: list[tuple[int, ...]] = [(16, 6), (16, 10), (4, 16)]
    together, apart = weights(shapes, torch.float32), weights(shapes, torch.float32)
    train(DCTAdamW(together, rank=2), together, range(5))
    for param in apart:
        optimizer = DCTAdamW([param], rank=2)
        for step in range(5):
            give_gradients(apart, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    params, again = weights(SHAPES, torch.bfloat16), weights(SHAPES, torch.bfloat16)
    optimizer = DCTAdamW(params, rank=3, lr=0.1, refresh=2)
    train(optimizer, params, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = DCTAdamW(again, rank=3, lr=0.1, refresh=2)
    with torch.no_grad():
        for copy, param in zip(again, params, strict=True):
            copy.copy_(param)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.state[again[0]]["columns"].dtype == torch.int32
    train(optimizer, params, range(5, 9))
    train(resumed, again, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


def test_a_gradient_that_is_not_finite_keeps_the_columns_and_is_counted() -> None:
    params = weights(SHAPES[:1], torch.float32)
    optimizer = DCTAdamW(params, rank=3)
    train(optimizer, params, range(1))
    before = optimizer.state[params[0]]["columns"].clone()
    params[0].grad = torch.full_like(params[0], torch.nan)
    optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["columns"], before)
    assert int(optimizer.state[params[0]]["fallbacks"]) == 1


def test_options_belong_to_their_group() -> None:
    params = weights(SHAPES[:3])
    groups = [
        {"params": params[:1], "rank": 2, "norm": "l2"},
        {"params": params[1:2], "rank": 4},
        {"params": params[2:]},
    ]
    optimizer = DCTAdamW(groups)
    train(optimizer, params, range(2))
    assert [len(optimizer.state[param].get("columns", ())) for param in params] == [2, 4, 0]


@pytest.mark.parametrize("state_bits", [8, 4])
def test_moments_in_few_bits_follow_their_columns_too(state_bits: int) -> None:
    params, exact = weights([(64, 48)], torch.float32), weights([(64, 48)], torch.float32)
    start = exact[0].detach().clone()
    train(DCTAdamW(params, lr=0.01, rank=12, state_bits=state_bits, full_precision_below=0), params, range(20))
    train(DCTAdamW(exact, lr=0.01, rank=12), exact, range(20))
    off = (params[0] - exact[0]).norm() / (exact[0] - start).norm()
    assert 0 < off < (0.1 if state_bits == 8 else 0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"norm": "max"}, "norm must be one of .*got norm='max'"),
        ({"rank": 0}, "rank must be an integer >= 1, got rank=0"),
        ({"refresh": 0}, "refresh must be an integer >= 1, got refresh=0"),
        ({"scale": -1.0}, "scale must be > 0, got scale=-1.0"),
        ({"side": "top"}, "side must be one of"),
        ({"on_refresh": "forget"}, "on_refresh must be one of"),
        ({"lr": -1.0}, "lr must be"),
        ({"state_bits": 5}, "state_bits must be one of"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_value(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        DCTAdamW(weights(SHAPES), **{"rank": 2, **settings})
