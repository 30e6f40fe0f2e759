"""Entropy-coded averaging: the rule by hand, nothing lost, the same bits everywhere."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from leantrain.errors import RunError, UsageError
from tests.gloo import in_processes

pytest.importorskip("constriction")

from leantrain.exchange.entropy_coded import EntropyCoded
from leantrain.histogram import range_entropy

WORLD, EVERY, STEPS = 3, 2, 8
SETTINGS: dict[str, dict[str, Any]] = {
    "rel": {},
    "rel, coarse": {"step": 2.0},
    "rel, no residual": {"residual": False},
    "abs": {"mode": "abs", "step": 0.25},
    "snapshot of changes": {"mode": "snapshot", "bits": 3},
    "weights": {"send": "weights", "bits": 5},
    "weights, abs": {"send": "weights", "mode": "abs", "step": 1 / 16},
    "lossless": {"mode": "lossless"},
}


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3))


def move(rank: int, step: int, shape: torch.Size) -> Tensor:
    """What this process's optimizer does to a parameter in a step."""
    seed = 100 * rank + 10_000 * step + shape.numel()
    return 0.03 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def walk(rank: int) -> dict[str, Any]:
    """In every setting: the weights at the end, and what the exchange says of itself."""
    found = {}
    for name, settings in SETTINGS.items():
        exchange = EntropyCoded(EVERY, **settings)
        model = exchange.attach(small_model())
        sent = []
        for step in range(STEPS):
            with torch.no_grad():
                for param in model.parameters():
                    param += move(rank, step, param.shape)
            exchange.after_step()
            sent.append(exchange.bytes_sent_per_step(model, WORLD))
        found[name] = {
            "weights": dict(model.state_dict()), "residuals": exchange.residuals, "sent": sent,
            "metrics": exchange.metrics(),
        }  # fmt: skip
    return found


@pytest.fixture(scope="module")
def walks() -> list[dict[str, Any]]:
    return in_processes(WORLD, walk)


def by_hand(settings: dict[str, Any]) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """The weights agreed on at the end and everybody's residuals, by the formula, in numpy's float32."""
    one = np.float32
    agreed = {name: param.detach().numpy().copy() for name, param in small_model().named_parameters()}
    sigma = {name: value.std(ddof=1) if value.ndim > 1 else 0.05 for name, value in agreed.items()}
    own = [{name: value.copy() for name, value in agreed.items()} for _ in range(WORLD)]
    residual = [{name: np.zeros_like(value) for name, value in agreed.items()} for _ in range(WORLD)]
    for step in range(STEPS):
        for rank in range(WORLD):
            for value in own[rank].values():
                value += move(rank, step, torch.Size(value.shape)).numpy()
        if (step + 1) % EVERY:
            continue
        for name in agreed:
            weights = settings.get("send") == "weights"
            told = []
            for rank in range(WORLD):
                d = (own[rank][name] if weights else own[rank][name] - agreed[name]) + residual[rank][name]
                told.append(rounded(d, settings, weights, float(sigma[name])))
                if settings.get("residual", True):
                    residual[rank][name] = d - told[-1]
            mean = sum(told, np.zeros_like(agreed[name])) / one(WORLD)
            agreed[name] = agreed[name] + (mean - agreed[name] if weights else mean)
            for each in own:
                each[name] = agreed[name].copy()
    return agreed, residual


def rounded(d: np.ndarray, settings: dict[str, Any], weights: bool, sigma: float) -> np.ndarray:
    mode = settings.get("mode", "snapshot" if weights else "rel")
    if mode == "lossless":
        return d
    if mode == "snapshot":
        low, high, levels = float(d.min()), float(d.max()), 2 ** settings["bits"] - 1
        step = float(np.float32((high - low) / levels))
        return (low + step * np.rint((d.astype(np.float64) - low) / step)).astype(np.float32)
    unit = math.sqrt(float((d.astype(np.float64) ** 2).mean())) if mode == "rel" else sigma
    step = np.float32(settings.get("step", 1.0) * unit)
    return np.rint(d / step).astype(np.float32) * step


