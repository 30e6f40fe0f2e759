"""Weights of one byte per number that are trained as they are: no float copy is kept beside them.

    value = low + scale * code            code = 0 .. 255; scale, low: float32, one each per 256 numbers
    forward, backward                     y = x W^T, dx = dy W, dW = dy^T x, with W decoded for that product alone
    w.add_(u), w.mul_(c), ...             code = floor((value + u - low) / scale + noise)        noise in [0, 1)

The last line is stochastic rounding: an update of a tenth of a grid step moves a tenth of the numbers by a whole one,
where rounding to nearest would move none. A grid stays as it is while its numbers fit it, so that numbers which are not
updated do not move either.

Saves: 1 + 8/256 bytes per number instead of 4 or 2. Gradients and optimizer state are float as ever.
Costs: decoding in forward and backward, and decoding, rounding and encoding at every in-place operation; each of those
adds noise of at most one grid step (the range of 256 numbers / 255), so one operation per step is better than two.

Source: Zhang et al. 2024 (Q-GaLore), arXiv 2407.08296, which clamps the zero point and makes new grids at every step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from leantrain.errors import UsageError
from leantrain.integers import Integers, decode, encode, grids, in_groups, on_grids
from leantrain.layers import HIDDEN, Choice, chosen_linears

GROUP = 256
MARGIN = 1 / 16
"""How much wider than its numbers a new grid is made, on both sides: they will move on."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PARTS = ("codes", "scale", "low", "draws")


def int8_weights(model: nn.Module, layers: Choice = HIDDEN, seed: int = 0) -> nn.Module:
    """Turn the weights of linear layers into int8, in place. Biases, embeddings, norms and the head stay as they are.

    The layers stay the same objects, with their hooks, and become `Int8Linear`; their weights are new parameters of the
    dtype, shape and `requires_grad` of the old ones. Make the optimizer afterwards.

    Args:
        model: whose layers are converted.
        layers: "hidden" (every `nn.Linear` but the output layer and tied ones), a regular expression searched for in
            the layers' names, or a function of name and layer.
        seed: of the stochastic rounding.

    Returns:
        The model.

    Raises:
        UsageError: nothing is chosen, or a chosen layer is no plain `nn.Linear` or shares its weight.

    Examples:
        >>> model = int8_weights(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)))
        >>> model[0].weight
        Int8Weight([32, 64], float32)
        >>> [tuple(part.shape) for part in model.state_dict().values()]
        [(32, 64), (8,), (8,), (), (32,), (2, 32), (2,)]
    """
    chosen = chosen_linears(model, layers)
    users = Counter(id(param) for module in model.modules() for param in module.parameters(recurse=False))
    linears: list[nn.Linear] = []
    for name, layer in chosen.items():
        if not isinstance(layer, nn.Linear) or type(layer) is not nn.Linear:
            raise UsageError(f"only a plain nn.Linear can take int8 weights, {name} is a {type(layer).__name__}")
        if users[id(layer.weight)] > 1:
            raise UsageError(f"the weight of {name} is used by another layer too, which would not see the int8 one")
        linears.append(layer)
    for number, layer in enumerate(linears):
        weight = Int8Weight.of(layer.weight, seed * len(linears) + number)
        layer.weight = nn.Parameter(weight, layer.weight.requires_grad)
        layer.__class__ = Int8Linear  # the same object, so that hooks and other references to it stay
    return model


