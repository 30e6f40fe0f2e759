"""Every optimizer of the registry passes every check of `leantrain.testing`; so do three of PyTorch's own."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from leantrain.optim import AdamW, GaLoreAdamW
from leantrain.registry import METHODS
from leantrain.testing import OptimizerCase, parametrize_with_checks
from leantrain.testing.twins import SlowAdamW, SlowGaLoreAdamW, SlowSGD

ADAMW_SETTINGS = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
ADAMW_KNOBS = {"lr": 3e-2, "betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": 0.5}
GALORE_SETTINGS = {**ADAMW_SETTINGS, "lr": 2e-2, "rank": 2, "refresh": 4}
ADAMW_BAD = [
    ({"lr": -1.0}, ["lr", "-1.0"]),
    ({"betas": (1.0, 0.9)}, ["betas", "(1.0, 0.9)"]),
    ({"betas": (0.9, -0.1)}, ["betas", "(0.9, -0.1)"]),
    ({"eps": -1e-8}, ["eps", "-1e-08"]),
    ({"weight_decay": -0.1}, ["weight_decay", "-0.1"]),
]
GALORE_BAD = [
    *ADAMW_BAD,
    ({"rank": 0}, ["rank", "0"]),
    ({"rank": 2.5}, ["rank", "2.5"]),
    ({"refresh": 0}, ["refresh", "0"]),
    ({"scale": 0.0}, ["scale", "0.0"]),
    ({"basis": "pca"}, ["basis", "pca", "svd", "subspace"]),
    ({"on_refresh": "forget"}, ["on_refresh", "forget", "keep", "rotate", "reset"]),
    ({"rank": None, "refresh": 0}, ["refresh", "0"]),  # also while the method is off
]
NO_GPU = "needs a GPU"
META_LEARNING = "writes weights that carry a graph; for meta-learning"


def moments(number: int):
    """Prediction of `number` values per parameter value."""
    return lambda params, settings: sum(number * p.numel() * p.element_size() for p in params)


def galore_bytes(params: list[Tensor], settings: Mapping[str, Any]) -> int:
    return sum(p.element_size() * GaLoreAdamW.state_numel(tuple(p.shape), settings["rank"]) for p in params)


def torch_adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **ADAMW_SETTINGS, fused=True)


def galore(name: str, knobs: Mapping[str, Any], **settings: Any) -> OptimizerCase:
    """GaLore in one of its forms; `knobs` says what else basis, on_refresh and stagger could be."""
    return OptimizerCase(
        name=name,
        optimizer_class=GaLoreAdamW,
        settings={**GALORE_SETTINGS, **settings},
        knobs={**ADAMW_KNOBS, "rank": 3, "refresh": 3, "scale": 1.0, **knobs},
        bad=GALORE_BAD,
        # Subspace iteration follows its own history and has no twin; tests/optim/test_bases.py holds its laws.
        twin=None if settings.get("basis") == "subspace" else SlowGaLoreAdamW,
        predicted_bytes=galore_bytes,
        off_equals=(ADAMW_SETTINGS, torch_adamw),
    )


OURS = [
    OptimizerCase(
        name="AdamW",
        optimizer_class=AdamW,
        settings=ADAMW_SETTINGS,
        knobs=ADAMW_KNOBS,
        bad=ADAMW_BAD,
        twin=SlowAdamW,
        predicted_bytes=moments(2),
        off_equals=(ADAMW_SETTINGS, torch_adamw),
    ),
    galore("GaLoreAdamW", {"basis": "subspace", "on_refresh": "rotate", "stagger": False}),
    galore("GaLoreAdamW-paper", {"basis": "subspace", "on_refresh": "reset", "stagger": True}, stagger=False),
    galore("GaLoreAdamW-rotate", {"basis": "subspace", "on_refresh": "keep", "stagger": False}, on_refresh="rotate"),
    galore("GaLoreAdamW-reset", {"basis": "subspace", "on_refresh": "keep", "stagger": False}, on_refresh="reset"),
    galore(
        "GaLoreAdamW-subspace",
        {"basis": "svd", "on_refresh": "keep", "stagger": False},
        basis="subspace",
        on_refresh="rotate",
    ),
]
PYTORCHS = [
    OptimizerCase(
        name="torch.AdamW",
        optimizer_class=torch.optim.AdamW,
        settings=ADAMW_SETTINGS,
        knobs={**ADAMW_KNOBS, "amsgrad": True},
        switches={"foreach": True, "fused": True},
        untested={"capturable": NO_GPU, "differentiable": META_LEARNING},
        twin=SlowAdamW,
        predicted_bytes=moments(2),
    ),
    OptimizerCase(
        name="torch.SGD",
        optimizer_class=torch.optim.SGD,
        settings={"lr": 5e-2, "momentum": 0.9, "weight_decay": 1e-2},
        knobs={"lr": 3e-2, "momentum": 0.5, "dampening": 0.3, "weight_decay": 0.5, "nesterov": True},
        switches={"foreach": True, "fused": True},
        untested={"differentiable": META_LEARNING},
        twin=SlowSGD,
        predicted_bytes=moments(1),
    ),
    OptimizerCase(
        name="torch.Muon",
        optimizer_class=torch.optim.Muon,
        settings={"lr": 2e-2, "weight_decay": 0.1},
        knobs={
            "lr": 1e-2,
            "momentum": 0.5,
            "weight_decay": 0.5,
            "nesterov": False,
            "ns_coefficients": (2.0, -1.5, 0.5),
            "eps": 10.0,  # a floor under a norm of about 5
            "ns_steps": 3,
            "adjust_lr_fn": "match_rms_adamw",
        },
        predicted_bytes=moments(1),
        matrices_only=True,
    ),
]


def test_every_registered_optimizer_has_a_case():
    registered = set()
    for method in METHODS:
        if method.room == "optim":
            module, name = method.class_path.rsplit(".", 1)
            registered.add(getattr(import_module(module), name))
    missing = registered - {case.optimizer_class for case in OURS}
    assert registered and not missing, f"no conformance case for {sorted(cls.__name__ for cls in missing)}"


def test_every_method_of_ours_has_a_twin_a_byte_count_and_bad_settings():
    complete = {
        case.optimizer_class
        for case in OURS
        if case.twin is not None and case.predicted_bytes is not None and case.bad and case.off_equals is not None
    }
    assert complete == {case.optimizer_class for case in OURS}


def test_nothing_of_ours_is_skipped():
    assert not [case.name for case in OURS if case.skips or case.untested]


@parametrize_with_checks([*OURS, *PYTORCHS])
def test_optimizer(check):
    check()