@pytest.mark.parametrize("name", SETTINGS)
def test_it_does_what_the_formula_says(walks: list[dict[str, Any]], name: str) -> None:
    agreed, residuals = by_hand(SETTINGS[name])
    for rank, found in enumerate(walks):
        for key, value in found[name]["weights"].items():
            torch.testing.assert_close(value, torch.from_numpy(agreed[key]), rtol=0, atol=1e-6)
        for key, value in found[name]["residuals"].items():
            torch.testing.assert_close(value, torch.from_numpy(residuals[rank][key]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_all_processes_end_with_the_same_bits(walks: list[dict[str, Any]], name: str) -> None:
    hashes = {
        hashlib.sha256(b"".join(value.numpy().tobytes() for value in found[name]["weights"].values())).hexdigest()
        for found in walks
    }
    assert len(hashes) == 1


@pytest.mark.parametrize("name", ["rel", "rel, coarse", "abs", "snapshot of changes"])
def test_what_was_sent_and_what_was_kept_is_all_there_was(walks: list[dict[str, Any]], name: str) -> None:
    """Conservation: the agreed weights moved by the mean of all steps, less the mean of what is still kept."""
    for key, start in small_model().state_dict().items():
        steps = torch.zeros(start.shape, dtype=torch.float64)
        for rank in range(WORLD):
            for step in range(STEPS):
                steps += move(rank, step, start.shape).double() / WORLD
        moved = walks[0][name]["weights"][key].double() - start.double()
        kept = sum(found[name]["residuals"][key].double() for found in walks) / WORLD
        assert (moved + kept - steps).norm() < 1e-5 * steps.norm()


def test_without_a_residual_nothing_is_kept(walks: list[dict[str, Any]]) -> None:
    assert not walks[0]["rel, no residual"]["residuals"]


def test_it_sends_only_at_meetings_and_says_how_much(walks: list[dict[str, Any]]) -> None:
    weights = sum(value.numel() for value in small_model().state_dict().values())
    sent, metrics = walks[0]["rel"]["sent"], walks[0]["rel"]["metrics"]
    assert [step for step, bytes_sent in enumerate(sent) if bytes_sent] == [1, 3, 5, 7]
    longest = max(found["rel"]["metrics"]["bits_per_weight"] for found in walks)
    assert sent[-1] == pytest.approx((WORLD - 1) * (longest * weights / 8 + 8), abs=1)  # 8 bytes say how long it is
    assert metrics["weight_entropy"] == pytest.approx(
        sum(range_entropy(v) * v.numel() for v in walks[0]["rel"]["weights"].values()) / weights, abs=1e-6
    )


def train(exchange: EntropyCoded | None, steps: int = 30, lr: float = 0.1) -> nn.Module:
    """A model of one process, alone or with an exchange that has nobody to talk to."""
    model = small_model()
    if exchange is not None:
        model = exchange.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    inputs = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), (inputs[:, 0] > 0).long()).backward()
        optimizer.step()
        if exchange is not None:
            exchange.after_step()
    return model


def distance(left: nn.Module, right: nn.Module) -> float:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in pairs))


def test_with_small_steps_one_process_trains_as_if_alone() -> None:
    alone = train(None)
    assert distance(train(EntropyCoded(3, mode="lossless")), alone) < 1e-5
    errors = [distance(train(EntropyCoded(3, mode="abs", step=step)), alone) for step in (1.0, 0.1, 0.01, 0.001)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 2e-3 < errors[0]


def test_the_residual_carries_what_is_smaller_than_a_step() -> None:
    """Changes of a tenth of a step: without the residual they are never heard of."""
    coarse: dict[str, Any] = {"every": 1, "mode": "abs", "step": 1.0}
    start, alone = small_model(), train(None, lr=0.02)
    assert distance(train(EntropyCoded(**coarse, residual=False), lr=0.02), start) == 0
    moved = distance(train(EntropyCoded(**coarse), lr=0.02), start)
    assert moved > 0.5 * distance(alone, start)


def test_resuming_continues_bit_for_bit() -> None:
    def stage(model: nn.Module, exchange: EntropyCoded, steps: range) -> None:
        for step in steps:
            with torch.no_grad():
                for param in model.parameters():
                    param += move(0, step, param.shape)
            exchange.after_step()

    first = EntropyCoded(4, mode="abs", step=0.5)
    model = first.attach(small_model())
    stage(model, first, range(6))
    second = EntropyCoded(4, mode="abs", step=0.5)
    other = second.attach(small_model())
    other.load_state_dict(model.state_dict())
    second.load_state_dict({**first.state_dict()})
    second.agreed = {name: value.clone() for name, value in second.agreed.items()}
    stage(model, first, range(6, 13))
    stage(other, second, range(6, 13))
    assert distance(model, other) == 0 and first.steps == second.steps == 13


def test_weights_that_are_not_finite_end_the_run() -> None:
    exchange = EntropyCoded(1)
    model = exchange.attach(small_model())
    with torch.no_grad():
        next(model.parameters())[0, 0] = math.nan
    with pytest.raises(RunError, match="weights are not finite at step 1"):
        exchange.after_step()


def test_bad_arguments_are_named() -> None:
    for wrong, message in [
        ({"every": 0}, "every must be .*got 0"),
        ({"mode": "rel", "send": "weights"}, "send='weights' with mode='rel' would round weights"),
        ({"mode": "exact"}, "mode 'exact' of the entropy codec is unknown"),
        ({"step": -1.0}, "step=-1.0"),
        ({"send": "gradients"}, "send must be 'changes' or 'weights', got 'gradients'"),
    ]:
        with pytest.raises(UsageError, match=message):
            EntropyCoded(**wrong)
    assert EntropyCoded().every == 5
