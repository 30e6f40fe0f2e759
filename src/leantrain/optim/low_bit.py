"""Low precision as a way to store: any rule's moments in 8 or 4 bits, any basis in 8 or 4, with float32 arithmetic.

Saves: a moment of N numbers takes N + 4 N / 256 bytes in 8 bits and N / 2 + 4 N / 128 in 4 bits, instead of 4 N. Costs:
reading and writing the codes at every step, and what rounding loses.

    m ~ Q[codes] * scale          one scale per block of a moment       (see `leantrain.optim.codes`)
    m, update = inner rule        in float32, a chunk of the parameter at a time
    codes, scale = nearest in Q to m / max |m|

Dettmers, Lewis, Shleifer & Zettlemoyer 2022 (ICLR) for 8 bits, Li, Chen & Zhu 2023 (NeurIPS) for 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from leantrain.errors import UsageError
from leantrain.integers import Integers, decode, encode, pack, unpack
from leantrain.optim.adam import Adam, fused_kernel_applies
from leantrain.optim.bases import Basis, Total, alone
from leantrain.optim.codes import (
    Bits,
    Codebook,
    Room,
    check_bits,
    check_block,
    chunk_of,
    codebook,
    kernels_for,
    round_stochastically,
)
from leantrain.optim.rules import Rule, State, load, store

BLOCK: dict[int, int] = {8: 256, 4: 128}
"""Numbers that share a scale unless told otherwise, as in bitsandbytes and torchao."""


@dataclass(frozen=True)
class LowBit:
    """`inner` with its moments stored in few bits: `Chain(params, LowBit(Lion()))`, `LowRank(LowBit(Adam()), rank=64)`.

    A moment `name` is kept as `name`, its codes (uint8, one or half a byte per number, whole blocks), and `name_scale`
    (float32, one per block). Averages of g take the map with signs, averages of g * g the one without.

    Args:
        inner: the rule that computes.
        bits: 8 or 4.
        block: numbers that share a scale, a multiple of 8; None is 256 for 8 bits and 128 for 4.
        min_numel: a parameter of fewer numbers keeps its moments as `inner` has them. 0 stores all of them in few bits.
        stochastic_rounding: bfloat16 weights are rounded at random to one of their neighbours so that steps too small
            for their precision count on average. Repeats itself with the step count. Nothing changes for float32.

    Raises:
        UsageError: a value outside its range, or a rule without moments of its own.
    """

    inner: Rule
    bits: Bits = 8
    block: int | None = None
    min_numel: int = 0
    stochastic_rounding: bool = False

    elementwise: ClassVar[bool] = False
    """Numbers of a block share a scale, whatever `inner` is."""

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_block("block", self.block_size)
        if not self.min_numel >= 0:
            raise UsageError(f"min_numel must be >= 0, got min_numel={self.min_numel!r}")
        if not self.inner.moments:
            raise UsageError(
                f"{type(self.inner).__name__} keeps no moments that could be stored in {self.bits} bits; "
                f"give LowBit the rule inside it"
            )

    @property
    def moments(self) -> Mapping[str, int]:
        return self.inner.moments

    @property
    def block_size(self) -> int:
        """Numbers that share a scale."""
        return BLOCK[self.bits] if self.block is None else self.block

    @staticmethod
    def state_bytes(numel: int, bits: Bits, block: int, moments: int = 2) -> int:
        """Bytes that moments of `numel` numbers take, scales included: whole blocks of codes, 4 bytes for each."""
        blocks = -(-numel // block)
        return moments * blocks * (block * bits // 8 + 4)

    def init(self, param: Tensor) -> State:
        if self.stochastic_rounding and param.dtype == torch.float16:
            raise UsageError("stochastic_rounding is for bfloat16 weights, got a float16 parameter")
        if param.numel() < self.min_numel:
            return self.inner.init(param)
        # Shapes first, so that a large parameter's moments are never there in full.
        shapes = self.inner.init(torch.empty(param.shape, dtype=param.dtype, device="meta"))
        state = {} if shapes.keys() == self.moments.keys() else self.inner.init(param)
        for name in self.moments:
            book = self._book(name, param.device)
            state[name], state[_scale(name)] = book.empty_state(shapes[name].numel(), self.block_size, param)
        return state

    def update(self, grad: Tensor, state: State, step: Tensor) -> Tensor:
        if self.stochastic_rounding:
            raise UsageError("stochastic_rounding is for a rule that ends the chain, not for one inside another")
        wide = dict(state)
        for name in self.moments:
            wide[name] = self.read(state, name, grad.shape[1:])
        # Moments are float32, so a float64 gradient has nothing to gain.
        update = self.inner.update(grad.float(), wide, step)
        assert isinstance(update, Tensor)  # rules that return factors have no moments of their own
        for name in self.moments:
            self.write(state, name, wide[name])
        return update

    def read(self, state: State, name: str, shape: torch.Size) -> Tensor:
        """The moment `name` of the K parameters of this shape in a stacked state: float32 [K, *shape]."""
        if _scale(name) not in state:
            return load(state, name)
        codes, scale = state[name], state[_scale(name)]
        return self._book(name, codes.device).decode(codes, scale, shape.numel()).view(len(codes), *shape)

    def write(self, state: State, name: str, value: Tensor) -> None:
        """Store a moment [K, ...] in a stacked state."""
        if _scale(name) not in state:
            store(state, name, value)
        else:
            codes, scale = state[name], state[_scale(name)]
            self._book(name, codes.device).encode_into(value.flatten(1), codes, scale)

    def descend(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], lr: float | Tensor, weight_decay: float
    ) -> None:
        """The whole step on `params` in place, with no more of their moments in float32 than a chunk at a time.

        Only for an elementwise `inner`.
        """
        move = _Move(self.inner, float(lr), weight_decay)
        coded = [index for index, state in enumerate(states) if self._coded(state)]
        plain = [index for index, state in enumerate(states) if not self._coded(state)]
        if isinstance(self.inner, Adam) and plain and not self.stochastic_rounding:
            # The kernel counts on the parameter's device, where it can; these counters stay on the CPU.
            counted = [{**states[i], "step": states[i]["step"].to(params[i].device, copy=True)} for i in plain]
            self.inner.descend([params[i] for i in plain], [grads[i] for i in plain], counted, lr, weight_decay)
        else:
            for i in plain:
                moments = {name: load(states[i], name) for name in self.moments}
                move(params[i].detach(), grads[i], moments, states[i]["step"], self._rounding(params[i], states[i], i))
                for name, moment in moments.items():
                    store(states[i], name, moment)
        largest = max((params[i].numel() for i in coded), default=0)
        desk: dict[str, Room] = {}
        for i in coded:
            param, rounding = params[i].detach(), self._rounding(params[i], states[i], i)
            # Copies where there are gaps between the numbers, or codes in their place (8-bit weights).
            in_place = param.is_contiguous() and not is_traceable_wrapper_subclass(param)
            weights = (param if in_place else param.dequantize().contiguous()).view(-1)
            grad = grads[i].contiguous().view(-1)
            kernels = kernels_for(param.device, self.block_size)
            if kernels and isinstance(self.inner, Adam) and rounding is None and param.dtype != torch.float64:
                self._descend_by_kernel(kernels, weights, grad, states[i], move)
            else:
                if not desk or next(iter(desk.values())).values.device != param.device:
                    desk = self._desk(largest, param.device)
                self._descend_in_chunks(weights, grad, states[i], move, desk, rounding)
            if not in_place:
                param.copy_(weights.view(param.shape))
        for state in states:
            state["step"] += 1

    def _descend_by_kernel(self, kernels: Any, weights: Tensor, grad: Tensor, state: State, move: _Move) -> None:
        mean, square = (
            (self._book(name, weights.device), state[name], state[_scale(name)]) for name in ("exp_avg", "exp_avg_sq")
        )
        kernels.adamw(
            weights,
            grad,
            mean,
            square,
            step=int(state["step"]) + 1,
            lr=move.lr,
            betas=move.inner.betas,
            eps=move.inner.eps,
            weight_decay=move.weight_decay,
        )

    def _desk(self, largest: int, device: torch.device) -> dict[str, Room]:
        """Room for one chunk of every moment."""
        block = self.block_size
        one = Room.empty(min(chunk_of(block, device), -(-largest // block) * block), block, device)
        return dict(zip(self.moments, [one, *(one.another() for _ in list(self.moments)[1:])], strict=True))

    def _descend_in_chunks(
        self,
        weights: Tensor,
        grad: Tensor,
        state: State,
        move: _Move,
        desk: dict[str, Room],
        rounding: torch.Generator | None,
    ) -> None:
        chunk = next(iter(desk.values())).values.numel()
        books = {name: self._book(name, weights.device) for name in desk}
        codes = {name: state[name].split(chunk * self.bits // 8) for name in desk}
        scales = {name: state[_scale(name)].view(-1, 1).split(chunk // self.block_size) for name in desk}
        for i, (part, its_grad) in enumerate(zip(weights.split(chunk), grad.split(chunk), strict=True)):
            numel, whole = part.numel(), codes[next(iter(desk))][i].numel() * 8 // self.bits
            rooms = {name: room.first(whole) for name, room in desk.items()}
            for name, room in rooms.items():
                books[name].read(codes[name][i], scales[name][i], room)
            moments = {name: room.values if numel == whole else room.values[:numel] for name, room in rooms.items()}
            move(part, its_grad, moments, state["step"], rounding)
            for name, room in rooms.items():
                if numel < whole:
                    room.values[numel:] = 0  # what fills the last block must not set its scale
                books[name].write(room, codes[name][i], scales[name][i])

    def _rounding(self, param: Tensor, state: State, index: int) -> torch.Generator | None:
        """What rounds this parameter's step at random, the same in every run; None if nothing is to."""
        if not self.stochastic_rounding or param.dtype != torch.bfloat16:
            return None
        return torch.Generator(param.device).manual_seed(int(state["step"]) * 1_000_003 + index)

    def _coded(self, state: State) -> bool:
        return all(_scale(name) in state for name in self.moments)

    def _book(self, name: str, device: torch.device) -> Codebook:
        return codebook(self.bits, self.moments[name] == 1, device)