class Int8Linear(nn.Linear):
    """`nn.Linear` whose weight is an `Int8Weight`, saved as the plain tensors it is made of.

    In its `state_dict` `weight.codes` (uint8 [out, in]), `weight.scale` and `weight.low` (float32 [groups]) and
    `weight.draws` (int64, where the rounding's random numbers stand) take the place of `weight`. A state with a float
    `weight` is loaded too, rounded to nearest.
    """

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        bias = destination.pop(f"{prefix}bias", None)
        weight = destination.pop(f"{prefix}weight")
        destination.update({f"{prefix}weight.{part}": getattr(weight, part) for part in _PARTS})
        if bias is not None:
            destination[f"{prefix}bias"] = bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own: Any = self.weight
        key = f"{prefix}weight"
        stored = {part: state_dict.pop(f"{key}.{part}") for part in _PARTS if f"{key}.{part}" in state_dict}
        if len(stored) == len(_PARTS):
            for part, tensor in stored.items():
                if tensor.shape != getattr(own, part).shape:
                    raise UsageError(
                        f"the state's {key}.{part} has shape {list(tensor.shape)}, this layer's "
                        f"{list(getattr(own, part).shape)}"
                    )
            state_dict[key] = Int8Weight.from_parts(stored.values(), own.dtype)
        elif key in state_dict and not isinstance(state_dict[key], Int8Weight):
            state_dict[key] = Int8Weight.of(state_dict[key].to(own.dtype), draws=own.draws)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        sample = Int8Weight.of(torch.zeros((), dtype=self.weight.dtype, device=self.weight.device))
        if not isinstance(fn(sample), Int8Weight):
            raise UsageError("int8 weights stand for float32, bfloat16 or float16; to_empty and double would undo them")
        super()._apply(fn, recurse)
        return self


