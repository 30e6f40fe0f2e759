"""The small data sets that come inside scikit-learn: nothing to download, a second to train on."""

from __future__ import annotations

import numpy as np

from leantrain.data.examples import Examples, Table
from leantrain.data.optional import need
from leantrain.data.order import split_rows
from leantrain.data.protocol import Spec, Task
from leantrain.data.standardise import standardised
from leantrain.errors import UsageError, nearest

TASKS: dict[str, Task] = {
    "digits": "classification",
    "iris": "classification",
    "wine": "classification",
    "breast_cancer": "classification",
    "diabetes": "regression",
}


class Sklearn(Examples):
    """One of scikit-learn's bundled sets, standardised by its training rows.

    Args:
        name: digits (1,797 x 64, 10 classes), iris (150 x 4, 3), wine (178 x 13, 3), breast_cancer (569 x 30, 2) or
            diabetes (442 x 10, a number).
        held_out: fraction of the rows to hold out, in (0, 1).
        images: give the digits as [B, 1, 8, 8] images instead of [B, 64] features.

    Raises:
        UsageError: an unknown name, `images` for a set that has none, or scikit-learn is not installed.
    """

    def __init__(self, name: str, held_out: float = 0.2, images: bool = False) -> None:
        if name not in TASKS:
            raise UsageError(f"scikit-learn has no bundled set {name!r}{nearest(name, TASKS)}")
        if images and name != "digits":
            raise UsageError(f"images=True is for 'digits' only, not for {name!r}")
        datasets = need("sklearn.datasets", "scikit-learn", f"Sklearn(name={name!r})")
        bunch = getattr(datasets, f"load_{name}")()
        train, held = split_rows(len(bunch.data), held_out)
        features, _, _ = standardised(np.asarray(bunch.data, np.float64), train)
        task = TASKS[name]
        spec: Spec = {"features": features.shape[1]}
        if images:
            features = features.reshape(-1, 1, 8, 8)
            spec |= {"channels": 1, "image_size": 8}
        if task == "regression":
            targets, mean, std = standardised(np.asarray(bunch.target, float)[:, None], train)
            self.target_mean, self.target_std = mean.item(), std.item()
            spec["outputs"] = 1
        else:
            targets = np.asarray(bunch.target, np.int64)
            spec["classes"] = len(bunch.target_names)
        super().__init__(Table(features, targets, train, held), task, spec, f"scikit-learn's {name}")
