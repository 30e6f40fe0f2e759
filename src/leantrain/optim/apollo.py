"""APOLLO: the gradient itself, scaled per channel or per matrix by what Adam would do in a few random directions.

Saves: optimizer state. 2 R L + 1 numbers per L x S matrix (L >= S) instead of AdamW's 2 L S: a quarter of it at
R = S / 4, next to nothing at R = 1. The random directions are a function of the step and never stored: they are drawn
again each time. Costs: 2 M N R operations and S R random numbers per step and matrix; no decomposition. Zhu et al. 2025
(MLSys).

    every `refresh` steps   P_SR ~ N(0, 1 / R)                    the same for all matrices of this size
    every step              R_LR = G P
                            N_LR = Adam's update for R            its moments are all the state
                            s_L  = |row of N| / |row of R|        scale_per "tensor": one s = |N| / |R|
                            U    = sqrt(scale) s G                shortened to growth_limit times the last |U|
                            W    = W - lr (decay W + U)

Written for M >= N, so that S are the columns; with M < N, rows and columns change places. Matrices with no more than
`rank` rows or columns, and vectors, take plain AdamW's step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.optim.adam import Adam
from leantrain.optim.bases import Random
from leantrain.optim.chain import Chain
from leantrain.optim.low_bit import LowBit
from leantrain.optim.low_rank import LowRank, matrix_shape
from leantrain.optim.low_rank_chain import FULL_PRECISION_BELOW, Bits
from leantrain.optim.rules import Rule, State

ScalePer = Literal["channel", "tensor"]


class APOLLO(Chain):
    """AdamW whose steps are gradients scaled per channel, with moments in `rank` random directions of every matrix.

    Every option may be set per parameter group. The published recipe gives `rank` to the matrices of attention and
    feed-forward layers only: `parameter_groups(model, [{"params": "hidden", "rank": 128}])` makes such groups.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: step size, >= 0; usually several times AdamW's (the authors use 0.01).
        betas: decay of Adam's averages, each in [0, 1).
        eps: added to Adam's denominator, >= 0.
        weight_decay: decoupled decay, >= 0; each step multiplies a weight by `1 - lr * weight_decay`.
        rank: random directions per matrix, >= 1; None is plain AdamW.
        refresh: steps for which a matrix keeps its directions, >= 1.
        scale: updates of scaled matrices are multiplied by its square root, > 0.
        scale_per: "channel" has a factor for every row or column along the longer side, "tensor" one for the matrix.
        growth_limit: what the norm of a matrix's update may be multiplied by from one step to the next, without
            Adam's bias correction, >= 1; inf sets no limit.
        state_bits: 8 or 4 store Adam's moments block-wise in so many bits; 32 keeps the parameters' own precision.
        full_precision_below: moments of fewer numbers than this keep their precision whatever `state_bits` is.
        seed: of all random directions. The same on every process.

    Raises:
        UsageError: a value outside its range, or a state of other settings. It is a ValueError.

    Examples:
        >>> layer = torch.nn.Linear(64, 32)
        >>> optimizer = APOLLO(layer.parameters(), lr=1e-2, rank=8)
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
        scale: float = 1.0,
        scale_per: ScalePer = "channel",
        growth_limit: float = 1.01,
        state_bits: Bits = 32,
        full_precision_below: int = FULL_PRECISION_BELOW,
        seed: int = 0,
    ) -> None:
        options: dict[str, Any] = {
            "betas": betas,
            "eps": eps,
            "rank": rank,
            "refresh": refresh,
            "scale": scale,
            "scale_per": scale_per,
            "growth_limit": growth_limit,
            "state_bits": state_bits,
            "full_precision_below": full_precision_below,
            "seed": seed,
        }
        super().__init__(params, lr=lr, weight_decay=weight_decay, **options)
        if all(group["rank"] is None for group in self.param_groups):
            warnings.warn(f"no group of this {type(self).__name__} has a rank: it is plain AdamW", stacklevel=2)

    def rule_for(self, param: Tensor, group: dict[str, Any]) -> Rule:
        rank = group["rank"]
        if rank is None or not LowRank.fits(param.shape, rank):
            return _adam(group, param.numel())
        return _apollo(_adam(group, rank * max(matrix_shape(param.shape))), rank, group)

    @staticmethod
    def state_numel(shape: tuple[int, ...], rank: int | None) -> int:
        """Numbers of state that a parameter of this shape takes, counters left out."""
        if rank is None or not LowRank.fits(shape, rank):
            return 2 * math.prod(shape)
        return 2 * rank * max(matrix_shape(shape)) + 1

    def _check(self, group: dict[str, Any]) -> None:
        if group["state_bits"] not in get_args(Bits):
            raise UsageError(f"state_bits must be one of {get_args(Bits)}, got state_bits={group['state_bits']!r}")
        if not (below := group["full_precision_below"]) >= 0:
            raise UsageError(f"full_precision_below must be >= 0, got full_precision_below={below!r}")
        # Also where no matrix of the group is scaled: a wrong setting is wrong before it matters.
        _apollo(_adam(group, 0), 1 if group["rank"] is None else group["rank"], group)
        super()._check(group)


class APOLLOMini(APOLLO):
    """APOLLO with one random direction and one factor per matrix: hardly any state beside the weights.

    As `APOLLO`, with `scale_per="tensor"` and `scale=128`, and meant for `rank=1`: give it to the hidden matrices with
    `parameter_groups(model, [{"params": "hidden", "rank": 1}])`. Embeddings, head and norms then are plain AdamW's.

    Examples:
        >>> layer = torch.nn.Linear(64, 32)
        >>> optimizer = APOLLOMini(layer.parameters(), lr=1e-2, rank=1)
        >>> optimizer.state_numel((4096, 4096), rank=1)
        8193
    """

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
        scale: float = 128.0,
        scale_per: ScalePer = "tensor",
        growth_limit: float = 1.01,
        state_bits: Bits = 32,
        full_precision_below: int = FULL_PRECISION_BELOW,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            rank=rank,
            refresh=refresh,
            scale=scale,
            scale_per=scale_per,
            growth_limit=growth_limit,
            state_bits=state_bits,
            full_precision_below=full_precision_below,
            seed=seed,
        )


