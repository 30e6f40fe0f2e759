"""What all low-rank optimizers share: an inner rule in a subspace for matrices, the same rule plain for the rest.

A method of this family is a class that names its inner rule and its defaults; see `leantrain.optim.galore`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.optim.bases import BASES, Basis, BasisName
from leantrain.optim.chain import Chain
from leantrain.optim.low_bit import LowBit, LowBitBasis
from leantrain.optim.low_rank import LowRank
from leantrain.optim.rules import Rule, State
from leantrain.optim.stacks import row_group

Bits = Literal[32, 8, 4]

FULL_PRECISION_BELOW = 4096
"""Numbers in a moment below which it keeps its precision by default; bitsandbytes' and torchao's rule. Norms and biases
are small and sensitive, and projected moments seldom are this small."""


class LowRankChain(Chain):
    """A chain that gives every matrix of a group with a `rank` a low-rank form of `inner_rule`.

    Groups carry lr, weight_decay, rank, refresh, scale, basis, on_refresh, stagger, side, state_bits, basis_bits,
    full_precision_below and settled, and the options of the inner rule; see `GaLoreAdamW` for their meaning.
    """

    hidden_only = ("rank",)
    """Options that a recipe without groups of its own gives to the model's hidden matrices alone."""

    def inner_rule(self, group: dict[str, Any]) -> Rule:
        """The rule that steps projected gradients, and plain ones where there is no rank."""
        raise NotImplementedError

    def basis_for(self, group: dict[str, Any]) -> Basis:
        """How the directions of a group's matrices are found."""
        if group["basis"] not in BASES:
            raise UsageError(f"basis must be one of {get_args(BasisName)}, got basis={group['basis']!r}")
        return BASES[group["basis"]]

    def rule_for(self, param: Tensor, group: dict[str, Any]) -> Rule:
        inner, rank = self.inner_rule(group), group["rank"]
        if rank is None or not LowRank.fits(param.shape, rank):
            return _stored(inner, group, param.numel())
        rule = self._low_rank(inner, rank, group, param)
        return replace(rule, inner=_stored(inner, group, math.prod(rule.projected_shape(param.shape))))

    def init_state(self, param: Tensor, group: dict[str, Any]) -> State:
        state = super().init_state(param, group)
        if "next_refresh" in state and group["stagger"]:
            projected = self._projected()
            place = next(index for index, other in enumerate(projected) if other is param)
            state["next_refresh"] = torch.tensor(-math.ceil((place + 1) * group["refresh"] / len(projected)))
        return state

    def _low_rank(self, inner: Rule, rank: int, group: dict[str, Any], param: Tensor | None = None) -> LowRank:
        basis: Basis = self.basis_for(group)
        if group["basis_bits"] != 32:
            basis = LowBitBasis(basis, group["basis_bits"])
        return LowRank(
            inner,
            rank,
            group["refresh"],
            group["scale"],
            basis,
            group["on_refresh"],
            group["side"],
            group["settled"],
            None if param is None else row_group(param),
        )

    def _projected(self) -> list[Tensor]:
        """Parameters that have a basis, in the order in which the groups name them."""
        return [param for group, param in self._numbered() if isinstance(self.rule_for(param, group), LowRank)]

    def _check(self, group: dict[str, Any]) -> None:
        if group["rank"] is not None and not isinstance(group["rank"], int):
            raise UsageError(f"rank must be an integer >= 1 or None, got rank={group['rank']!r}")
        for name in ("state_bits", "basis_bits"):
            if group[name] not in get_args(Bits):
                raise UsageError(f"{name} must be one of {get_args(Bits)}, got {name}={group[name]!r}")
        if not group["full_precision_below"] >= 0:
            raise UsageError(f"full_precision_below must be >= 0, got {group['full_precision_below']!r}")
        # Also where no parameter of the group has a basis: a wrong setting is wrong before it matters.
        self._low_rank(self.inner_rule(group), 1 if group["rank"] is None else group["rank"], group)
        super()._check(group)
        if group["rank"] is not None:
            self._warn_where_rank_does_not_help(group)

    def _warn_where_rank_does_not_help(self, group: dict[str, Any]) -> None:
        """Say once for a group which of its matrices gain nothing from their rank."""
        rank, inner = group["rank"], self.inner_rule(group)
        shapes = sorted({tuple(param.shape) for param in group["params"] if param.ndim >= 2})
        plain = [shape for shape in shapes if not LowRank.fits(shape, rank)]
        larger = [
            shape
            for shape in shapes
            if shape not in plain
            and _state_bytes(self._low_rank(inner, rank, group), shape) >= _state_bytes(inner, shape)
        ]
        for found, what in ((plain, "take the plain step"), (larger, "take no less state than the plain step would")):
            if found:
                warnings.warn(
                    f"rank={rank} is too large for matrices of shape {', '.join(map(str, found))}: they {what}",
                    stacklevel=2,
                )


def _stored(inner: Rule, group: dict[str, Any], numel: int) -> Rule:
    """`inner` with its moments, of `numel` numbers each, as this group stores them."""
    if group["state_bits"] == 32 or numel < group["full_precision_below"]:
        return inner
    return LowBit(inner, group["state_bits"])


def _state_bytes(rule: Rule, shape: tuple[int, ...]) -> int:
    state = rule.init(torch.empty(shape, device="meta"))
    return sum(value.numel() * value.element_size() for value in state.values() if value.ndim)
