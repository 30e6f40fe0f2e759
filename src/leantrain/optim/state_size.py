"""Bytes of optimizer state: those that are there, and those that will be there after the first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from leantrain.errors import UsageError
from leantrain.optim.chain import Chain
from leantrain.optim.stacks import local


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of memory that `optimizer.state` keeps alive in this process, counters (tensors of zero dimensions) left
    out.

    Storages are counted, each once and whole: a slice that keeps a larger tensor alive counts as the larger one.
    """
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(optimizer.state) if t.ndim}
    return sum(held.values())


def predicted_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What `state_bytes` will be once every parameter has been stepped. Nothing is allocated, and the parameters may be
    on the meta device. Known are our optimizers and PyTorch's AdamW, Adam, SGD and Muon.

    Raises:
        UsageError: another optimizer, whose state nobody described.
    """
    if isinstance(optimizer, Chain):
        return sum(_chain_bytes(optimizer, param, group) for group, param in _members(optimizer))
    return sum(
        _numbers_per_number(optimizer, group) * local(param).numel() * param.element_size()
        for group, param in _members(optimizer)
    )


def _chain_bytes(chain: Chain, param: Tensor, group: dict[str, Any]) -> int:
    state = chain.rule_for(param, group).init(local(param.detach()).to("meta"))
    return sum(value.numel() * value.element_size() for value in state.values() if value.ndim)


def _numbers_per_number(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> int:
    """Numbers of state for each number of a parameter."""
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is one, too
        return 3 if group["amsgrad"] else 2
    if isinstance(optimizer, torch.optim.SGD):
        return 1 if group["momentum"] else 0
    if isinstance(optimizer, torch.optim.Muon):
        return 1
    raise UsageError(
        f"the state of {type(optimizer).__name__} cannot be predicted; known are the optimizers of leantrain.optim and "
        "torch.optim's AdamW, Adam, SGD and Muon"
    )


def _members(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], Tensor]]:
    return ((group, param) for group in optimizer.param_groups for param in group["params"])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        inside = _inside(value)
        if not inside:
            yield local(value)
        for part in inside:
            yield from _tensors(part)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):  # other packages keep tensors in plain objects (galore-torch's projector)
        yield from _tensors(vars(value))


def _inside(tensor: Any) -> list[Any]:
    """The tensors that one of another class is made of, such as the codes and scales of torchao's quantised state."""
    if isinstance(tensor, DTensor) or not is_traceable_wrapper_subclass(tensor):
        return []
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
