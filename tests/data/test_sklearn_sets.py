"""The sets bundled with scikit-learn."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from leantrain.data import Data, Sklearn
from leantrain.data.sklearn_sets import TASKS
from leantrain.errors import UsageError

SPECS = {
    "digits": {"features": 64, "classes": 10},
    "iris": {"features": 4, "classes": 3},
    "wine": {"features": 13, "classes": 3},
    "breast_cancer": {"features": 30, "classes": 2},
    "diabetes": {"features": 10, "outputs": 1},
}


@pytest.fixture(autouse=True)
def _needs_scikit_learn() -> None:
    pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_set_is_standardised_data(name: str) -> None:
    data = Sklearn(name)
    assert isinstance(data, Data)
    assert (data.spec, data.task) == (SPECS[name], TASKS[name])
    batch = data.train_batch(0, 0, data.train_size)
    torch.testing.assert_close(batch.inputs.mean(0), torch.zeros(batch.inputs.shape[1]), rtol=0, atol=1e-5)
    held = sum(len(part) for part in data.eval_batches(100))
    assert held == round(0.2 * (held + data.train_size))


def test_a_regression_target_leads_back_to_its_unit() -> None:
    from sklearn.datasets import load_diabetes

    data = Sklearn("diabetes")
    restored = data.table.targets * data.target_std + data.target_mean
    np.testing.assert_allclose(restored[:, 0], load_diabetes().target, rtol=1e-5)


def test_digits_can_be_images() -> None:
    flat, images = Sklearn("digits"), Sklearn("digits", images=True)
    assert images.spec == {"features": 64, "channels": 1, "image_size": 8, "classes": 10}
    torch.testing.assert_close(images.train_batch(0, 0, 5).inputs.flatten(1), flat.train_batch(0, 0, 5).inputs)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no bundled set 'digit'; did you mean 'digits'\? \(allowed: breast_cancer"):
        Sklearn("digit")


def test_images_of_a_table_are_refused() -> None:
    with pytest.raises(UsageError, match="images=True is for 'digits' only, not for 'iris'"):
        Sklearn("iris", images=True)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> object:
        if name.startswith("sklearn"):
            raise ImportError("No module named 'sklearn'")
        return importlib.import_module(name)

    monkeypatch.setattr("leantrain.data.optional.import_module", import_module)
    with pytest.raises(UsageError, match=r"Sklearn\(name='iris'\) needs the package 'scikit-learn': pip install"):
        Sklearn("iris")
