"""Evaluation mode for a while."""

from __future__ import annotations

import pytest
from torch import nn

from leantrain.modes import evaluation_mode


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(), nn.Dropout()))
    model[1].eval()  # frozen
    return model


def test_every_modules_own_mode_comes_back() -> None:
    model = network()
    before = {name: module.training for name, module in model.named_modules()}
    assert sorted(before.values()) == [False, True, True, True, True, True]
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        with evaluation_mode(model):
            pass
        assert not any(module.training for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == before


def test_it_comes_back_after_an_error_too() -> None:
    model = network()
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        raise ZeroDivisionError
    assert [module.training for module in model] == [True, False, True]


def test_a_model_in_evaluation_mode_stays_there() -> None:
    model = network().eval()
    with evaluation_mode(model):
        pass
    assert not any(module.training for module in model.modules())
