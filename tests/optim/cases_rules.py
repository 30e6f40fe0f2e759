"""Conformance rows of APOLLO and of GaLore with Adafactor, and of the rules that a user gives to `Chain`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from leantrain.optim import Adafactor, Chain, Lion, Momentum
from leantrain.optim.apollo import APOLLO, APOLLOMini
from leantrain.optim.galore_adafactor import GaLoreAdafactor
from leantrain.testing import OptimizerCase
from leantrain.testing.twins import SlowAdafactor, SlowAPOLLO, SlowGaLoreAdafactor, SlowLion, SlowMomentum

CHAIN_BAD: list[tuple[Mapping[str, Any], list[str]]] = [
    ({"lr": -1.0}, ["lr", "-1.0"]),
    ({"weight_decay": -0.1}, ["weight_decay", "-0.1"]),
]
ADAMW_SETTINGS = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
ADAMW_KNOBS = {"lr": 3e-2, "betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": 0.5}
BETAS_BAD = [
    ({"betas": (1.0, 0.9)}, ["betas", "(1.0, 0.9)"]),
    ({"betas": (0.9, -0.1)}, ["betas", "(0.9, -0.1)"]),
]
RANK_BAD = [
    ({"rank": 0}, ["rank", "0"]),
    ({"rank": 2.5}, ["rank", "2.5"]),
    ({"refresh": 0}, ["refresh", "0"]),
    ({"scale": 0.0}, ["scale", "0.0"]),
    ({"rank": None, "refresh": 0}, ["refresh", "0"]),  # also while the method is off
]
ADAFACTOR_SETTINGS = {"lr": 1e-2, "beta1": 0.9, "eps": 1e-3, "weight_decay": 0.1}
ADAFACTOR_KNOBS = {
    "lr": 3e-2, "beta1": 0.5, "weight_decay": 0.5, "decay_exponent": -0.5, "eps": 1e-1, "clip_threshold": 0.5,
}  # fmt: skip
ADAFACTOR_BAD = [
    *CHAIN_BAD,
    ({"beta1": 1.0}, ["beta1", "1.0"]),
    ({"decay_exponent": 0.0}, ["decay_exponent", "0.0"]),
    ({"eps": 0.0}, ["eps", "0.0"]),
    ({"clip_threshold": 0.0}, ["clip_threshold", "0.0"]),
]


def apollo_bytes(params: list[Tensor], settings: Mapping[str, Any]) -> int:
    """By the formula, with the norm that each scaled matrix keeps in float32."""
    numbers = [APOLLO.state_numel(tuple(p.shape), settings["rank"]) for p in params]
    norms = [numel % 2 for numel in numbers]  # two moments are an even number of numbers
    return sum((n - norm) * p.element_size() + 4 * norm for p, n, norm in zip(params, numbers, norms, strict=True))


def galore_adafactor_bytes(params: list[Tensor], settings: Mapping[str, Any]) -> int:
    """By the formula, with row and column means in float32 whatever the parameter is."""
    rank, total = settings["rank"], 0
    for p in params:
        sides = (p.shape[0], p.numel() // p.shape[0]) if p.ndim > 1 else (1, p.numel())
        means = max(sides) + rank if p.ndim > 1 and rank < min(sides) else sum(sides)
        rest = GaLoreAdafactor.state_numel(tuple(p.shape), rank, settings["beta1"]) - means
        total += rest * p.element_size() + 4 * means
    return total


def numbers(of: Callable[[Tensor], int]) -> Callable[[list[Tensor], Mapping[str, Any]], int]:
    """Bytes of `of(parameter)` numbers in the parameter's own precision."""
    return lambda params, settings: sum(of(p) * p.element_size() for p in params)


