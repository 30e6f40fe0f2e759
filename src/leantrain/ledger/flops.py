"""Floating-point operations per step, counted on sampled steps and multiplied."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Shape = tuple[int, int]
"""(examples, tokens) of a step: what tells one step's cost from another's."""

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_SHAPES_MEASURED = 16
_COUNTS_KEPT = 32


class FlopMeter:
    """Counts matrix products, convolutions and attention; a multiply-add is two operations, all else is none.

    Attention is counted in full also where a causal mask lets a kernel skip half. A decomposition (SVD, QR) counts
    nothing but its matrix products that PyTorch can see.

    A step of a shape not met before asks for the next step to be counted; up to 16 shapes are counted, and a step of
    any other shape is taken to cost what the most common one does, scaled by tokens (by examples where there are no
    tokens), except for its update, which does not depend on the batch.
    """

    def __init__(self) -> None:
        self._steps: Counter[Shape] = Counter()
        self._counted: dict[Shape, list[dict[str, int]]] = {}  # the newest counts of each shape, by phase
        self._sums: dict[Shape, list[int]] = {}  # shape -> [FLOPs in all counted steps, how many those are]
        self._step: dict[str, int] | None = None
        self._counter = _Counter()
        self._seen = 0  # of the counter's total, what has been given to a phase
        self._phase: str | None = None
        self.wants_next = False
        """Whether the next step should be counted because its shape is probably a new one."""

    @contextmanager
    def counting(self, phase: str) -> Iterator[None]:
        """Count this block as part of `phase`; inside another phase's block, as part of the inner one only."""
        outer = self._phase
        with ExitStack() as stack:
            if outer is None:
                self._step = {} if self._step is None else self._step
                stack.enter_context(self._counter)
            self._hand_over(phase)
            try:
                yield
            finally:
                self._hand_over(outer)

    def _hand_over(self, phase: str | None) -> None:
        total = self._counter.total
        if self._phase is not None and self._step is not None:
            self._step[self._phase] = self._step.get(self._phase, 0) + total - self._seen
        self._seen, self._phase = total, phase

    def begin_step(self) -> None:
        """Forget what was counted in a step that was never ended."""
        self._step = None

    def end_step(self, examples: int, tokens: int) -> None:
        """Book the step that ends now, counted or not."""
        shape = (examples, tokens)
        self._steps[shape] += 1
        if self._step is not None and (shape in self._counted or len(self._counted) < _SHAPES_MEASURED):
            kept = self._counted.setdefault(shape, [])
            kept.append(self._step)
            del kept[:-_COUNTS_KEPT]
            sums = self._sums.setdefault(shape, [0, 0])
            sums[0] += sum(self._step.values())
            sums[1] += 1
        self.wants_next = shape not in self._counted and len(self._counted) < _SHAPES_MEASURED

    def by_phase(self) -> dict[str, int] | None:
        """FLOPs of a typical step of the most common counted shape; None if no step was counted."""
        common = self._common_shape()
        return None if common is None else self._typical(common)

    def per_step(self) -> int | None:
        phases = self.by_phase()
        return None if phases is None else sum(phases.values())

    def total(self) -> int | None:
        """FLOPs of all steps: what was counted, and for steps not counted the typical count of their shape."""
        common = self._common_shape()
        if common is None:
            return None
        total = 0
        for shape, steps in self._steps.items():
            if shape in self._counted:
                counted, times = self._sums[shape]
                total += counted + (steps - times) * sum(self._typical(shape).values())
            else:
                total += steps * _scaled(self._typical(common), common, shape)
        return total

    def _common_shape(self) -> Shape | None:
        return max(self._counted, key=lambda shape: self._steps[shape], default=None)

    def _typical(self, shape: Shape) -> dict[str, int]:
        # The median, so that the first step, on which methods prepare their bases, does not stand for the others.
        counts = self._counted[shape]
        phases = dict.fromkeys(phase for count in counts for phase in count)
        return {phase: statistics.median_low([count.get(phase, 0) for count in counts]) for phase in phases}

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": [[*shape, n] for shape, n in self._steps.items()],
            "counted": [[*shape, *self._sums[shape], counts] for shape, counts in self._counted.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = Counter({(examples, tokens): n for examples, tokens, n in state["steps"]})
        self._sums = {(row[0], row[1]): [row[2], row[3]] for row in state["counted"]}
        self._counted = {(row[0], row[1]): [dict(count) for count in row[4]] for row in state["counted"]}


def is_compiled(model: nn.Module) -> bool:
    """Whether `model` or a part of it goes through torch.compile. Counting would make it run uncompiled."""
    return any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in model.modules())