@dataclass(frozen=True)
class _Move:
    """Moves any part of a parameter, given its moments in the precision of the arithmetic. Counts no steps."""

    inner: Any
    lr: float
    weight_decay: float

    def __call__(
        self, weights: Tensor, grad: Tensor, moments: State, step: Tensor, rounding: torch.Generator | None
    ) -> None:
        half = weights.dtype in (torch.bfloat16, torch.float16)
        wide, grad = (weights.float() if half else weights), grad.to(next(iter(moments.values())).dtype)
        if isinstance(self.inner, Adam) and wide.dtype == torch.float32 and fused_kernel_applies(wide, grad):
            self._adam(wide, grad, moments, step.to(wide.device) + 1)
        else:
            stacked = {name: moment.unsqueeze(0) for name, moment in moments.items()}
            update = self.inner.update(grad.unsqueeze(0), stacked, step.double().view(1))
            wide.mul_(1 - self.lr * self.weight_decay).sub_(update[0], alpha=self.lr)
        if half:
            weights.copy_(wide if rounding is None else round_stochastically(wide, rounding))

    def _adam(self, weights: Tensor, grad: Tensor, moments: State, step: Tensor) -> None:
        """The kernel under `Adam.descend`, whose own checks would take as long as it does on a chunk."""
        torch._fused_adamw_(
            [weights],
            [grad],
            [moments["exp_avg"]],
            [moments["exp_avg_sq"]],
            [],
            [step],
            lr=self.lr,
            beta1=self.inner.betas[0],
            beta2=self.inner.betas[1],
            weight_decay=self.weight_decay,
            eps=self.inner.eps,
            amsgrad=False,
            maximize=False,
        )


