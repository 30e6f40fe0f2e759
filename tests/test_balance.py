"""Contiguous groups: against all divisions there are, and times by a clock that the test moves."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leantrain import balance
from leantrain.balance import balanced, seconds_between


def quality(costs: list[float], cuts: tuple[int, ...]) -> tuple[float, float]:
    """The dearest group, then the sum of squares."""
    groups = [sum(costs[start:end]) for start, end in pairwise([0, *cuts, len(costs)])]
    return max(groups), sum(group * group for group in groups)


@given(costs=st.lists(st.integers(0, 20).map(float), min_size=1, max_size=8), data=st.data())
@settings(max_examples=200, deadline=None)
def test_no_other_division_is_better(costs: list[float], data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, len(costs)))
    found = balanced(costs, groups)
    assert len(found) == groups - 1
    assert all(a < b for a, b in pairwise([0, *found, len(costs)]))  # contiguous, none empty
    every = [quality(costs, cuts) for cuts in combinations(range(1, len(costs)), groups - 1)]
    dearest = min(every)[0]
    assert quality(costs, tuple(found))[0] == dearest
    assert quality(costs, tuple(found)) <= max(each for each in every if each[0] == dearest)


@pytest.mark.parametrize(
    ("costs", "groups", "expected"),
    [
        ([1, 1, 1, 1], 2, [2]),
        ([9, 1, 1, 1], 2, [1]),
        ([1, 1, 1, 9], 3, [1, 3]),
        ([1, 1, 9, 1, 1], 3, [2, 3]),
        ([10, 1, 1, 1, 1], 3, [1, 3]),  # among equally dear ones, the rest is balanced as well
        ([0, 0, 0], 3, [1, 2]),
        ([5], 1, []),
    ],
)
def test_divisions_known_by_heart(costs: list[float], groups: int, expected: list[int]) -> None:
    assert balanced(costs, groups) == expected


def test_seconds_are_those_between_the_inputs_of_the_named_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class Takes(nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds
            self.passes = 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.passes += 1
            clock[0] += self.seconds * (100 if self.passes == 1 else 1)  # the first pass is slow, as first ones are
            return inputs

    monkeypatch.setattr(balance, "_now", lambda sample: clock[0])
    model = nn.Sequential(Takes(1.0), Takes(2.0), Takes(4.0), Takes(8.0))
    assert seconds_between(model, torch.zeros(1), ["1", "3"]) == [1.0, 6.0, 8.0]
    assert seconds_between(model, torch.zeros(1), []) == [15.0]
    assert model.training
    model(torch.zeros(1))
    assert not any(module._forward_pre_hooks for module in model)


def test_seconds_are_real_ones() -> None:
    model = nn.Sequential(nn.Linear(2, 2), *(nn.Linear(1024, 1024) for _ in range(2)), nn.Linear(2, 2))
    model[0].forward = lambda inputs: inputs  # type: ignore[method-assign]
    model[3].forward = lambda inputs: inputs  # type: ignore[method-assign]
    little, much, nothing = seconds_between(model, torch.zeros(64, 1024), ["1", "3"])
    assert much > 5 * max(little, nothing) > 0
