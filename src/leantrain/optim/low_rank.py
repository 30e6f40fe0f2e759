"""Any rule, kept in a few directions of the gradient: the projection that GaLore is made of.

Shape suffixes: K = matrices in the stack, M, N = rows and columns of a weight, R = rank, S = min(M, N), L = max(M, N).
With M >= N the columns are projected ("right"), otherwise the rows ("left"); written for the right side:

    every `refresh` steps   P_NR = leading directions of G_MN         (see `leantrain.optim.bases`)
    every step              U_MR = inner rule on G_MN @ P_NR
                            update = scale * U_MR @ P_NR^T            (kept as that product, never multiplied out)

State: R * S numbers for the basis and the inner rule's on L x R instead of L x S. Costs two thin matrix products,
4 M N R operations, per step. Update: Zhao et al. 2024 (ICML), Algorithm 2; moments that follow the basis ("rotate"):
Hao et al. 2024 (Flora, ICML) for the first, Robert et al. 2024 (LDAdam) for the idea of the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.ledger import record
from leantrain.optim.bases import SVD, Basis
from leantrain.optim.rules import Factored, Rule, State, load

OnRefresh = Literal["keep", "rotate", "reset"]


@dataclass(frozen=True)
class LowRank:
    """`inner` in a subspace of `rank` directions per matrix. Tensors of more dimensions count as [first, all others].

    Args:
        inner: the rule that steps the projected gradient, for instance `Adam()`.
        rank: directions kept, 1 <= rank < min(M, N).
        refresh: steps between two computations of the basis, >= 1.
        scale: factor on the update (the paper's alpha), > 0.
        basis: how the directions are found.
        on_refresh: what happens to the moments when the basis changes. "keep" leaves them, as the paper does; "rotate"
            expresses them in the new basis; "reset" starts them and their bias correction again.

    Raises:
        UsageError: a value outside its range.
    """

    inner: Rule
    rank: int
    refresh: int = 200
    scale: float = 0.25
    basis: Basis = field(default_factory=SVD)
    on_refresh: OnRefresh = "keep"

    moments: ClassVar[Mapping[str, int]] = {}

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

    @staticmethod
    def fits(shape: torch.Size | tuple[int, ...], rank: int) -> bool:
        """Whether a parameter of this shape is a matrix with more than `rank` directions."""
        return len(shape) >= 2 and rank < min(matrix_shape(shape))

    @staticmethod
    def state_numel(shape: tuple[int, ...], rank: int, moments: int = 2) -> int:
        """Numbers of state for a parameter that fits: R (moments * L + S)."""
        short, long = sorted(matrix_shape(shape))
        return rank * (moments * long + short)

    def init(self, param: Tensor) -> State:
        rows, columns = matrix_shape(param.shape)
        right = rows >= columns
        projected = (rows, self.rank) if right else (self.rank, columns)
        return {
            "basis": param.new_zeros(columns if right else rows, self.rank),
            # The step at which the basis is next computed. Negative: there is none yet, and the second follows the
            # first after that many steps (so that an optimizer can spread the refreshes of its matrices).
            "next_refresh": torch.tensor(-self.refresh),
            "moments_since": torch.tensor(0),  # the step from which the inner rule counts its own
            "fallbacks": torch.tensor(0),  # refreshes that failed and left the basis as it was
            **self.inner.init(param.new_empty(projected)),
        }

    def update(self, grad: Tensor, state: State, step: Tensor) -> Factored:
        grad_KMN = grad.flatten(2)
        right = grad_KMN.shape[1] >= grad_KMN.shape[2]
        due = step >= state["next_refresh"]
        if due.any():
            self._refresh(grad_KMN, state, step, due.nonzero().flatten(), right)
        basis = state["basis"]
        projected = grad_KMN @ basis if right else basis.mT @ grad_KMN
        inner = self.inner.update(projected, state, step - state["moments_since"])
        assert isinstance(inner, Tensor)  # only a low-rank rule returns factors, and one inside another is refused
        inner = inner.to(basis.dtype)
        return Factored(inner, basis.mT, self.scale) if right else Factored(basis, inner, self.scale)

    def _refresh(self, grad_KMN: Tensor, state: State, step: Tensor, due: Tensor, right: bool) -> None:
        """New bases for the matrices `due` (indices into the stack), and the moments treated as asked."""
        fresh = state["next_refresh"][due] < 0
        for members, first_time in ((due[fresh], True), (due[~fresh], False)):
            if not len(members):
                continue
            old = state["basis"][members]
            # All of a stack is taken as it is: indexing would copy the gradients.
            grads = grad_KMN if len(members) == len(grad_KMN) else grad_KMN[members]
            new, failed = self._fit(grads, old, first_time, right)
            state["basis"][members] = new.to(old.dtype)
            if not first_time:
                self._carry_moments(state, members, old, new, right, step)
            state["fallbacks"][members] += failed.to(torch.int64)
            now = step[members].to(torch.int64)
            following = now - state["next_refresh"][members] if first_time else now + self.refresh
            # What failed is tried again at the next step.
            state["next_refresh"][members] = torch.where(
                failed, state["next_refresh"][members] if first_time else now + 1, following
            )

    def _fit(self, grad_KMN: Tensor, old: Tensor, first_time: bool, right: bool) -> tuple[Tensor, Tensor]:
        """Bases, and which of them [K] could not be computed and are the old ones (coordinate axes where none is)."""
        wide = grad_KMN.to(torch.promote_types(grad_KMN.dtype, torch.float32))
        try:
            new = self.basis.fit(wide, old, first_time, self.rank, right)
            failed = ~torch.isfinite(new).all(dim=(-2, -1))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if len(wide) > 1:  # one bad matrix must not cost the others their refresh
                parts = [
                    self._fit(grad, basis, first_time, right)
                    for grad, basis in zip(wide.split(1), old.split(1), strict=True)
                ]
                return torch.cat([new for new, _ in parts]), torch.cat([failed for _, failed in parts])
            new, failed = old.to(wide.dtype), torch.ones(1, dtype=torch.bool, device=old.device)
        if failed.any():
            record.event("basis_fallback")
            kept = torch.eye(*old.shape[-2:], dtype=new.dtype, device=new.device) if first_time else old.to(new.dtype)
            new = torch.where(failed[:, None, None], kept, new)
        return new, failed.cpu()

    def _carry_moments(
        self, state: State, members: Tensor, old: Tensor, new: Tensor, right: bool, step: Tensor
    ) -> None:
        if self.on_refresh == "keep":
            return
        if self.on_refresh == "reset":
            for name in self.inner.moments:
                state[name][members] = 0
            state["moments_since"][members] = step[members].to(state["moments_since"].dtype)
            return
        change_KRR = old.to(new.dtype).mT @ new
        for name, order in self.inner.moments.items():
            moment = load({name: state[name][members]}, name)
            turn = change_KRR.square() if order == 2 else change_KRR
            state[name][members] = (moment @ turn if right else turn.mT @ moment).to(state[name].dtype)


def matrix_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor of two or more dimensions seen as [first, all others]."""
    rest = 1
    for size in shape[1:]:
        rest *= size
    return shape[0], rest
