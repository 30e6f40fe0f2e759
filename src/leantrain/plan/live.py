"""How many bytes are held at every moment of a computation that is only pretended.

Inside `pretending(...)` tensors have shapes, types and a device but no numbers (PyTorch's fake tensors): the operations
that a device would run are chosen as they would be, and none of them runs. `Live` follows the storages that they make.
"""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from leantrain.ledger.flops import formulas

aten = torch.ops.aten
_CUDA_BLOCK = 512  # PyTorch's allocator on CUDA gives memory out in multiples of this
EARNEST = 1 << 17
"""Numbers up to which what an optimizer makes of nothing (counters, tables) is computed in earnest."""


def new_pretence() -> FakeTensorMode:
    """A world of pretended tensors; those of two worlds do not mix."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def pretending(pretence: FakeTensorMode, live: Live) -> Iterator[None]:
    """In the block no operation allocates or computes; `live` knows what would be held."""
    forget_tables()
    try:
        live.pretence = pretence
        with warnings.catch_warnings(), pretence, live, _EverythingIsFinite():
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield
    finally:
        forget_tables()


def forget_tables() -> None:
    """Empty what optimizers cache: tables of pretended numbers must not be found by those who compute."""
    for name, module in list(sys.modules.items()):
        if name.startswith("leantrain.optim"):
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


class _EverythingIsFinite(TorchFunctionMode):
    """Answers `isfinite(x).all()` with yes. The operations on the way take place, as they need memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.isfinite, Tensor.isfinite) and isinstance(out, FakeTensor):
            out.says_yes = True  # type: ignore[attr-defined]
        elif func in (torch.all, Tensor.all) and getattr(args[0], "says_yes", False):
            with unset_fake_temporarily():
                return torch.ones(out.shape, dtype=torch.bool)
        return out


class Live(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its death.

    What never met a pretended tensor (an optimizer's step counters) stays real, so that a program may decide by it. A
    number that nobody knows reads as zero: `if failed.any()` is taken as "no".

    Args:
        device: "cuda" rounds every storage up to what PyTorch's allocator gives out.
        earnest: numbers in a tensor made of nothing up to which it is real.
        on_growth: called after every operation that made something.
    """

    supports_higher_order_operators = True

    def __init__(self, device: str = "cpu", earnest: int = 0, on_growth: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.bytes = 0
        """Held now."""
        self.peak = 0
        """The most that was held."""
        self.moved = 0
        """Bytes that operations read and wrote, each counted as if it ran by itself."""
        self.flops = 0
        """Of matrix products, decompositions and whatever else PyTorch or the ledger has a formula for."""
        self._earnest, self._on_growth = earnest, on_growth
        self._formulas = formulas()
        self._block = _CUDA_BLOCK if device == "cuda" else 1
        self._known: dict[int, weakref.ref[Any]] = {}
        self.pretence: FakeTensorMode | None = None
        """The world of the tensors that it sees."""
        self._pretended_of: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        pretended = [tensor for tensor in given if isinstance(tensor, FakeTensor)]
        if pretended and func in _READS:
            return _READS[func](given[0])
        if given and not pretended:
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        else:
            if len(pretended) < len(given):
                args, kwargs = tree_map_only(Tensor, self._pretended, (args, kwargs))
            out = func(*args, **kwargs)
            if not given and self._earnest and func not in _UNWRITTEN and _is_small(out, self._earnest):
                with unset_fake_temporarily():
                    out = func(*args, **kwargs)
        made = [leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor)]
        self._see(made, {tensor.untyped_storage()._cdata for tensor in given})
        if func in _INSIDE:
            self.peak = max(self.peak, self.bytes + _INSIDE[func](given[0]))
        if not getattr(func, "is_view", False):
            self.moved += sum(tensor.numel() * tensor.element_size() for tensor in (*given, *made))
        if (formula := self._formulas.get(getattr(func, "_overloadpacket", func))) is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _pretended(self, tensor: Tensor) -> Tensor:
        """The pretended form of a real tensor, made once: tables are read very often."""
        if isinstance(tensor, FakeTensor):
            return tensor
        known = self._pretended_of.get(id(tensor))
        if known is None or known[0]() is not tensor:
            assert self.pretence is not None
            fake = self.pretence.from_tensor(tensor)
            self._pretended_of[id(tensor)] = known = (weakref.ref(tensor), fake)
        return known[1]

    def _see(self, made: list[Tensor], old: set[int]) -> None:
        grown = False
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known and storage._cdata not in old:
                self._follow(storage)
                grown = True
        if grown:
            self.peak = max(self.peak, self.bytes)
            self._on_growth()

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // self._block) * self._block

        def died(_: object) -> None:
            self.bytes -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, died)
        self.bytes += size


_UNWRITTEN = (aten.empty.memory_format, aten.empty_strided.default)
"""Room for numbers that are pretended, most likely; as indices, what happens to stand there could lead anywhere."""


def _is_small(out: Any, most: int) -> bool:
    return isinstance(out, FakeTensor) and out.device.type == "cpu" and out.numel() <= most


def _zero(tensor: Tensor) -> bool | int | float:
    return False if tensor.dtype == torch.bool else 0.0 if tensor.is_floating_point() else 0


_READS: dict[Any, Callable[[Tensor], bool | int | float]] = {
    aten._local_scalar_dense.default: _zero,
    aten.is_nonzero.default: lambda _: False,
    aten.equal.default: lambda _: False,
}


_INSIDE: dict[Any, Callable[[Tensor], int]] = {
    aten._linalg_svd.default: lambda matrix: matrix.numel() * matrix.element_size(),  # it works on a copy
}
"""Bytes that a kernel takes for itself while it runs, where that is much and its results do not show it."""
