"""What a planner may propose: optimizers and ways of stepping, what each changes, and what is known of it.

`deviation` orders them: how far training is from plain AdamW in 32 bits. It is a judgement, written down in
docs/planner.md, not a measurement; a combination's is the sum of its parts. What is quoted of a paper stands in a table
that it printed; what is said without one follows from what the method does.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

import leantrain.optim
from leantrain.optim import hidden_matrices, parameter_groups
from leantrain.optim.low_rank import matrix_shape

REFRESH = 200
"""Steps between two bases of a matrix, as in the GaLore authors' pre-training."""


@dataclass(frozen=True)
class Method:
    """An optimizer with its settings."""

    name: str
    """What the planner calls it; `{rank}` stands for the rank."""
    class_name: str
    """In `leantrain.optim`."""
    deviation: int
    fact: str
    """What it costs, in one sentence, with whose figure it is."""
    options: dict[str, Any] = field(default_factory=dict)
    rank: Callable[[int], int] | None = None
    """The rank for hidden matrices whose shorter side is so long; None: all parameters are treated alike."""
    refresh: int | None = None

    def label(self, model: nn.Module) -> str:
        return self.name.format(rank=self.rank and self.rank(shorter_side(model)))

    def make(self, model: nn.Module) -> list[Optimizer]:
        """The optimizer for `model`, its rank given to the hidden matrices alone."""
        cls = getattr(leantrain.optim, self.class_name)
        if self.rank is None:
            return [cls(model.parameters(), **self.options)]
        refresh = {} if self.refresh is None else {"refresh": self.refresh}
        groups = parameter_groups(model, [{"params": "hidden", "rank": self.rank(shorter_side(model))}])
        with warnings.catch_warnings():
            # A model may have matrices that are too small for the rank that suits the most.
            warnings.filterwarnings("ignore", message="rank=")
            return [cls(groups, **refresh, **self.options)]

    def applies_to(self, model: nn.Module) -> bool:
        """Whether the model has matrices that the method is made for."""
        return self.rank is None or shorter_side(model) > 1


def shorter_side(model: nn.Module) -> int:
    """The commonest shorter side of the hidden matrices, by the numbers that they hold; 0 without any."""
    parameters = dict(model.named_parameters())
    sides: Counter[int] = Counter()
    for name in hidden_matrices(model):
        sides[min(matrix_shape(parameters[name].shape))] += parameters[name].numel()
    return sides.most_common(1)[0][0] if sides else 0


def _quarter(side: int) -> int:
    return max(1, side // 4)


METHODS: tuple[Method, ...] = (
    Method("AdamW", "AdamW", 0, "What everything is measured against; two numbers of state per parameter."),
    Method(
        "AdamW 8-bit", "AdamW8bit", 2,
        "Moments rounded to 8 bits in blocks; at 7B, 8-bit Adam ended at perplexity 14.61 where 8-bit GaLore had 14.65 "
        "(Zhao et al. 2024).",
    ),
    Method("AdamW 4-bit", "AdamW4bit", 4, "Moments rounded to 16 values per block; no published figure is quoted."),
    Method(
        "GaLore r={rank}", "GaLoreAdamW", 5,
        "Moments in a quarter of the directions; perplexity 34.88, 25.36, 18.95, 15.64 at 60M to 1B where AdamW had "
        "34.06, 25.08, 18.80, 15.56 (Zhao et al. 2024).",
        {"basis": "subspace"}, _quarter, REFRESH,
    ),
    Method(
        "DCT-AdamW r={rank}", "DCTAdamW", 6,
        "Directions are columns of a fixed cosine transform, chosen anew in every step; only their numbers are kept.",
        {}, _quarter,
    ),
    Method(
        "GaLore 8-bit r={rank}", "GaLoreAdamW", 7,
        "GaLore, moments in 8 bits; at 7B it ended at perplexity 14.65, 8-bit Adam at 14.61 (Zhao et al. 2024).",
        {"basis": "subspace", "state_bits": 8}, _quarter, REFRESH,
    ),
    Method(
        "APOLLO r={rank}", "APOLLO", 7,
        "Gradients scaled per channel by random directions; perplexity 31.55, 22.94, 16.85, 14.20 at 60M to 1B where "
        "GaLore had 34.88, 25.36, 18.95, 15.64 (Zhu et al. 2025).",
        {}, _quarter, REFRESH,
    ),
    Method(
        "GaLore-Adafactor r={rank}", "GaLoreAdafactor", 8,
        "GaLore whose second moments are a number per row and per column.",
        {"basis": "subspace"}, _quarter, REFRESH,
    ),
    Method(
        "APOLLO-Mini", "APOLLO", 8,
        "One random direction and one factor per matrix; perplexity 31.93, 23.53, 17.18, 14.17 at 60M to 1B "
        "(Zhu et al. 2025).",
        {"scale_per": "tensor", "scale": 128.0}, lambda _: 1, REFRESH,
    ),
    Method(
        "Q-GaLore r={rank}", "QGaLoreAdamW", 9,
        "8-bit GaLore with a 4-bit basis, renewed less often where it has settled; perplexity 34.88, 25.53, 19.79 at "
        "60M to 350M (Zhang et al. 2024, with int8 weights).",
        {}, _quarter, REFRESH,
    ),
)  # fmt: skip

BF16 = (3, "bf16 weights: a step below 1/512 of a weight is rounded away, and the moments have 8 significant bits")
IN_BACKWARD = (1, "step in backward: clipping by the whole gradient's norm has to use the step before's")
CHECKPOINTING = (1, "activation checkpointing: the same numbers, {extra:.0%} more arithmetic per step")