class Int8Weight(Tensor):
    """A matrix of float32, bfloat16 or float16 to everybody else; inside, a byte per number.

    Works as an `nn.Parameter` of `nn.Linear` (or any `F.linear`): its gradient is an ordinary tensor of its dtype, any
    optimizer that steps by in-place operations trains it, `torch.optim`'s included, and `zeros_like` gives ordinary
    float tensors for their state. Reading it in any other operation decodes it. In-place operations compute in float32
    and round stochastically, with random numbers of its own: PyTorch's generators are left alone, a saved weight goes
    on bit for bit, and copies in several processes that get the same updates stay equal.

    Views (slices, `.T`, `.view`) are refused, because what is written to one would be lost: take `dequantize()`.

    Args:
        codes: uint8, the shape of the weight.
        scale, low: float32 [groups].
        draws: int64 of no dimensions, on the CPU; seeds the next rounding and is one higher after it.
        dtype: what it is to everybody else.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    draws: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, low: Tensor, draws: Tensor, dtype: torch.dtype) -> Int8Weight:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor, low: Tensor, draws: Tensor, dtype: torch.dtype) -> None:
        self.codes, self.scale, self.low, self.draws = codes, scale, low, draws

    @classmethod
    def from_parts(cls, parts: Iterable[Tensor], dtype: torch.dtype) -> Int8Weight:
        """From codes, scale, low and draws, in this order."""
        codes, scale, low, draws = parts
        return cls(codes, scale, low, draws, dtype)

    @classmethod
    @torch.no_grad()
    def of(cls, values: Tensor, seed: int = 0, draws: Tensor | None = None) -> Int8Weight:
        """The numbers rounded to nearest, on grids that just hold them; no number moves by more than half a step."""
        if values.dtype not in _DTYPES:
            raise UsageError(f"an int8 weight stands for float32, bfloat16 or float16, got {values.dtype}")
        if draws is None:
            # Far apart, so that no two weights ever draw the same numbers.
            draws = torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))
        return cls.from_parts((*encode(values.detach(), group=GROUP), draws.clone()), values.dtype)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """An ordinary tensor of the values, in the weight's own dtype unless another is asked for."""
        return decode(Integers(self.codes, self.scale, self.low), GROUP, dtype or self.dtype)

    def _write(self, values: Tensor) -> None:
        """Take these numbers, rounded stochastically. Grids that do not fit them any more are made anew."""
        grouped = in_groups(values.float(), GROUP)
        low, high = grouped.aminmax(dim=1)
        span = 255 * self.scale
        fits = (low >= self.low) & (high <= self.low + span) & (high - low >= span / 2)  # never where one is NaN
        scale, start = grids(grouped, margin=MARGIN)
        self.scale.copy_(torch.where(fits, self.scale, scale))
        self.low.copy_(torch.where(fits, self.low, start))
        noise = torch.Generator(values.device).manual_seed(int(self.draws))
        self.codes.copy_(on_grids(grouped, self.scale, self.low, 8, self.codes.shape, noise))
        self.draws += 1

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Int8Weight({list(self.shape)}, {str(self.dtype).removeprefix('torch.')})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(_PARTS), self.dtype

    @classmethod
    def __tensor_unflatten__(cls, parts: Mapping[str, Tensor], dtype: Any, size: Any, stride: Any) -> Int8Weight:
        return cls.from_parts((parts[name] for name in _PARTS), dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _SAME or (func in _VIEWS and args[0].shape == torch.Size(args[1])):
            return args[0]._with(lambda part: part)
        if func is aten.clone.default:
            return args[0]._with(torch.clone)
        if func is aten._to_copy.default:
            return args[0]._to(**kwargs)
        if func is aten.copy_.default and isinstance(args[0], Int8Weight) and isinstance(args[1], Int8Weight):
            for part in _PARTS:
                getattr(args[0], part).copy_(getattr(args[1], part))
            return args[0]
        if func.__name__.startswith(("_foreach_", "_fused_")):
            return _one_by_one(func, args, kwargs)
        return _decoded(func, args, kwargs)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Int8Weight:
        return type(self).from_parts((change(getattr(self, part)) for part in _PARTS), self.dtype)

    def _to(self, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Int8Weight | Tensor:
        if dtype is not None and dtype not in _DTYPES:
            return self.dequantize(dtype).to(device)
        codes, scale, low = (part.to(device, copy=True) for part in (self.codes, self.scale, self.low))
        return type(self)(codes, scale, low, self.draws.clone(), dtype or self.dtype)


class _Linear(torch.autograd.Function):
    """x W^T + b that keeps the codes, not the decoded weight, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight.dequantize(grad.dtype) if need_x else None,
            rows.mT @ x.reshape(-1, x.shape[-1]) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Int8Weight):
        return F.linear(_plain(input), weight, _plain(bias))
    if torch.is_autocast_enabled(input.device.type):
        low = torch.get_autocast_dtype(input.device.type)
        input, bias = input.to(low), None if bias is None else bias.to(low)
    elif input.dtype != weight.dtype:
        raise UsageError(f"the input has dtype {input.dtype}, the int8 weight stands for {weight.dtype}")
    return _Linear.apply(input, weight, bias)


def _decoded(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operation on decoded weights. What it writes to is computed in float32 and written back."""
    if func.is_view:
        raise UsageError(
            f"a view of an int8 weight is refused ({func}): what is written to it would be lost; take .dequantize()"
        )
    written = _written(func, args, kwargs)
    target = next((t for t in written if isinstance(t, Int8Weight)), None)
    if target is None:
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
    decoded: dict[int, Tensor] = {}

    def wide(value: Any) -> Any:
        """The value in float32, so that an update which float16 would lose still reaches the rounding."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
            return value
        if id(value) not in decoded:
            decoded[id(value)] = value.dequantize(torch.float32) if isinstance(value, Int8Weight) else value.float()
        return decoded[id(value)]

    result = func(*tree_map(wide, args), **tree_map(wide, kwargs))
    for tensor in written:
        new = wide(tensor)
        if isinstance(tensor, Int8Weight):
            tensor._write(new)
        elif new is not tensor:
            tensor.copy_(new)
    return target if isinstance(result, Tensor) else result


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation changes, by its schema."""
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [t for t in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(t, Tensor)]
    return found


def _one_by_one(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An operation on lists of parameters, carried out for one after the other: only one is decoded at a time."""
    length = next(len(arg) for arg in args if isinstance(arg, (list, tuple)) and arg)

    def taken(value: Any, number: int) -> Any:
        return [value[number]] if isinstance(value, (list, tuple)) and len(value) == length else value

    results = [
        _decoded(func, [taken(arg, i) for arg in args], {key: taken(arg, i) for key, arg in kwargs.items()})
        for i in range(length)
    ]
    return None if results[0] is None else [tensor for result in results for tensor in result]


def _plain(value: Any) -> Any:
    return value.dequantize() if isinstance(value, Int8Weight) else value


aten = torch.ops.aten
_SAME = (aten.detach.default, aten.alias.default)
_VIEWS = (aten.view.default, aten.expand.default)