def adafactor_bytes(params: list[Tensor], settings: Mapping[str, Any]) -> int:
    """An average in the parameter's precision, and row and column means in float32."""
    sides = [(p.shape[0], p.numel() // p.shape[0]) if p.ndim > 1 else (1, p.numel()) for p in params]
    return sum(p.numel() * p.element_size() + 4 * sum(side) for p, side in zip(params, sides, strict=True))


def torch_adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **ADAMW_SETTINGS, fused=True)


def plain_adafactor(params: Iterable[Tensor]) -> Chain:
    return Chain(params, Adafactor(eps=1e-3, beta1=0.9), lr=1e-2, weight_decay=0.1)


def apollo(name: str, optimizer_class: type[APOLLO], settings: Mapping[str, Any], **knobs: Any) -> OptimizerCase:
    return OptimizerCase(
        name=name,
        optimizer_class=optimizer_class,
        settings={**ADAMW_SETTINGS, "refresh": 4, "full_precision_below": 0, **settings},
        knobs={**ADAMW_KNOBS, "refresh": 3, "scale": 4.0, "growth_limit": 1.5, "state_bits": 8, "seed": 1, **knobs},
        # Of no effect on moments that are stored in full anyway.
        switches={"full_precision_below": 4096},
        bad=[
            *CHAIN_BAD,
            *BETAS_BAD,
            ({"eps": -1e-8}, ["eps", "-1e-08"]),
            *RANK_BAD,
            ({"scale_per": "row"}, ["scale_per", "row", "channel", "tensor"]),
            ({"growth_limit": 0.9}, ["growth_limit", "0.9"]),
            ({"state_bits": 16}, ["state_bits", "16", "32", "8", "4"]),
            ({"full_precision_below": -1}, ["full_precision_below", "-1"]),
        ],
        twin=SlowAPOLLO,
        predicted_bytes=apollo_bytes,
        off_equals=(ADAMW_SETTINGS, torch_adamw),
    )


CASES = [
    apollo("APOLLO", APOLLO, {"rank": 2}, rank=3, scale_per="tensor"),
    # Named in full, because the twin knows APOLLO's defaults only.
    apollo("APOLLOMini", APOLLOMini, {"rank": 1, "scale": 2.0, "scale_per": "tensor"}, rank=2, scale_per="channel"),
    OptimizerCase(
        name="GaLoreAdafactor",
        optimizer_class=GaLoreAdafactor,
        settings={**ADAFACTOR_SETTINGS, "lr": 5e-2, "rank": 2, "refresh": 4},
        knobs={
            **ADAFACTOR_KNOBS,
            "rank": 3,
            "refresh": 3,
            "scale": 1.0,
            "basis": "subspace",
            "on_refresh": "rotate",
            "stagger": False,
            "side": "reverse_std",
            "basis_bits": 8,
        },
        # Five refreshes have to be seen before it acts; tests/optim/test_low_rank.py waits for them.
        switches={"settled": 0.5},
        bad=[
            *ADAFACTOR_BAD,
            *RANK_BAD,
            ({"basis": "pca"}, ["basis", "pca", "svd", "subspace"]),
            ({"on_refresh": "forget"}, ["on_refresh", "forget", "keep", "rotate", "reset"]),
            ({"side": "top"}, ["side", "top", "std", "reverse_std", "left", "right"]),
            ({"basis_bits": 16}, ["basis_bits", "16", "32", "8", "4"]),
            ({"settled": 2.0}, ["settled", "2.0"]),
        ],
        twin=SlowGaLoreAdafactor,
        predicted_bytes=galore_adafactor_bytes,
        off_equals=(ADAFACTOR_SETTINGS, plain_adafactor),
    ),
]
"""Rows of registered optimizers."""


def lion(
    params: Iterable[Any], lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
) -> Chain:
    return Chain(params, Lion(betas), lr=lr, weight_decay=weight_decay)


def adafactor(
    params: Iterable[Any], lr: float = 1e-3, decay_exponent: float = -0.8, eps: float = 1e-30,
    clip_threshold: float = 1.0, beta1: float | None = None, weight_decay: float = 0.0,
) -> Chain:  # fmt: skip
    return Chain(params, Adafactor(decay_exponent, eps, clip_threshold, beta1), lr=lr, weight_decay=weight_decay)


def momentum(
    params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.9, dampening: float = 0.0, nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Chain:  # fmt: skip
    return Chain(params, Momentum(momentum, dampening, nesterov), lr=lr, weight_decay=weight_decay)


RULES = [
    OptimizerCase(
        name="Chain-Lion",
        optimizer_class=lion,
        settings={"lr": 1e-2, "weight_decay": 0.1},
        knobs={"lr": 3e-2, "betas": (0.5, 0.9), "weight_decay": 0.5},
        bad=[*CHAIN_BAD, *BETAS_BAD],
        twin=SlowLion,
        predicted_bytes=numbers(lambda p: p.numel()),
    ),
    OptimizerCase(
        name="Chain-Adafactor",
        optimizer_class=adafactor,
        settings=ADAFACTOR_SETTINGS,
        knobs=ADAFACTOR_KNOBS,
        bad=ADAFACTOR_BAD,
        twin=SlowAdafactor,
        predicted_bytes=adafactor_bytes,
    ),
    OptimizerCase(
        name="Chain-Momentum",
        optimizer_class=momentum,
        settings={"lr": 5e-2, "weight_decay": 0.1},
        knobs={"lr": 3e-2, "momentum": 0.5, "dampening": 0.3, "nesterov": True, "weight_decay": 0.5},
        bad=[*CHAIN_BAD, ({"momentum": 1.0}, ["momentum", "1.0"]), ({"dampening": -0.1}, ["dampening", "-0.1"])],
        twin=SlowMomentum,
        predicted_bytes=numbers(lambda p: p.numel()),
    ),
]
"""Rows of rules in a plain chain."""
