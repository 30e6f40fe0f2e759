"""Is the state honest: it can be saved, loaded, copied and counted.

State that cannot be loaded safely fails `state_loads_without_unpickling`; the resume checks then load it unsafely, so
that one mistake is reported once.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from leantrain.testing.case import NotApplicable, OptimizerCase
from leantrain.testing.problem import STEPS, Stream, assert_same, copies, drive, same


def state_loads_without_unpickling(case: OptimizerCase) -> None:
    """torch.save(state_dict()) can be read with torch.load(weights_only=True)."""
    stream = Stream(case)
    params = stream.parameters()
    optimizer = case.build(params)
    drive(optimizer, params, stream, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        lines = str(error).splitlines()
        cause = next((line.strip() for line in lines if "Unsupported" in line), lines[0])
        raise AssertionError(f"the state holds more than tensors and plain values: {cause}") from None


def resume_is_bit_exact(case: OptimizerCase) -> None:
    """Stopped after any step, saved, and loaded into a new optimizer over new parameters, the run goes on the same.

    In float32, and after every third step in bfloat16: Optimizer.load_state_dict casts state to the dtype of its
    parameter, which ruins what was kept more precisely than that. An lr that was set in the group and not at
    construction must come back, too.
    """
    for dtype in (torch.float32, torch.bfloat16):
        stream = Stream(case, dtype)
        params = stream.parameters()
        optimizer = case.build(params)
        optimizer.param_groups[0]["lr"] = 0.5 * case.settings["lr"]
        stops: list[tuple[list[Tensor], bytes]] = []
        for step in range(STEPS):
            drive(optimizer, params, stream, [step])
            stops.append((copies(params), _saved(optimizer.state_dict())))
        for stop in range(1, STEPS, 1 if dtype == torch.float32 else 3):  # half precision is about dtypes, not steps
            weights, saved = stops[stop - 1]
            new_params = [nn.Parameter(weight) for weight in weights]
            resumed = case.build(new_params)
            resumed.load_state_dict(_loaded(saved))
            drive(resumed, new_params, stream, range(stop, STEPS))
            assert_same(new_params, params, f"{dtype} resumed after step {stop} of {STEPS}")


def state_bytes_are_as_predicted(case: OptimizerCase) -> None:
    """The predicted bytes equal the bytes of the storages that the state holds, each counted once.

    Not counted: whatever is called 'step', and 0-dim tensors (counters, kept scalars).
    """
    if case.predicted_bytes is None:
        raise NotApplicable("the case predicts no bytes")
    for dtype in (torch.float32, torch.bfloat16):
        stream = Stream(case, dtype)
        params = stream.parameters()
        optimizer = case.build(params)
        predicted = case.predicted_bytes(list(params), case.settings)
        drive(optimizer, params, stream, range(6))
        measured = sum(_storages(optimizer.state).values())
        assert measured == predicted, f"{dtype}: predicted {predicted} bytes of state, measured {measured}"


def state_keeps_no_larger_storage_alive(case: OptimizerCase) -> None:
    """The storages behind the state are no larger than the tensors in it: a stored slice is a copy."""
    stream = Stream(case)
    params = stream.parameters()
    optimizer = case.build(params)
    drive(optimizer, params, stream, range(6))
    shown: dict[int, int] = {}
    for tensor in _tensors(optimizer.state):
        pointer = tensor.untyped_storage().data_ptr()
        shown[pointer] = shown.get(pointer, 0) + tensor.numel() * tensor.element_size()
    for pointer, held in _storages(optimizer.state).items():
        assert held <= shown[pointer], f"a state tensor shows {shown[pointer]} bytes and keeps {held} alive"
    own = {param.untyped_storage().data_ptr() for param in params}
    own |= {param.grad.untyped_storage().data_ptr() for param in params if param.grad is not None}
    assert not own & set(shown), "a state tensor shares memory with a parameter or its gradient"


def a_deepcopy_continues_identically_and_independently(case: OptimizerCase) -> None:
    """deepcopy of parameters and optimizer together takes the same way, and leaves the original alone."""
    stream = Stream(case)
    params = stream.parameters()
    optimizer = case.build(params)
    drive(optimizer, params, stream, range(3))
    twin_params, twin = copy.deepcopy((params, optimizer))
    weights, state = copies(params), copies(_tensors(optimizer.state))
    drive(twin, twin_params, stream, range(3, STEPS))
    assert_same(params, weights, "stepping the copy moved the original")
    assert same(list(_tensors(optimizer.state)), state), "stepping the copy changed the original's state"
    drive(optimizer, params, stream, range(3, STEPS))
    assert_same(twin_params, params, "the copy")


def a_pickled_optimizer_continues_identically(case: OptimizerCase) -> None:
    """pickle.loads(pickle.dumps(...)) of parameters and optimizer together takes the same way."""
    stream = Stream(case)
    params = stream.parameters()
    optimizer = case.build(params)
    drive(optimizer, params, stream, range(3))
    new_params, new = pickle.loads(pickle.dumps((params, optimizer)))  # our own bytes, written the line before
    drive(optimizer, params, stream, range(3, STEPS))
    drive(new, new_params, stream, range(3, STEPS))
    assert_same(new_params, params, "the unpickled optimizer")


def _saved(state: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _loaded(saved: bytes) -> dict[str, Any]:
    try:
        return torch.load(io.BytesIO(saved), weights_only=True)
    except pickle.UnpicklingError:
        return torch.load(io.BytesIO(saved), weights_only=False)  # our own bytes; see the module's docstring


def _storages(state: Any) -> dict[int, int]:
    """Bytes of every storage behind the state's tensors, by address; counters and 0-dim tensors left out."""
    storages = (tensor.untyped_storage() for tensor in _tensors(state))
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _tensors(value: Any, seen: frozenset[int] = frozenset()) -> Iterator[Tensor]:
    """All tensors of one dimension or more inside `value`, objects included; the parameters that key it are not."""
    if id(value) in seen:
        return
    seen = seen | {id(value)}
    if isinstance(value, Tensor):
        if value.ndim:
            yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            if not (isinstance(key, str) and key == "step"):
                yield from _tensors(part, seen)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part, seen)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value), seen)


CHECKS = (
    state_loads_without_unpickling,
    resume_is_bit_exact,
    state_bytes_are_as_predicted,
    state_keeps_no_larger_storage_alive,
    a_deepcopy_continues_identically_and_independently,
    a_pickled_optimizer_continues_identically,
)
