"""AdamW8bit and AdamW4bit beside a float64 twin, beside bitsandbytes, and by the promises users rely on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leantrain.nn import Int8Weight, int8_weights
from leantrain.optim import predicted_state_bytes, state_bytes
from leantrain.optim.adamw_low_bit import AdamW4bit, AdamW8bit
from leantrain.testing.twins import SlowAdamWLowBit

both = pytest.mark.parametrize("cls", [AdamW8bit, AdamW4bit])


def weights(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype)) for shape in shapes]


def gradients(shapes: Sequence[tuple[int, ...]], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1 + step)
    return [torch.randn(s, generator=generator) * torch.logspace(-3, 0, s[-1]) for s in shapes]


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        for param, grad in zip(params, gradients([tuple(p.shape) for p in params], step), strict=True):
            param.grad = grad.to(param.dtype)
        optimizer.step()


SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
SHAPES = [(7, 13), (16, 24), (5,)]


@both
@pytest.mark.parametrize("changes", [{}, {"block": 8}, {"full_precision_below": 100}])
def test_it_is_its_slow_twin(cls: Any, changes: dict[str, Any]) -> None:
    options = {**SETTINGS, "full_precision_below": 0, **changes}
    params = weights(SHAPES)
    slow = [param.detach().double() for param in params]
    train(cls(params, **options), params, range(20))
    twin = SlowAdamWLowBit(**options, bits=cls.bits)
    for step in range(20):
        twin.step(slow, [grad.double() for grad in gradients(SHAPES, step)])
    for param, expected in zip(params, slow, strict=True):
        torch.testing.assert_close(param.detach().double(), expected, rtol=0, atol=1e-5)


def test_it_is_bitsandbytes_to_the_precision_of_its_codes() -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    shapes = [(64, 96), (33, 129)]  # bitsandbytes keeps what is below 4096 numbers in float32, as we do
    ours, theirs, exact = weights(shapes), weights(shapes), weights(shapes)
    options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    optimizers = (AdamW8bit(ours, **options), optim.AdamW8bit(theirs, **options), torch.optim.AdamW(exact, **options))
    for step in range(30):
        generator = torch.Generator().manual_seed(step)
        for trio in zip(ours, theirs, exact, strict=True):
            grad = torch.randn(trio[0].shape, generator=generator)
            for param in trio:
                param.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, c, start in zip(ours, theirs, exact, weights(shapes), strict=True):
        assert optimizers[0].state[a]["exp_avg"].dtype == torch.uint8
        way = (c - start).norm()
        assert 0 < (a - c).norm() < 0.03 * way
        assert (a - b).norm() < 0.03 * way


@both
def test_state_is_the_predicted_bytes_and_close_to_the_peers(cls: Any) -> None:
    shapes = [(64, 64), (63, 65), (31, 7), (4097,)]
    params = weights(shapes)
    optimizer = cls(params)
    predicted = sum(cls.state_bytes(shape) for shape in shapes)
    assert predicted_state_bytes(optimizer) == predicted
    train(optimizer, params, range(2))
    assert state_bytes(optimizer) == predicted
    assert cls.state_bytes((100,), itemsize=2) == 400 and cls.state_bytes((4, 25), full_precision_below=0) > 0
    per_number = cls.state_bytes((4096, 4096)) / 4096**2
    assert per_number == (2 + 8 / 256 if cls is AdamW8bit else 1 + 8 / 128)


def test_its_state_is_as_large_as_bitsandbytes() -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    params = weights([(256, 512)])
    peer = optim.AdamW8bit(params)
    train(peer, params, range(1))
    maps = 2 * 4 * 256  # which all its parameters share
    assert AdamW8bit.state_bytes((256, 512)) == state_bytes(peer) - maps


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stochastic_rounding", [False, True])
def test_a_resumed_run_is_the_same_to_the_last_bit(
    cls: Any, dtype: torch.dtype, stochastic_rounding: bool, tmp_path: Any
) -> None:
    shapes = [(40, 30), (70, 70), (3,)]

    def fresh() -> tuple[list[torch.nn.Parameter], Any]:
        params = weights(shapes, dtype)
        options = {"full_precision_below": 500, "stochastic_rounding": stochastic_rounding}
        return params, cls(params, lr=1e-2, **options)

    params, optimizer = fresh()
    train(optimizer, params, range(4))
    torch.save({"optimizer": optimizer.state_dict(), "weights": [p.detach() for p in params]}, tmp_path / "saved")
    train(optimizer, params, range(4, 8))

    resumed, again = fresh()
    saved = torch.load(tmp_path / "saved", weights_only=True)
    with torch.no_grad():
        for param, value in zip(resumed, saved["weights"], strict=True):
            param.copy_(value)
    again.load_state_dict(saved["optimizer"])
    train(again, resumed, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))
    copied = copy.deepcopy(optimizer)
    assert all(t.dtype == u.dtype for t, u in zip(_tensors(copied), _tensors(optimizer), strict=True))


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


@pytest.mark.parametrize("wrong", [{"full_precision_below": 10_000}, {"block": 64}])
def test_a_state_of_other_settings_is_refused(wrong: dict[str, Any]) -> None:
    params = weights([(70, 70)])
    optimizer = AdamW8bit(params)
    train(optimizer, params, range(1))
    with pytest.raises(ValueError, match="exp_avg"):
        AdamW8bit(weights([(70, 70)]), **wrong).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="exp_avg"):
        AdamW4bit(weights([(70, 70)])).load_state_dict(optimizer.state_dict())


@both
def test_a_gradient_that_is_not_finite_shows(cls: Any) -> None:
    """It makes NaN of the weights of its block, as AdamW does of the weight itself, and raises nothing on the way."""
    params = weights([(64, 128)])
    optimizer = cls(params)
    train(optimizer, params, range(1))
    grads = gradients([(64, 128)], 1)
    grads[0][3, 5] = torch.inf
    for grad in (grads[0], gradients([(64, 128)], 2)[0]):
        params[0].grad = grad
        optimizer.step()
    bad = ~params[0].detach().isfinite()
    assert bad[3, 5] and bad.sum() <= 256


@both
def test_it_trains_as_adamw_does(cls: Any) -> None:
    def fit(optimizer_class: Any, **options: Any) -> float:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
        optimizer = optimizer_class(model.parameters(), lr=1e-2, weight_decay=0.0, **options)
        inputs = torch.randn(256, 16)
        target = inputs[:, :4].prod(1, keepdim=True)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (model(inputs) - target).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    exact, coded = fit(torch.optim.AdamW), fit(cls, full_precision_below=0)
    assert coded < 1.5 * exact + 0.01
    assert coded != exact


@both
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"block": 100}, "block=100"),
        ({"full_precision_below": -1}, "-1"),
        ({"lr": -1.0}, "lr=-1"),
        ({"betas": (1.0, 0.9)}, r"betas=\(1.0, 0.9\)"),
    ],
)
def test_a_wrong_setting_is_named(cls: Any, wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cls(weights([(3, 3)]), **wrong)


def digits_learned(optimizer_class: Any, low: bool, **options: Any) -> float:
    """Share of scikit-learn's digits that a small network has right after 150 steps."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model = int8_weights(model) if low else model
    assert isinstance(model[0].weight, Int8Weight) == low  # type: ignore[index]
    optimizer = optimizer_class(model.parameters(), lr=1e-2, weight_decay=0.0, **options)
    for step in range(150):
        rows = torch.randint(len(x), (128,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return float((model(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize("optimizer_class", [AdamW8bit, AdamW4bit])
def test_weights_may_be_stored_in_few_bits_as_well(optimizer_class: type[AdamW8bit]) -> None:
    """Moments and weights in integers learn what float32 learns, to 2 % of the examples."""
    whole = digits_learned(torch.optim.AdamW, low=False)
    assert whole > 0.95
    assert digits_learned(optimizer_class, low=True, full_precision_below=0) > whole - 0.02