@dataclass(frozen=True)
class LowBitBasis:
    """`inner` with its directions stored as integers: groups of them on even grids between their own extremes.

    S x R numbers take S R bits / 8 bytes and 8 for each group. The directions are then orthonormal only to the grids'
    precision. Zhang et al. 2024 (Q-GaLore, arXiv 2407.08296), whose code keeps a 4-bit number in a byte; here two do.

    Args:
        inner: a basis that stores its directions: one that stores indices or a seed has nothing to gain.
        bits: 8 or 4.
        group: numbers that share a grid, a multiple of 8.

    Raises:
        UsageError: a value outside its range, or a basis that does not store its directions (said by `init`).
    """

    inner: Basis
    bits: Bits = 8
    group: int = 256

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_block("group", self.group)

    def init(self, size: int, rank: int, like: Tensor) -> State:
        plain = self.inner.init(size, rank, like)
        if "basis" not in plain:
            raise UsageError(
                f"{type(self.inner).__name__} stores {', '.join(plain) or 'nothing'} instead of its directions, which "
                f"takes less than {self.bits} bits for each of their numbers; use it as it is"
            )
        groups = -(-size * rank // self.group)
        return {
            **plain,
            "basis": like.new_zeros(-(-size * rank * self.bits // 8), dtype=torch.uint8),
            "basis_scale": like.new_zeros(groups, dtype=torch.float32),
            "basis_low": like.new_zeros(groups, dtype=torch.float32),
        }

    def fit(self, grad_KMN: Tensor, stored: State, fresh: bool, rank: int, right: bool, total: Total = alone) -> State:
        size = grad_KMN.shape[-1 if right else -2]
        wide = self._unpacked(stored, size, rank)
        new = self.inner.fit(grad_KMN, wide, fresh, rank, right, total)
        # Matrix by matrix, so that no group lies in two.
        packed = [encode(basis, self.bits, self.group) for basis in new["basis"]]
        return {
            **new,
            "basis": torch.stack([pack(p.codes) if self.bits == 4 else p.codes.flatten() for p in packed]),
            "basis_scale": torch.stack([p.scale for p in packed]),
            "basis_low": torch.stack([p.low for p in packed]),
        }

    def directions(self, stored: State, size: int, rank: int, like: Tensor | None = None) -> Tensor:
        return self.inner.directions(self._unpacked(stored, size, rank), size, rank, like)

    def _unpacked(self, stored: State, size: int, rank: int) -> State:
        """The stored form of `inner`, with float32 directions."""
        bases = []
        for codes, scale, low in zip(stored["basis"], stored["basis_scale"], stored["basis_low"], strict=True):
            shaped = unpack(codes, (size, rank)) if self.bits == 4 else codes.view(size, rank)
            bases.append(decode(Integers(shaped, scale, low), self.group))
        rest = {name: value for name, value in stored.items() if not name.startswith("basis")}
        return rest | {"basis": torch.stack(bases)}


def _scale(name: str) -> str:
    return f"{name}_scale"
