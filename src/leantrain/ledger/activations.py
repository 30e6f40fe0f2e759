"""What autograd keeps for the backward pass: distinct storages, from the moment of saving to the moment of release."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from leantrain.ledger.storages import storages


class Activations:
    """Counts the bytes saved for backward while `recording` was on, for as long as the graph holds them.

    Counted is a storage that autograd saved and that was made during the recording; parameters, buffers and the batch
    existed before and are not. Inside `torch.utils.checkpoint` only the inputs of the checkpointed part are saved, and
    only they count; what it recomputes lives during backward and is not seen here.
    """

    def __init__(self) -> None:
        self.live = 0
        """Bytes saved and not yet released."""
        self.peak: int | None = None
        """Largest value of `live`; None until something was recorded."""
        self._held: dict[int, list[int]] = {}  # storage key -> [bytes, how many saved tensors use it]

    @contextmanager
    def recording(self, existing: Set[int], follow_operations: bool) -> Iterator[None]:
        """Count what is saved in this block.

        `existing` are storage keys never to count (parameters and buffers). With `follow_operations` every operation
        is watched to know which storages are new; without it (a compiled model must not be watched, it would run
        uncompiled) the batch's own tensors count as well.
        """
        births = _Births() if follow_operations else None
        made: Set[int] | None = None if births is None else births.keys
        self.peak = self.peak or 0

        def pack(tensor: Tensor) -> _Saved:
            return _Saved(tensor, self._keys_to_count(tensor, existing, made), self)

        with ExitStack() as stack:
            if births is not None:
                stack.enter_context(births)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, _unpack))
            yield

    def _keys_to_count(self, tensor: Tensor, existing: Set[int], made: Set[int] | None) -> tuple[int, ...]:
        # FSDP makes the full parameters during forward; they, and views of them, are still parameters.
        if isinstance(tensor._base if tensor._is_view() else tensor, nn.Parameter):
            return ()
        keys = []
        for key, size in storages(tensor):
            if key not in existing and (made is None or key in made):
                self._hold(key, size)
                keys.append(key)
        return tuple(keys)

    def _hold(self, key: int, size: int) -> None:
        entry = self._held.setdefault(key, [size, 0])
        if entry[1] == 0:
            self.live += size
            self.peak = max(self.peak or 0, self.live)
        entry[1] += 1

    def _release(self, key: int) -> None:
        entry = self._held[key]
        entry[1] -= 1
        if entry[1] == 0:
            self.live -= entry[0]
            del self._held[key]


class _Saved:
    """A saved tensor in the graph's keeping. Its own death tells when autograd let go of the tensor."""

    __slots__ = ("_keys", "_meter", "_tensor", "_version")

    def __init__(self, tensor: Tensor, keys: tuple[int, ...], meter: Activations) -> None:
        # Detached, because an output leads to the node that keeps it: a circle that only backward would break. Autograd
        # puts the history back, and a detached tensor shares the version that tells of changes in place.
        self._tensor, self._version, self._keys, self._meter = tensor.detach(), tensor._version, keys, meter

    def __del__(self) -> None:
        for key in self._keys:
            self._meter._release(key)

    def tensor(self) -> Tensor:
        # PyTorch skips its own check when hooks are present; without this a wrong gradient would pass in silence.
        if self._tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{list(self._tensor.shape)} is at version {self._tensor._version}; expected version {self._version}"
            )
        return self._tensor


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor()


class _Births(TorchDispatchMode):
    """Collects the keys of storages made by operations, as opposed to storages that came from outside."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = _keys_in(out)
        if made:
            self.keys |= made - _keys_in((args, kwargs))
        return out


def _keys_in(tree: object) -> set[int]:
    return {key for leaf in tree_iter(tree) if isinstance(leaf, Tensor) for key, _ in storages(leaf)}