@dataclass(frozen=True)
class Apollo:
    """APOLLO's rule for matrices. Tensors of more dimensions count as [first, all others].

    Args:
        inner: Adam, or Adam with its moments in low precision: what would step the projected gradient.
        rank: directions, >= 1.
        refresh: steps for which they are kept, >= 1.
        scale: the square of a factor on the update, > 0.
        scale_per: "channel" or "tensor".
        growth_limit: of the update's norm without bias correction, from one step to the next, >= 1.
        random: where they come from.

    Raises:
        UsageError: a value outside its range.
    """

    inner: Adam | LowBit
    rank: int
    refresh: int = 200
    scale: float = 1.0
    scale_per: ScalePer = "channel"
    growth_limit: float = 1.01
    random: Random = field(default_factory=lambda: Random(orthonormal=False))

    moments: ClassVar[Mapping[str, int]] = {}
    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("rank", "refresh"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise UsageError(f"{name} must be an integer >= 1, got {name}={value!r}")
        if not isinstance(self.inner.inner if isinstance(self.inner, LowBit) else self.inner, Adam):
            raise UsageError(f"inner must be Adam or LowBit of Adam, got {self.inner}")
        if not self.scale > 0:
            raise UsageError(f"scale must be > 0, got scale={self.scale!r}")
        if self.scale_per not in get_args(ScalePer):
            raise UsageError(f"scale_per must be one of {get_args(ScalePer)}, got scale_per={self.scale_per!r}")
        if not self.growth_limit >= 1:
            raise UsageError(f"growth_limit must be >= 1, got growth_limit={self.growth_limit!r}")

    def init(self, param: Tensor) -> State:
        rows, columns = matrix_shape(param.shape)
        projected = (rows, self.rank) if rows >= columns else (self.rank, columns)
        return {
            "update_norm": param.new_zeros(1, dtype=torch.promote_types(param.dtype, torch.float32)),
            **self.inner.init(param.new_empty(projected)),
        }

    def update(self, grad: Tensor, state: State, step: Tensor) -> Tensor:
        grad_KMN = grad.flatten(2).to(torch.promote_types(grad.dtype, torch.float32))
        rows, columns = grad_KMN.shape[1:]
        right = rows >= columns
        directions = self._directions(step, min(rows, columns), grad_KMN)
        projected = grad_KMN @ directions if right else directions.mT @ grad_KMN
        stepped = self.inner.update(projected, state, step)
        assert isinstance(stepped, Tensor)

        over = (-2, -1) if self.scale_per == "tensor" else -1 if right else -2
        factor = _norm(stepped, over) / _norm(projected, over).add_(_TINY)
        factor *= math.sqrt(self.scale) * self._shorten(_norm(factor * _norm(grad_KMN, over), (-2, -1)), state, step)
        return (grad_KMN * factor).view(grad.shape)

    def _directions(self, step: Tensor, size: int, like: Tensor) -> Tensor:
        """The random matrices of these steps, [K, S, R], or [1, S, R] where all of the stack are at the same one."""
        draws, which = (step // self.refresh).to(torch.int64).unique(return_inverse=True)
        directions = self.random.directions({"draw": draws}, size, self.rank, like)
        return directions if len(draws) == 1 else directions[which.to(directions.device)]

    def _shorten(self, norm: Tensor, state: State, step: Tensor) -> Tensor:
        """Factors <= 1 that keep updates of these norms [K, 1, 1] within the limit; what is left is remembered."""
        norm = norm.view(-1, 1) / self._bias_correction(step).to(norm)
        last = state["update_norm"]
        # A matrix that has had no gradient yet, or none but zeros, has no norm to grow from.
        allowed = torch.where(last > 0, self.growth_limit * last, torch.inf)
        factor = torch.where(norm > allowed, allowed / norm, 1)
        state["update_norm"].copy_(torch.where(norm > 0, norm * factor, last))
        return factor.unsqueeze(-1)

    def _bias_correction(self, step: Tensor) -> Tensor:
        """What correcting both of Adam's averages for their zero start multiplies its update by, [K, 1]."""
        adam = self.inner.inner if isinstance(self.inner, LowBit) else self.inner
        assert isinstance(adam, Adam)
        beta1, beta2 = adam.betas
        return ((1 - beta2 ** (step + 1)).sqrt() / (1 - beta1 ** (step + 1))).view(-1, 1)


_TINY = 1e-8
"""Keeps the factor of a channel without gradient finite, as in the authors' code."""


def _norm(matrices: Tensor, over: int | tuple[int, int]) -> Tensor:
    return torch.linalg.vector_norm(matrices, dim=over, keepdim=True)


def _adam(group: dict[str, Any], numel: int) -> Adam | LowBit:
    """Adam with its moments, of `numel` numbers each, as this group stores them."""
    adam = Adam(tuple(group["betas"]), group["eps"])
    if group["state_bits"] == 32 or numel < group["full_precision_below"]:
        return adam
    return LowBit(adam, group["state_bits"])


def _apollo(adam: Adam | LowBit, rank: int, group: dict[str, Any]) -> Apollo:
    return Apollo(
        adam,
        rank,
        group["refresh"],
        group["scale"],
        group["scale_per"],
        group["growth_limit"],
        Random(group["seed"], orthonormal=False),
    )
