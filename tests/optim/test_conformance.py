"""Every optimizer of the registry passes every check of `leantrain.testing`; so do three of PyTorch's own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from inspect import isclass
from typing import Any

import pytest
import torch
from torch import Tensor

from leantrain.optim import AdamW, AdamW4bit, AdamW8bit, GaLoreAdamW, QGaLoreAdamW, predicted_state_bytes
from leantrain.registry import METHODS
from leantrain.testing import OptimizerCase, parametrize_with_checks
from leantrain.testing.twins import SlowAdamW, SlowAdamWLowBit, SlowGaLoreAdamW, SlowSGD
from tests.optim import cases_dct_adamw, cases_rules
from tests.optim.cases_rules import RULES

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
    ({"side": "top"}, ["side", "top", "std", "reverse_std", "left", "right"]),
    ({"state_bits": 16}, ["state_bits", "16", "32", "8", "4"]),
    ({"basis_bits": 2}, ["basis_bits", "2", "32", "8", "4"]),
    ({"full_precision_below": -1}, ["full_precision_below", "-1"]),
    ({"settled": 1.5}, ["settled", "1.5"]),
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


def predicted(optimizer_class: type[torch.optim.Optimizer]):
    """The method's own prediction; tests/optim/test_state_size.py holds it against formulas."""
    return lambda params, settings: predicted_state_bytes(optimizer_class(params, **settings))


UNTESTED = {
    "full_precision_below": "means nothing with state_bits=32; see GaLoreAdamW-low-bit",
    "settled": "shows after six refreshes; see GaLoreAdamW-settled",
    "stagger": "with a refresh at every step there is nothing to spread",
}


def galore(
    name: str, knobs: Mapping[str, Any], optimizer_class: type[GaLoreAdamW] = GaLoreAdamW, **settings: Any
) -> OptimizerCase:
    """GaLore in one of its forms; `knobs` says what else its own settings could be."""
    knobs = {
        **ADAMW_KNOBS, "rank": 3, "refresh": 3, "scale": 1.0, "side": "reverse_std", "state_bits": 8, "basis_bits": 8,
        **knobs,
    }  # fmt: skip
    paper = optimizer_class is GaLoreAdamW and not {"state_bits", "basis_bits", "settled"} & settings.keys()
    return OptimizerCase(
        name=name,
        optimizer_class=optimizer_class,
        settings={**GALORE_SETTINGS, "full_precision_below": 0, **settings},
        knobs=knobs,
        untested={argument: why for argument, why in UNTESTED.items() if argument not in knobs},
        bad=GALORE_BAD,
        # Other bases follow their own history and have no twin; tests/optim/test_bases.py holds their laws.
        twin=SlowGaLoreAdamW if paper and settings.get("basis", "svd") == "svd" else None,
        predicted_bytes=galore_bytes if paper and "side" not in settings else predicted(optimizer_class),
        off_equals=({**ADAMW_SETTINGS, "state_bits": 32}, torch_adamw),
    )


def low_bit(optimizer_class: type[AdamW8bit] | type[AdamW4bit]) -> OptimizerCase:
    """AdamW with moments in few bits, all of them, also those of parameters as small as these."""
    settings = {**ADAMW_SETTINGS, "full_precision_below": 0}
    return OptimizerCase(
        name=optimizer_class.__name__,
        optimizer_class=optimizer_class,
        settings=settings,
        knobs={**ADAMW_KNOBS, "block": 16, "full_precision_below": 4096},
        untested={"stochastic_rounding": "rounds bfloat16 weights only; see test_adamw_low_bit"},
        bad=[*ADAMW_BAD, ({"block": 100}, ["block", "100"]), ({"full_precision_below": -1}, ["-1"])],
        twin=partial(SlowAdamWLowBit, bits=optimizer_class.bits),
        predicted_bytes=predicted(optimizer_class),
        off_equals=({**ADAMW_SETTINGS, "full_precision_below": 10**9}, torch_adamw),
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
    galore("GaLoreAdamW-paper", {"basis": "dct", "on_refresh": "reset", "stagger": True}, stagger=False),
    galore("GaLoreAdamW-rotate", {"basis": "rsvd", "on_refresh": "keep", "stagger": False}, on_refresh="rotate"),
    galore("GaLoreAdamW-reset", {"basis": "coordinate", "on_refresh": "keep", "stagger": False}, on_refresh="reset"),
    galore(
        "GaLoreAdamW-subspace",
        {"basis": "random", "on_refresh": "keep", "stagger": False, "side": "left"},
        basis="subspace",
        on_refresh="rotate",
        side="reverse_std",
    ),
    galore(
        "GaLoreAdamW-settled",
        {"basis": "svd", "on_refresh": "rotate", "settled": None},
        basis="rsvd",
        refresh=1,
        settled=0.1,
        stagger=False,
    ),
    galore(
        "GaLoreAdamW-low-bit",
        {
            "basis": "svd",
            "on_refresh": "keep",
            "stagger": False,
            "state_bits": 4,
            "basis_bits": 32,
            "full_precision_below": 10_000,
        },
        basis="subspace",
        on_refresh="rotate",
        state_bits=8,
        basis_bits=8,
    ),
    galore(
        "QGaLoreAdamW",
        {"basis": "subspace", "on_refresh": "rotate", "state_bits": 4, "settled": None, "full_precision_below": 10_000},
        QGaLoreAdamW,
        refresh=1,
    ),
    *(low_bit(optimizer_class) for optimizer_class in (AdamW8bit, AdamW4bit)),
    *cases_dct_adamw.CASES,
    *cases_rules.CASES,
    *RULES,
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
            found = getattr(import_module(module), name)
            registered |= {found} if isclass(found) else set()
    missing = registered - {case.optimizer_class for case in OURS}
    assert registered and not missing, f"no conformance case for {sorted(cls.__name__ for cls in missing)}"


def test_every_method_of_ours_has_a_twin_a_byte_count_and_bad_settings():
    complete = {
        case.optimizer_class
        for case in OURS
        if case.twin is not None and case.predicted_bytes is not None and case.bad and case.off_equals is not None
    }
    # Q-GaLore is GaLoreAdamW with other defaults. Rules in a plain chain have nothing to be when they are off.
    assert complete == {case.optimizer_class for case in OURS} - {QGaLoreAdamW} - {c.optimizer_class for c in RULES}


def test_nothing_of_ours_is_skipped_and_what_one_case_leaves_out_another_tests():
    assert not [case.name for case in OURS if case.skips]
    tested = {(case.optimizer_class, argument) for case in OURS for argument in case.knobs}
    left_out = {(case.optimizer_class, argument) for case in OURS for argument in case.untested}
    bf16_only = {(AdamW8bit, "stochastic_rounding"), (AdamW4bit, "stochastic_rounding")}  # test_adamw_low_bit
    # Q-GaLore's refreshes, one a step in its case, are GaLore's.
    assert left_out - tested == bf16_only | {(QGaLoreAdamW, "stagger")}


@pytest.mark.filterwarnings("ignore:rank=")  # the smallest of the battery's matrices
@parametrize_with_checks([*OURS, *PYTORCHS])
def test_optimizer(check):
    check()
