"""Models and optimizers as named tensors and plain JSON, and back: what a checkpoint file holds.

Names come from the model (`layers.0.weight`), never from positions, and sharded tensors are made whole, so what one
process wrote can be read by two, with or without sharding. A stored tensor keeps its dtype bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from leantrain.errors import RunError, UsageError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class UnsavableState(RunError):
    """An optimizer keeps something else than tensors, numbers, text and collections of them; it cannot be saved."""


class TensorFile(Protocol):
    """What is asked of an open safetensors file."""

    def keys(self) -> list[str]: ...
    def get_tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Snapshot:
    """Named tensors, still where they live and possibly sharded, and the JSON that says how they belong together."""

    tensors: dict[str, Tensor]
    structure: dict[str, Any]

    def gathered(self, keep: bool) -> dict[str, Tensor]:
        """The tensors whole, contiguous and on the CPU. All processes must call it; only with `keep` is a tensor
        held on to. Nothing is copied that is whole, contiguous and on the CPU already."""
        whole, seen = {}, set()
        for name, tensor in self.tensors.items():
            complete = tensor.full_tensor() if is_sharded(tensor) else tensor
            if keep:
                complete = complete.to("cpu").contiguous()
                shared = complete.numel() > 0 and complete.data_ptr() in seen  # safetensors refuses shared memory
                whole[name] = complete.clone() if shared else complete
                seen.add(complete.data_ptr())
        return whole


def of_model(model: nn.Module) -> Snapshot:
    """Parameters and persistent buffers; weights that are tied under several names are held under the first.

    Raises:
        UnsavableState: the model's state_dict holds something that is not a plain tensor.
    """
    tensors = {}
    for name, value in _own_state(model).items():
        _must_be_plain(value, f"model state {name!r}")
        tensors[name] = value.detach()
    return Snapshot(tensors, {})


def check_model(model: nn.Module, file: TensorFile) -> None:
    """Refuse tensors of a model with other names, shapes or dtypes.

    Raises:
        UsageError: naming the first difference.
    """
    own, stored = _own_state(model), set(file.keys())
    for name in own:
        if name not in stored:
            raise UsageError(f"the checkpoint is of another model: it has no {name!r}")
    for name in sorted(stored):
        if name not in own:
            raise UsageError(f"the checkpoint is of another model: it has {name!r}, this model has not")
    for name, target in own.items():
        found = file.get_tensor(name)  # memory-mapped: looking at its shape reads nothing
        if found.shape != target.shape or found.dtype != target.dtype:
            raise UsageError(
                f"the checkpoint is of another model: {name!r} is {_described(found)} there, {_described(target)} here"
            )


def restore_model(model: nn.Module, file: TensorFile) -> None:
    """Copy what `of_model` gave into the model's own tensors. Call `check_model` first."""
    with torch.no_grad():
        for name, target in _own_state(model).items():
            target.copy_(_sharded_like(file.get_tensor(name), target))


def of_optimizer(optimizer: Optimizer, model: nn.Module) -> Snapshot:
    """State, groups and anything else of `optimizer.state_dict()`.

    Raises:
        UnsavableState: an entry is neither tensor, number, text, None nor a list, tuple or dict of these.
    """
    described, names = optimizer.state_dict(), _names(optimizer, model)
    tensors: dict[str, Tensor] = {}
    pack = _Packer(_class_path(optimizer), tensors)
    by_index = dict(zip(_flat_params(described["param_groups"]), names, strict=True))
    structure: dict[str, Any] = {"class": _class_path(optimizer), "groups": [], "state": {}, "shared_state": {}}
    for number, group in enumerate(described["param_groups"]):
        options = {key: pack(value, f"groups/{number}/{key}") for key, value in group.items() if key != "params"}
        structure["groups"].append({"params": [by_index[index] for index in group["params"]], "options": options})
    for key, entry in described["state"].items():
        table, name = ("state", by_index[key]) if key in by_index else ("shared_state", key)
        structure[table][name] = pack(entry, f"{table}/{name}")
    structure["other"] = {
        key: pack(value, f"other/{key}") for key, value in described.items() if key not in ("state", "param_groups")
    }
    return Snapshot(tensors, structure)


def of_values(values: dict[str, Any], owner: str) -> Snapshot:
    """Nested dicts, lists and tuples of tensors and plain values; `owner` is named in errors.

    Raises:
        UnsavableState: there is something else among them.
    """
    tensors: dict[str, Tensor] = {}
    return Snapshot(tensors, {"values": _Packer(owner, tensors)(values, "values")})


def values_of(structure: Mapping[str, Any], file: TensorFile) -> dict[str, Any]:
    """What `of_values` was given, its tensors on the CPU."""
    values: dict[str, Any] = _unpack(structure["values"], file, None)
    return values


