"""Bytes that tensors really hold: whole storages, each counted once, wherever the tensors are tucked away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_LEAVES = (str, bytes, int, float, complex, type(None), type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)
# A state that points at a module or an optimizer does not own it; following the pointer would count the model.
_FOREIGN = (nn.Module, torch.optim.Optimizer, torch.Generator)


def storage_bytes(tensors: Iterable[Tensor], excluding: Set[int] = frozenset()) -> int:
    """Bytes of the distinct storages behind `tensors`, without those whose key is in `excluding`.

    A view counts its whole storage, since that is what stays allocated; two tensors on one storage count once; a
    DTensor counts what this process holds of it.
    """
    held: dict[int, int] = {}
    for tensor in tensors:
        held.update((key, size) for key, size in storages(tensor) if key not in excluding)
    return sum(held.values())


def storage_keys(tensors: Iterable[Tensor]) -> set[int]:
    """Keys of the storages behind `tensors`. A key names a storage for as long as that storage is alive."""
    return {key for tensor in tensors for key, _ in storages(tensor)}


def storages(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """(key, bytes) of each storage that holds a part of `tensor` on this process."""
    for part in plain_parts(tensor):
        storage = part.untyped_storage()
        yield storage._cdata, storage.nbytes()


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain dense tensors that `tensor` is made of on this process; none if it has no numbers (yet)."""
    wrapper: Any = tensor  # mypy sees no way for a Tensor to be a wrapper
    if is_traceable_wrapper_subclass(wrapper):  # DTensor, quantised and nested tensors: plain tensors inside
        parts = (getattr(wrapper, name) for name in wrapper.__tensor_flatten__()[0])
        for part in parts:
            if isinstance(part, Tensor):  # a DTensor names its device mesh too
                yield from plain_parts(part)
    elif tensor.layout is not torch.strided:
        for part in _sparse_parts(tensor):
            yield from plain_parts(part)
    elif tensor.device.type != "meta" and not nn.parameter.is_lazy(tensor):
        yield tensor


def reachable_tensors(root: object) -> Iterator[Tensor]:
    """Every tensor in `root`: in mappings' values, sequences, sets, and attributes of plain objects, to any depth.

    Modules, optimizers, classes and functions are not entered.
    """
    seen: dict[int, object] = {}  # holds the objects too, so that no id is reused during the walk
    pending: list[object] = [root]
    while pending:
        item = pending.pop()
        if isinstance(item, _LEAVES) or id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            yield item
        elif not isinstance(item, _FOREIGN):
            pending.extend(_children(item))


def _children(item: object) -> Iterable[object]:
    if isinstance(item, Mapping):
        return item.values()
    if isinstance(item, (list, tuple, set, frozenset)):
        return item
    slots = (name for kind in type(item).__mro__ for name in _names(getattr(kind, "__slots__", ())))
    return [*getattr(item, "__dict__", {}).values(), *(getattr(item, name, None) for name in slots)]


def _names(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _sparse_parts(tensor: Tensor) -> Iterable[Tensor]:
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return ()  # opaque layouts (oneDNN) do not say where they keep their numbers
