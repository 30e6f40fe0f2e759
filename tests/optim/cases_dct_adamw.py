"""The conformance row of DCT-AdamW, and its slow twin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from leantrain.optim.dct_adamw import DCTAdamW
from leantrain.testing import OptimizerCase

Averages = dict[int, tuple[Tensor, Tensor]]


class SlowDCTAdamW:
    """Modoranu et al. 2025, one matrix, one column at a time: each chosen column has two averages of its own."""

    def __init__(
        self, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, rank: int | None = None, refresh: int = 1, scale: float = 1.0, norm: str = "l1",
        on_refresh: str = "rotate", stagger: bool = True, side: str = "std", state_bits: int = 32,
    ) -> None:  # fmt: skip
        if on_refresh != "rotate" or (stagger and refresh > 1) or state_bits != 32:
            raise NotImplementedError("the twin knows the paper's averages and schedule only")
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.rank, self.refresh, self.scale, self.norm, self.side = rank, refresh, scale, norm, side
        self.t = 0
        self.memory: list[Averages] = []

    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        self.memory = self.memory or [{} for _ in weights]
        self.t += 1
        for w, g, averages in zip(weights, gradients, self.memory, strict=True):
            w *= 1 - self.lr * self.weight_decay
            matrix = g.reshape(g.shape[0], -1)
            if self.rank is not None and g.ndim > 1 and min(matrix.shape) > self.rank:
                w -= self.lr * self.scale * self.projected_update(averages, matrix).reshape(w.shape)
            else:
                w -= self.lr * self.adam(averages, 0, g)

    def projected_update(self, averages: Averages, G: Tensor) -> Tensor:
        """Written for chosen columns; where rows are chosen, G is turned."""
        tall = G.shape[0] >= G.shape[1]
        if {"std": not tall, "reverse_std": tall, "left": True, "right": False}[self.side]:
            return self.update_of_columns(averages, G.T).T
        return self.update_of_columns(averages, G)

    def update_of_columns(self, averages: Averages, G: Tensor) -> Tensor:
        cosines = [cosine(i, G.shape[1]) for i in range(G.shape[1])]
        coefficients = [G @ c for c in cosines]
        if (self.t - 1) % self.refresh == 0:
            order = 1 if self.norm == "l1" else 2
            ranking = sorted(range(len(cosines)), key=lambda i: -coefficients[i].norm(order))
            kept = {i: averages[i] for i in ranking[: self.rank] if i in averages}
            fresh = {i: (torch.zeros_like(coefficients[i]),) * 2 for i in ranking[: self.rank] if i not in averages}
            averages.clear()
            averages.update({**kept, **fresh})
        return sum((torch.outer(self.adam(averages, i, coefficients[i]), cosines[i]) for i in list(averages)), 0 * G)

    def adam(self, averages: Averages, i: int, g: Tensor) -> Tensor:
        m, v = averages.get(i, (torch.zeros_like(g),) * 2)
        m = self.betas[0] * m + (1 - self.betas[0]) * g
        v = self.betas[1] * v + (1 - self.betas[1]) * g**2
        averages[i] = m, v
        return m / (1 - self.betas[0] ** self.t) / ((v / (1 - self.betas[1] ** self.t)).sqrt() + self.eps)


def cosine(i: int, n: int) -> Tensor:
    length = math.sqrt((1 if i == 0 else 2) / n)
    return torch.tensor([length * math.cos(math.pi * i * (2 * j + 1) / (2 * n)) for j in range(n)], dtype=torch.float64)


def bytes_by_formula(params: list[Tensor], settings: Mapping[str, Any]) -> int:
    """2 R L numbers of the parameter's kind and R indices of four bytes, or two averages as large as the parameter."""
    rank, total = settings["rank"], 0
    for p in params:
        sides = (p.shape[0], p.numel() // p.shape[0]) if p.ndim > 1 else (1, 1)
        projected = rank < min(sides)
        total += (
            (2 * rank * max(sides) * p.element_size() + 4 * rank) if projected else 2 * p.numel() * p.element_size()
        )
    return total


PLAIN = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}

CASES = [
    OptimizerCase(
        name="DCTAdamW",
        optimizer_class=DCTAdamW,
        settings={**PLAIN, "lr": 2e-2, "rank": 2, "full_precision_below": 0},
        knobs={
            "lr": 3e-2,
            "betas": (0.5, 0.9),
            "eps": 1e-2,
            "weight_decay": 0.5,
            "rank": 3,
            "refresh": 3,
            "scale": 0.5,
            "norm": "l2",
            "on_refresh": "keep",
            "side": "reverse_std",
            "state_bits": 8,
        },
        # Of no effect at a refresh in every step, on moments that are stored in full, and on bases that always change.
        switches={"stagger": False, "full_precision_below": 4096, "settled": 1.0},
        bad=[
            ({"lr": -1.0}, ["lr", "-1.0"]),
            ({"betas": (1.0, 0.9)}, ["betas", "(1.0, 0.9)"]),
            ({"eps": -1e-8}, ["eps", "-1e-08"]),
            ({"weight_decay": -0.1}, ["weight_decay", "-0.1"]),
            ({"rank": 0}, ["rank", "0"]),
            ({"rank": 2.5}, ["rank", "2.5"]),
            ({"refresh": 0}, ["refresh", "0"]),
            ({"scale": 0.0}, ["scale", "0.0"]),
            ({"norm": "max"}, ["norm", "max", "l1", "l2"]),
            ({"on_refresh": "forget"}, ["on_refresh", "forget", "keep", "rotate", "reset"]),
            ({"side": "top"}, ["side", "top", "std", "reverse_std", "left", "right"]),
            ({"state_bits": 16}, ["state_bits", "16", "32", "8", "4"]),
            ({"full_precision_below": -1}, ["full_precision_below", "-1"]),
            ({"settled": 2.0}, ["settled", "2.0"]),
        ],
        twin=SlowDCTAdamW,
        predicted_bytes=bytes_by_formula,
        off_equals=({**PLAIN, "rank": None}, lambda params: torch.optim.AdamW(params, **PLAIN, fused=True)),
    )
]
"""Rows of registered optimizers."""