def check_optimizer(optimizer: Optimizer, model: nn.Module, structure: Mapping[str, Any]) -> None:
    """Refuse a structure that was made of another class of optimizer, or of other parameters.

    Raises:
        UsageError: naming the first difference.
    """
    here, there = _class_path(optimizer), structure["class"]
    if here != there:
        raise UsageError(f"the checkpoint is of another optimizer: {there} there, {here} here")
    names, groups = iter(_names(optimizer, model)), structure["groups"]
    if len(groups) != len(optimizer.param_groups):
        raise UsageError(
            f"the checkpoint's {there} has {len(groups)} parameter groups, this one has {len(optimizer.param_groups)}"
        )
    for number, (mine, stored) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        own = [next(names) for _ in mine["params"]]
        if own != stored["params"]:
            differing = sorted(set(own) ^ set(stored["params"])) or own
            raise UsageError(f"group {number} of the checkpoint's {there} holds other parameters: {differing[0]!r}")


def restore_optimizer(optimizer: Optimizer, structure: Mapping[str, Any], model: nn.Module, file: TensorFile) -> None:
    """Put back what `of_optimizer` gave. Call `check_optimizer` first."""
    names = _names(optimizer, model)
    index = {name: number for number, name in enumerate(names)}
    params = dict(zip(names, _params(optimizer), strict=True))
    state: dict[Any, Any] = {name: _unpack(entry, file, None) for name, entry in structure["shared_state"].items()}
    exact = {name: _unpack(entry, file, params[name]) for name, entry in structure["state"].items()}
    state.update({index[name]: entry for name, entry in exact.items()})
    groups = [
        {key: _unpack(value, file, None) for key, value in group["options"].items()}
        | {"params": [index[name] for name in group["params"]]}
        for group in structure["groups"]
    ]
    other = {key: _unpack(value, file, None) for key, value in structure["other"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups, **other})
    for name, entry in exact.items():  # load_state_dict casts state to the parameter's dtype, and spoils text in lists
        optimizer.state[params[name]] = _exactly(optimizer.state[params[name]], entry)


class _Packer:
    """Turns a value into JSON and puts the tensors in it aside under a name."""

    def __init__(self, owner: str, tensors: dict[str, Tensor]) -> None:
        self.owner = owner
        self.tensors = tensors

    def __call__(self, value: Any, key: str) -> Any:
        if isinstance(value, Tensor):
            _must_be_plain(value, f"{self.owner} state {key!r}")
            self.tensors[key] = value.detach()
            return {"tensor": key}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self(item, f"{key}/{number}") for number, item in enumerate(value)]}
        if isinstance(value, dict) and all(isinstance(name, (str, int)) for name in value):
            return {"dict": [[name, self(item, f"{key}/{name}")] for name, item in value.items()]}
        raise UnsavableState(f"{self.owner} keeps a {type(value).__qualname__} in its state ({key}), not only tensors")


def _unpack(value: Any, file: TensorFile, param: Tensor | None) -> Any:
    """The inverse of `_Packer`; tensors of `param`'s shape are sharded as it is. Of others only their optimizer knows
    how they are shared out: it is given them whole (see `leantrain.optim.chain.Chain.load_state_dict`)."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        tensor = file.get_tensor(content).clone()  # a tensor of its own, not a window on the file
        return tensor if param is None or tensor.shape != param.shape else _sharded_like(tensor, param)
    if kind == "dict":
        return {name: _unpack(item, file, param) for name, item in content}
    items = [_unpack(item, file, param) for item in content]
    return tuple(items) if kind == "tuple" else items


def _exactly(loaded: Any, exact: Any) -> Any:
    """`loaded` with what is not as in `exact` put right; a tensor of the right dtype stays the optimizer's own."""
    if isinstance(loaded, Tensor) and isinstance(exact, Tensor):
        return loaded if loaded.dtype == exact.dtype else exact.to(loaded.device)
    if isinstance(loaded, dict) and isinstance(exact, dict):
        return loaded | {key: _exactly(loaded[key], exact[key]) for key in loaded.keys() & exact.keys()}
    if isinstance(loaded, (list, tuple)) and isinstance(exact, (list, tuple)):
        return type(exact)(_exactly(a, b) for a, b in zip(loaded, exact, strict=True))
    return exact


def _own_state(model: nn.Module) -> dict[str, Any]:
    """The model's own tensors by name, each once, without the prefix that a DDP wrapper adds."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    state, seen = {}, set()
    for name, value in inner.state_dict(keep_vars=True).items():  # keep_vars: tied weights are then one object
        if id(value) not in seen:
            seen.add(id(value))
            state[name] = value
    return state


def _names(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """The model's name of every parameter of the optimizer, in its order."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    known = {id(param): name for name, param in inner.named_parameters()}
    return [known.get(id(param), f"#{number}") for number, param in enumerate(_params(optimizer))]


def _params(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _flat_params(groups: list[dict[str, Any]]) -> list[int]:
    return [index for group in groups for index in group["params"]]


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this process holds only a part. Told by its method, because importing DTensor takes a second."""
    return hasattr(tensor, "full_tensor")


def _sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    """`whole`, or this process's part of it where `like` is sharded. Every process has `whole`: nothing is sent."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _must_be_plain(value: Any, what: str) -> None:
    plain = type(value) in (Tensor, nn.Parameter, nn.Buffer) or (isinstance(value, Tensor) and is_sharded(value))
    if not plain or value.layout != torch.strided:
        raise UnsavableState(f"{what} is a {type(value).__qualname__}, which cannot be saved as a plain tensor")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _class_path(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