def compiles_its_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step goes through torch.compile, which refuses to work while operations are counted (seen in 2.13)."""
    return type(optimizer).__module__.startswith("torchao.")


def _scaled(phases: dict[str, int], measured: Shape, shape: Shape) -> int:
    """FLOPs of a step of `shape`, from those of a step of the shape `measured`."""
    unit = 1 if measured[1] and shape[1] else 0  # tokens if both have them, else examples
    update = phases.get("update", 0)
    return update + round((sum(phases.values()) - update) * shape[unit] / measured[unit]) if measured[unit] else update


class _Counter(TorchDispatchMode):
    """Adds up PyTorch's own formulas over every operation that is dispatched while it is active.

    Does what torch.utils.flop_counter.FlopCounterMode does, except that it never replaces an operation that has a
    kernel by its decomposition: that changes the last bits of the gradient of SiLU on a CPU (seen in PyTorch 2.13).
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._formulas = formulas()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and _has_no_kernel(func):
            with self:  # elsewhere PyTorch has taken such an operation apart before we see it
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        formula = self._formulas.get(getattr(func, "_overloadpacket", func))
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def _has_no_kernel(func: Any) -> bool:
    """Whether PyTorch itself runs `func` by its decomposition, on every device."""
    if not isinstance(func, torch._ops.OpOverload) or not func.has_kernel_for_dispatch_key(_COMPOSITE):
        return False
    return not any(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in ("CPU", "CUDA"))


def formulas() -> dict[Any, Any]:
    """FLOPs of an operation, from its arguments and `out_val`, what it gave: PyTorch's formulas and those it lacks.

    In 2.13 it lacks attention on CPUs, products that are added in place, and decompositions.
    """
    aten = torch.ops.aten
    return {
        **flop_registry,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
        aten.addmm_: _product_flops,
        aten.baddbmm_: _product_flops,
        aten._linalg_svd: _svd_flops,
        aten.linalg_qr: _qr_flops,
    }


def _product_flops(_: Tensor, left: Tensor, right: Tensor, **__: object) -> int:
    return 2 * left.numel() * right.shape[-1]


def _svd_flops(matrix: Tensor, *_: object, **__: object) -> int:
    """Thin SVD by bidiagonalisation after a QR, 6 L S^2 + 20 S^3 (Golub & Van Loan, Matrix Computations, 8.6)."""
    short, long = sorted(matrix.shape[-2:])
    return int(matrix.shape[:-2].numel()) * (6 * long * short**2 + 20 * short**3)


def _qr_flops(matrix: Tensor, *_: object, **__: object) -> int:
    """Householder QR with its thin Q formed, 4 L S^2 - 4/3 S^3 (Golub & Van Loan, 5.2)."""
    short, long = sorted(matrix.shape[-2:])
    return int(matrix.shape[:-2].numel()) * (4 * long * short**2 - 4 * short**3 // 3)


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    """scores = QK', output = scores V; shapes [batch, heads, length, width]."""
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[-2] * (width + value.shape[-1])


def _attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    """The kernel computes the scores again, then the gradients of V, scores, Q and K."""
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[-2] * (3 * width + 2 * value.shape[-1])
