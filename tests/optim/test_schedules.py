"""Schedules start, peak and end where they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leantrain.optim import schedule


@given(st.sampled_from(["cosine", "linear", "constant"]), st.integers(1, 300), st.floats(0, 0.9), st.floats(0, 1))
def test_it_rises_to_one_falls_to_the_floor_and_stays_between(
    kind: str, steps: int, warmup: float, floor: float
) -> None:
    factor = schedule(kind, steps=steps, warmup=warmup, min_ratio=floor)
    values = [factor(step) for step in range(steps)]
    rise = round(warmup * steps)
    assert values[:rise] == [(step + 1) / rise for step in range(rise)]
    after = values[max(0, rise - 1) :]
    assert after == sorted(after, reverse=True)
    assert max(values) <= 1 and min(after) >= min(floor, 1) - 1e-12
    if rise < steps and steps > 1:
        assert values[-1] == pytest.approx(1.0 if kind == "constant" else floor)
    assert factor(10 * steps) == values[-1] or steps == 1 or rise == steps


def test_cosine_is_pytorchs_cosine() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=49, eta_min=0.1)
    factor = schedule("cosine", steps=50, warmup=0.0, min_ratio=0.1)
    for step in range(50):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(factor(step))
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(
    "bad", [{"kind": "cosin"}, {"steps": 0}, {"warmup": 1.0}, {"warmup": -0.1}, {"min_ratio": 1.1}]
)
def test_wrong_settings_are_named(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        schedule(**{"kind": "cosine", "steps": 10, **bad})


def test_by_default_it_warms_up_for_a_tenth_and_falls_along_a_cosine_to_a_tenth() -> None:
    usual, spelled = schedule(steps=100), schedule("cosine", steps=100, warmup=0.1, min_ratio=0.1)
    assert [usual(step) for step in range(100)] == [spelled(step) for step in range(100)]


def test_a_floor_of_one_is_constant_after_the_warm_up() -> None:
    factor = schedule("linear", steps=10, warmup=0.2, min_ratio=1.0)
    assert [factor(step) for step in range(10)] == [0.5] + [1.0] * 9
