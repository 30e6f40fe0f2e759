"""Any rule, kept in a few directions of the gradient: the projection that GaLore is made of.

Shape suffixes: K = matrices in the stack, M, N = rows and columns of a weight, R = rank, S = the side that is
projected, L = the other. By default S is the shorter one: with M >= N the columns ("right"), otherwise the rows
("left"). Written for the right side:

    every `refresh` steps   P_NR = leading directions of G_MN         (see `leantrain.optim.bases`)
    every step              U_MR = inner rule on G_MN @ P_NR
                            update = scale * U_MR @ P_NR^T            (kept as that product, never multiplied out)

State: what the basis stores of P (at most R * S numbers) and the inner rule's on L x R instead of L x S. Costs two thin
matrix products, 4 M N R operations, per step. Update: Zhao et al. 2024 (ICML), Algorithm 2; moments that follow the
basis ("rotate"): Hao et al. 2024 (Flora, ICML) for the first, Robert et al. 2024 (LDAdam) for the idea of the second;
fewer refreshes of bases that have settled: Zhang et al. 2024 (Q-GaLore).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.ledger import record
from leantrain.optim.bases import SVD, Basis, Change, Total, alone, change_of_basis
from leantrain.optim.low_bit import LowBit
from leantrain.optim.rules import Factored, Rule, State, load

OnRefresh = Literal["keep", "rotate", "reset"]
Side = Literal["std", "reverse_std", "left", "right"]

_OVERLAPS = 5
"""Refreshes over which the overlap of old and new basis is averaged before a matrix' period changes."""


