"""Parameters of one shape, stepped as one: stacks of their gradients and state, and the local part of sharded ones.

Under FSDP2 a parameter is a DTensor of which this process holds some rows. Rules see those rows as an ordinary tensor;
what a rule keeps goes back into `optimizer.state` as DTensors over the same memory, so that checkpoints can make it
whole and share it out again over another number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor

from leantrain.errors import UsageError
from leantrain.optim.rules import State


@dataclass
class Stack:
    """Parameters of one shape and their state, joined along a new first axis."""

    params: list[Tensor]
    states: list[State]
    """Each parameter's own, made of slices of `state`."""
    state: State

    @classmethod
    def of(cls, params: list[Tensor], states: list[State]) -> Stack:
        """Join these states. Afterwards each parameter's state is a slice of the stack's: nothing is stored twice."""
        for state in states:
            # Loaders that move state to the parameters' device (Lightning) move counters, too; rules read them here.
            state.update({name: t.cpu() for name, t in state.items() if not t.ndim and t.device.type != "cpu"})
        joined: State = {}
        for name in states[0]:
            parts = [local(state[name]) for state in states]
            if len(parts) == 1:
                joined[name] = parts[0].unsqueeze(0)
                continue
            joined[name] = torch.stack(parts)
            for index, state in enumerate(states):
                state[name] = _in_place_of(state[name], joined[name][index])
        return cls(params, states, joined)

    def grads(self) -> Tensor:
        """The gradients [K, ...], those of one parameter as they are."""
        grads = [local(gradient(param)) for param in self.params]
        return grads[0].unsqueeze(0) if len(grads) == 1 else torch.stack(grads)


def gradient(param: Tensor) -> Tensor:
    """The gradient of a parameter that is known to have one."""
    assert param.grad is not None
    return param.grad


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory: all of an ordinary one, its rows of a sharded one."""
    return tensor._local_tensor.detach() if isinstance(tensor, DTensor) else tensor


def row_group(param: Tensor) -> ProcessGroup | None:
    """The processes over which a matrix's rows are spread; None where this process has the whole matrix.

    Raises:
        UsageError: the parameter is split in another way than FSDP2 does it.
    """
    if not isinstance(param, DTensor):
        return None
    split = [dim for dim, placement in enumerate(param.placements) if not placement.is_replicate()]
    if any(not param.placements[dim].is_shard(0) for dim in split) or len(split) > 1:
        raise UsageError(
            f"a low-rank step needs whole rows on each process, got a parameter of shape {tuple(param.shape)} with "
            f"placements {param.placements}; allowed is one Shard(0), as fully_shard makes it"
        )
    return param.device_mesh.get_group(split[0]) if split else None


def as_state(value: Tensor, param: Tensor, by_rows: bool) -> Tensor:
    """A rule's tensor as it stands in `optimizer.state`: a DTensor, split as the rows of `param` or kept by everyone,
    where `param` is one. Counters stay as they are."""
    if not isinstance(param, DTensor) or not value.ndim:
        return value
    if not by_rows:
        return DTensor.from_local(value, param.device_mesh, _everywhere(param), run_check=False)
    shape = torch.Size([param.shape[0], *value.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(value, param.device_mesh, param.placements, run_check=False, shape=shape, stride=stride)


def share_out(value: Tensor, param: Tensor, by_rows: bool) -> Tensor:
    """A whole tensor of a checkpoint, which every process has, as `as_state` has it. Nothing is sent."""
    if not isinstance(param, DTensor) or not value.ndim or isinstance(value, DTensor):
        return value
    placements = param.placements if by_rows else _everywhere(param)
    return distribute_tensor(value.to(param.device), param.device_mesh, placements, src_data_rank=None)


def _everywhere(param: DTensor) -> tuple[Placement, ...]:
    return tuple(Replicate() for _ in param.placements)


def _in_place_of(old: Tensor, new: Tensor) -> Tensor:
    """`new`, which holds the local numbers of `old`, distributed as `old` is."""
    if not isinstance(old, DTensor):
        return new
    return DTensor.from_local(
        new, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
    )
