"""AdamW in a low-rank subspace of each gradient matrix (GaLore; Zhao et al., ICML 2024, Algorithm 2).

Saves: optimizer state. R (2 L + S) numbers per L x S matrix instead of AdamW's 2 L S, that is 29 % at R = S / 4 where
L = 4 S. Costs: 4 M N R operations per step and matrix, and a new basis every `refresh` steps.

    every `refresh` steps   P = leading R directions of G on its shorter side
    every step              R = G P                       (G M x N with M >= N; otherwise P^T G)
                            N = m^ / (sqrt(v^) + eps)     m, v: Adam's averages of R and R * R
                            W = W - lr (decay W + scale N P^T)

Matrices with no more than `rank` rows or columns, and vectors, take plain AdamW's step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.optim.adam import Adam
from leantrain.optim.bases import SVD, Basis, SubspaceIteration
from leantrain.optim.chain import Chain
from leantrain.optim.low_rank import LowRank, OnRefresh
from leantrain.optim.rules import Rule, State

BasisName = Literal["svd", "subspace"]
_BASES: dict[str, Basis] = {"svd": SVD(), "subspace": SubspaceIteration()}


class GaLoreAdamW(Chain):
    """AdamW that keeps its moments in `rank` directions of every matrix.

    Every option may be set per parameter group. The published recipe gives `rank` to the matrices of attention and
    feed-forward layers only and leaves embeddings and the head to plain AdamW:
    `parameter_groups(model, [{"params": "hidden", "rank": 128}])` makes such groups.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: step size, >= 0. Projected matrices move by `lr * scale`, so it is usually several times AdamW's.
        betas: decay of the averages of g and of g * g, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled decay, >= 0; each step multiplies a weight by `1 - lr * weight_decay`.
        rank: directions kept per matrix, >= 1; None is plain AdamW.
        refresh: steps between two computations of a matrix's basis, >= 1.
        scale: factor on projected updates (the paper's alpha), > 0.
        basis: "svd" is the paper's; "subspace" follows the subspace with one power step and a QR, many times cheaper.
        on_refresh: moments at a new basis: "keep" (the paper's), "rotate" into it, or "reset".
        stagger: spread the matrices' refreshes evenly over `refresh` steps instead of doing all in one. The paper's
            schedule is False.

    Raises:
        UsageError: a value outside its range, or a state of other settings. It is a ValueError.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(64, 32)
        >>> optimizer = GaLoreAdamW(layer.parameters(), lr=1e-2, rank=8, refresh=100)
        >>> layer(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[layer.weight]["exp_avg"].shape, optimizer.state[layer.bias]["exp_avg"].shape
        (torch.Size([8, 64]), torch.Size([32]))
    """

    whole_matrices = True
    hidden_only = ("rank",)
    """Options that a recipe without groups of its own gives to the model's hidden matrices alone."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        refresh: int = 200,
        scale: float = 0.25,
        basis: BasisName = "svd",
        on_refresh: OnRefresh = "keep",
        stagger: bool = True,
    ) -> None:
        options: dict[str, Any] = {
            "betas": betas,
            "eps": eps,
            "rank": rank,
            "refresh": refresh,
            "scale": scale,
            "basis": basis,
            "on_refresh": on_refresh,
            "stagger": stagger,
        }
        super().__init__(params, lr=lr, weight_decay=weight_decay, **options)

    def rule_for(self, param: Tensor, group: dict[str, Any]) -> Rule:
        adam = Adam(tuple(group["betas"]), group["eps"])
        if group["rank"] is None or not LowRank.fits(param.shape, group["rank"]):
            return adam
        return _low_rank(adam, group["rank"], group)

    def init_state(self, param: Tensor, group: dict[str, Any]) -> State:
        state = super().init_state(param, group)
        if "next_refresh" in state and group["stagger"]:
            projected = self._projected()
            place = next(index for index, other in enumerate(projected) if other is param)
            state["next_refresh"] = torch.tensor(-math.ceil((place + 1) * group["refresh"] / len(projected)))
        return state

    @staticmethod
    def state_numel(shape: tuple[int, ...], rank: int | None) -> int:
        """Numbers of state that a parameter of this shape takes, counters left out."""
        if rank is None or not LowRank.fits(shape, rank):
            return 2 * math.prod(shape)
        return LowRank.state_numel(shape, rank)

    def _projected(self) -> list[Tensor]:
        """Parameters that have a basis, in the order in which the groups name them."""
        return [param for group, param in self._numbered() if isinstance(self.rule_for(param, group), LowRank)]

    def _check(self, group: dict[str, Any]) -> None:
        if group["rank"] is not None and not isinstance(group["rank"], int):
            raise UsageError(f"rank must be an integer >= 1 or None, got rank={group['rank']!r}")
        # Also where no parameter of the group has a basis: a wrong setting is wrong before it matters.
        _low_rank(Adam(tuple(group["betas"]), group["eps"]), 1 if group["rank"] is None else group["rank"], group)
        super()._check(group)


def _low_rank(adam: Adam, rank: int, group: dict[str, Any]) -> LowRank:
    if group["basis"] not in _BASES:
        raise UsageError(f"basis must be one of {get_args(BasisName)}, got basis={group['basis']!r}")
    return LowRank(adam, rank, group["refresh"], group["scale"], _BASES[group["basis"]], group["on_refresh"])