@dataclass(frozen=True)
class LowRank:
    """`inner` in a subspace of `rank` directions per matrix. Tensors of more dimensions count as [first, all others].

    Args:
        inner: the rule that steps the projected gradient, for instance `Adam()`.
        rank: directions kept, 1 <= rank <= S.
        refresh: steps between two computations of the basis, >= 1.
        scale: factor on the update (the paper's alpha), > 0.
        basis: how the directions are found and stored.
        on_refresh: what happens to the moments when the basis changes. "keep" leaves them, as the paper does; "rotate"
            expresses them in the new basis; "reset" starts them and their bias correction again.
        side: which side of a matrix is projected: "std" the shorter one, as the paper does, which makes the basis
            small; "reverse_std" the longer one, which makes the moments small and the whole never larger; "left" the
            rows, "right" the columns.
        settled: overlap of old and new basis, ||P_old^T P_new||^2 / R in (0, 1], from which a matrix counts as settled:
            if the mean of five refreshes reaches it, the matrix' period is doubled, otherwise halved again down to
            `refresh`. None keeps the period.
        rows: the processes over which the rows of the matrices are spread (FSDP2); the columns are then projected.

    Raises:
        UsageError: a value outside its range, or an inner rule that cannot work where it is put.
    """

    inner: Rule
    rank: int
    refresh: int = 200
    scale: float = 0.25
    basis: Basis = field(default_factory=SVD)
    on_refresh: OnRefresh = "keep"
    side: Side = "std"
    settled: float | None = None
    rows: dist.ProcessGroup | None = None

    moments: ClassVar[Mapping[str, int]] = {}
    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("rank", "refresh"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise UsageError(f"{name} must be an integer >= 1, got {name}={value!r}")
        if isinstance(self.inner, LowRank):
            raise UsageError("inner must be a rule without a basis of its own, got LowRank inside LowRank")
        if not self.scale > 0:
            raise UsageError(f"scale must be > 0, got scale={self.scale!r}")
        if self.on_refresh not in get_args(OnRefresh):
            raise UsageError(f"on_refresh must be one of {get_args(OnRefresh)}, got on_refresh={self.on_refresh!r}")
        if self.side not in get_args(Side):
            raise UsageError(f"side must be one of {get_args(Side)}, got side={self.side!r}")
        if self.settled is not None and not 0 < self.settled <= 1:
            raise UsageError(f"settled must be in (0, 1] or None, got settled={self.settled!r}")
        if self.rows is not None and self.side == "left":
            raise UsageError("side='left' projects rows, but the rows are spread over processes; use 'right' or 'std'")
        if self.rows is not None and not self.inner.elementwise:
            raise UsageError(
                f"{type(self.inner).__name__} needs whole matrices, but the rows are spread over processes"
            )

    @staticmethod
    def fits(shape: torch.Size | tuple[int, ...], rank: int) -> bool:
        """Whether a parameter of this shape is a matrix with more than `rank` directions."""
        return len(shape) >= 2 and rank < min(matrix_shape(shape))

    def projects_columns(self, shape: torch.Size | tuple[int, ...]) -> bool:
        """Whether it is the columns ("right") of a parameter of this shape that are projected."""
        rows, columns = matrix_shape(shape)
        if self.rows is not None or self.side == "right":
            return True
        if self.side == "left":
            return False
        return rows >= columns if self.side == "std" else rows < columns

    def projected_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
        """[M, R] or [R, N]: the shape of a projected gradient and of the moments."""
        rows, columns = matrix_shape(shape)
        return (rows, self.rank) if self.projects_columns(shape) else (self.rank, columns)

    def init(self, param: Tensor) -> State:
        return {
            **self.basis.init(self._size(param.shape), self.rank, param),
            # The step at which the basis is next computed. Negative: there is none yet, and the second follows the
            # first after that many steps (so that an optimizer can spread the refreshes of its matrices).
            "next_refresh": torch.tensor(-self.refresh),
            "moments_since": torch.tensor(0),  # the step from which the inner rule counts its own
            "fallbacks": torch.tensor(0),  # refreshes that failed and left the basis as it was
            # With `settled`: the matrix' present period, and the overlaps seen since it began, summed and counted.
            "period": torch.tensor(self.refresh),
            "overlap": torch.tensor(0.0, dtype=torch.float64),
            "overlaps": torch.tensor(0),
            **self.inner.init(param.new_empty(self.projected_shape(param.shape))),
        }

    def update(self, grad: Tensor, state: State, step: Tensor) -> Factored:
        self.prepare(grad, state, step)
        directions = self._directions(state, grad.shape[1:], grad)
        projected = self._down(grad, directions)
        return self._step(projected, directions, state, step, grad.shape[1:])

    # The parts of `update`, for those who hold a projected gradient and never the whole one.

    def due(self, state: State, step: Tensor) -> Tensor:
        """Which matrices of the stack [K] get a new basis at this step."""
        return step >= state["next_refresh"]

    def prepare(self, grad: Tensor, state: State, step: Tensor) -> None:
        """Compute the bases that are due from these gradients [K, ...]."""
        due = self.due(state, step)
        if due.any():
            self._refresh(grad.flatten(2), state, step, due.nonzero().flatten())

    def project(self, grad: Tensor, state: State) -> Tensor:
        """These gradients in their bases, [K, M, R] or [K, R, N]."""
        return self._down(grad, self._directions(state, grad.shape[1:], grad))

    def lift(self, projected: Tensor, state: State, shape: torch.Size) -> Tensor:
        """The smallest gradients [K, *shape] that `project` makes these of."""
        directions = self._directions(state, shape, projected)
        wide = directions.to(torch.promote_types(directions.dtype, torch.float32))
        # Directions that are stored in few bits are not quite orthonormal, and P^T P is not quite 1. Those of a basis
        # that could not be computed yet are zero.
        gram = wide.mT @ wide
        gram.diagonal(dim1=-2, dim2=-1).add_(torch.finfo(wide.dtype).eps)
        dual = torch.linalg.solve(gram, wide.mT).mT.to(directions.dtype)
        lifted = projected @ dual.mT if self.projects_columns(shape) else dual @ projected
        return lifted.view(-1, *shape)

    def update_projected(self, projected: Tensor, state: State, step: Tensor, shape: torch.Size) -> Factored:
        """The step of parameters of this shape, given projected gradients."""
        directions = self._directions(state, shape, projected)
        return self._step(projected, directions, state, step, shape)

    def _directions(self, state: State, shape: torch.Size, like: Tensor) -> Tensor:
        return self.basis.directions(self._stored(state), self._size(shape), self.rank, like)

    def _down(self, grad: Tensor, directions: Tensor) -> Tensor:
        grad_KMN = grad.flatten(2)
        return grad_KMN @ directions if self.projects_columns(grad.shape[1:]) else directions.mT @ grad_KMN

    def _step(self, projected: Tensor, directions: Tensor, state: State, step: Tensor, shape: torch.Size) -> Factored:
        inner = self.inner.update(projected, state, step - state["moments_since"])
        assert isinstance(inner, Tensor)  # only a low-rank rule returns factors, and one inside another is refused
        inner = inner.to(directions.dtype)
        if self.projects_columns(shape):
            return Factored(inner, directions.mT, self.scale)
        return Factored(directions, inner, self.scale)

    # New bases.

    def _refresh(self, grad_KMN: Tensor, state: State, step: Tensor, due: Tensor) -> None:
        """New bases for the matrices `due` (indices into the stack), and the moments treated as asked."""
        fresh = state["next_refresh"][due] < 0
        for members, first_time in ((due[fresh], True), (due[~fresh], False)):
            if not len(members):
                continue
            # All of a stack is taken as it is: indexing would copy the gradients.
            grads = grad_KMN if len(members) == len(grad_KMN) else grad_KMN[members]
            old = {name: value[members] for name, value in self._stored(state).items()}
            new, failed = self._fit(grads, old, first_time)
            for name, value in new.items():
                state[name][members] = value.to(state[name].dtype)
            state["fallbacks"][members] += failed.to(torch.int64)
            if first_time:
                # A negative number says how many steps after the first basis the second is due.
                waiting = state["next_refresh"][members]
                following = torch.where(failed, waiting, step[members].to(torch.int64) - waiting)
            else:
                self._follow(state, members, old, new, step, grads)
                following = step[members].to(torch.int64) + torch.where(failed, 1, self._period(state, members))
            state["next_refresh"][members] = following

    def _fit(self, grad_KMN: Tensor, old: State, first_time: bool) -> tuple[State, Tensor]:
        """What to store, and which bases [K] could not be computed and are the old ones: zeros the first time, with
        which nothing moves. They are tried again at the next step."""
        wide = grad_KMN.to(torch.promote_types(grad_KMN.dtype, torch.float32))
        total: Total = alone if self.rows is None else functools.partial(_sum_over, group=self.rows)
        try:
            right = self.projects_columns(wide.shape[1:])
            new = self.basis.fit(wide, old, first_time, self.rank, right, total)
            failed = ~_finite(new, len(wide))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if len(wide) > 1:  # one bad matrix must not cost the others their refresh
                parts = [
                    self._fit(grad, {name: value[k : k + 1] for name, value in old.items()}, first_time)
                    for k, grad in enumerate(wide.split(1))
                ]
                joined = {name: torch.cat([new[name] for new, _ in parts]) for name in old}
                return joined, torch.cat([failed for _, failed in parts])
            new, failed = old, torch.ones(1, dtype=torch.bool)
        if failed.any():
            record.event("basis_fallback")
            new = {
                name: torch.where(failed.to(value.device).view(-1, *[1] * (value.ndim - 1)), old[name].to(value), value)
                for name, value in new.items()
            }
        return new, failed

    def _follow(self, state: State, members: Tensor, old: State, new: State, step: Tensor, grad_KMN: Tensor) -> None:
        """Moments and periods after bases have changed from `old` to `new`."""
        shape = grad_KMN.shape[1:]
        if self.on_refresh == "reset":
            for name, value in self.inner.init(grad_KMN.new_empty(self.projected_shape(shape))).items():
                state[name][members] = value
            state["moments_since"][members] = step[members].to(torch.int64)
        if self.on_refresh == "rotate" or self.settled is not None:
            wide = grad_KMN.to(torch.promote_types(grad_KMN.dtype, torch.float32))
            change = change_of_basis(self.basis, old, new, self._size(shape), self.rank, wide)
            if self.on_refresh == "rotate":
                self._carry_moments(state, members, change, shape)
            if self.settled is not None:
                self._observe(state, members, change.overlap())

    def _carry_moments(self, state: State, members: Tensor, change: Change, shape: torch.Size) -> None:
        right = self.projects_columns(shape)
        for name, order in self.inner.moments.items():
            part = {key: value[members] for key, value in state.items() if key.startswith(name)}
            moment = self._read(part, name, shape)
            if moment.shape[-1 if right else -2] != self.rank:
                continue  # a mean over all directions stays what it is
            self._write(part, name, change.carry(moment, order, right))
            for key in part:
                state[key][members] = part[key]

    def _read(self, state: State, name: str, shape: torch.Size) -> Tensor:
        if isinstance(self.inner, LowBit):
            return self.inner.read(state, name, torch.Size(self.projected_shape(shape)))
        return load(state, name)

    def _write(self, state: State, name: str, value: Tensor) -> None:
        if isinstance(self.inner, LowBit):
            self.inner.write(state, name, value)
        else:
            state[name].copy_(value)

    # How often: fewer refreshes for matrices whose subspace has settled.

    def _observe(self, state: State, members: Tensor, overlap: Tensor) -> None:
        """Count how far each basis stayed where it was, and after some refreshes double or halve its period."""
        assert self.settled is not None
        total, count = state["overlap"][members] + overlap, state["overlaps"][members] + 1
        period, enough = state["period"][members], count == _OVERLAPS
        longer = torch.where(total / count >= self.settled, 2 * period, (period // 2).clamp(min=self.refresh))
        state["period"][members] = torch.where(enough, longer, period)
        state["overlap"][members] = total.masked_fill(enough, 0)
        state["overlaps"][members] = count.masked_fill(enough, 0)

    def _period(self, state: State, members: Tensor) -> Tensor:
        return torch.tensor(self.refresh) if self.settled is None else state["period"][members]

    def _size(self, shape: torch.Size | tuple[int, ...]) -> int:
        """S of a parameter of this shape."""
        rows, columns = matrix_shape(shape)
        return columns if self.projects_columns(shape) else rows

    def _stored(self, state: State) -> State:
        """The part of the state that belongs to the basis."""
        try:
            return {name: state[name] for name in _stored_names(self.basis)}  # type: ignore[arg-type]
        except KeyError as missing:
            raise UsageError(
                f"the state has no {missing} for {self.basis}: it was made with another basis, which cannot be changed "
                "during a run"
            ) from None


@functools.lru_cache(maxsize=128)  # a basis is a frozen dataclass
def _stored_names(basis: Any) -> tuple[str, ...]:
    return tuple(basis.init(1, 1, torch.empty(0, device="meta")))


def _finite(stored: State, number: int) -> Tensor:
    """Which of `number` bases hold finite numbers only. Where only indices are stored, all do."""
    finite = torch.ones(number, dtype=torch.bool)
    for value in stored.values():
        if value.is_floating_point() and value.ndim > 1:
            finite &= torch.isfinite(value).flatten(1).all(dim=1).cpu()
    return finite


def _sum_over(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    value, world = value.contiguous(), group.size()
    dist.all_reduce(value, group=group)
    # A ring cuts the numbers into `world` pieces, of which each process sends all but one in each of two rounds.
    record.add("bytes_sent", 2 * (world - 1) * -(-value.numel() // world) * value.element_size())
    return value


def matrix_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor of two or more dimensions seen as [first, all others]."""
    return shape[0], math.prod(shape[1:])
