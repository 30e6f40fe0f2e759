"""What an optimizer does to which parameters of a model, and what it will keep of them: to be read before a run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from leantrain.errors import UsageError
from leantrain.optim.chain import Chain
from leantrain.optim.low_rank import LowRank, matrix_shape
from leantrain.optim.state_size import predicted_state_bytes

_NAMED_AT_MOST = 6
"""Parameters that a line of the summary names before it counts the rest."""


@dataclass(frozen=True, kw_only=True)
class Touched:
    """The parameters of one group that are stepped in the same way."""

    group: int
    """Index in `optimizer.param_groups`."""
    method: str
    names: tuple[str, ...]
    numbers: int
    """Numbers in these parameters."""
    state_bytes: int
    """Bytes of state after the first step."""
    columns: int = 0
    """Matrices of which the columns are projected: their basis has as many rows as they have columns."""
    rows: int = 0
    """Matrices of which the rows are projected."""
    too_small: int | None = None
    """The rank that was asked for and that is not below the smaller side of these matrices, so that they are whole."""


def touched(optimizer: Optimizer, model: nn.Module) -> list[Touched]:
    """What `optimizer` does to the parameters of `model`, group by group and method by method.

    Args:
        optimizer: ours, or one of PyTorch's whose state is known (see `predicted_state_bytes`); also as Accelerate and
            `step_in_backward` wrap it. It need not have made a step, and the model may be on the meta device.
        model: names the parameters.

    Raises:
        UsageError: the optimizer holds a parameter that the model does not have, or keeps nobody knows what.
    """
    optimizer = _unwrapped(optimizer)
    names = {id(param): name for name, param in model.named_parameters()}
    rows: dict[tuple[int, str, int | None], list[Tensor]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            if id(param) not in names:
                raise UsageError(
                    f"the optimizer's group {index} has a parameter of shape {tuple(param.shape)} that is not the "
                    f"model's; was it built from another model?"
                )
            rows.setdefault((index, *_method(optimizer, param, group)), []).append(param)
    return [
        Touched(
            group=index,
            method=method,
            names=tuple(names[id(param)] for param in params),
            numbers=sum(param.numel() for param in params),
            state_bytes=predicted_state_bytes(_holding(optimizer, index, params)),
            **_sides(optimizer, params, optimizer.param_groups[index]),
            too_small=rank,
        )
        for (index, method, rank), params in rows.items()
    ]


def summary(optimizer: Optimizer, model: nn.Module) -> str:
    """`touched` as a table for people, with what is left out and why, each said once.

    Raises:
        UsageError: as `touched`.

    Examples:
        >>> from leantrain.optim import GaLoreAdamW, parameter_groups
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(64, 10))
        >>> groups = parameter_groups(model, [{"params": "hidden", "rank": 8}], no_decay=True)
        >>> print(summary(GaLoreAdamW(groups, lr=0.01, weight_decay=0.1), model))
        GaLoreAdamW: 6 tensors, 33.7 k numbers, 44.6 kB of state
        group  lr    decay  method            tensors  numbers  projected            state
        0      0.01    0.1  Adam, rank 8 SVD        2   32.8 k  columns 1, rows 1  36.9 kB
        1      0.01    0.1  Adam                    1      640                      5.1 kB
        2      0.01      0  Adam                    3      330                      2.6 kB
    """
    rows = touched(optimizer, model)
    tensors, numbers = sum(len(row.names) for row in rows), sum(row.numbers for row in rows)
    state = sum(row.state_bytes for row in rows)
    head = (
        f"{type(_unwrapped(optimizer)).__name__}: {_count(tensors, 'tensor')}, {_si(numbers)} numbers, "
        f"{_si(state, 'B')} of state"
    )
    table = [("group", "lr", "decay", "method", "tensors", "numbers", "projected", "state")]
    for row in rows:
        options = _unwrapped(optimizer).param_groups[row.group]
        sides = (("columns", row.columns), ("rows", row.rows))
        table.append(
            (
                str(row.group),
                f"{float(options['lr']):g}",
                f"{options.get('weight_decay', 0):g}",
                row.method,
                str(len(row.names)),
                _si(row.numbers),
                ", ".join(f"{side} {count}" for side, count in sides if count),
                _si(row.state_bytes, "B"),
            )
        )
    return "\n".join([head, *_aligned(table), *_left_out(rows, model)])


def _unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer inside of what Accelerate (`optimizer`) and `step_in_backward` (`inner`) put around it."""
    while not isinstance(optimizer, Chain):
        held = getattr(optimizer, "inner", getattr(optimizer, "optimizer", None))
        if not isinstance(held, Optimizer):
            break
        optimizer = held
    return optimizer


def _method(optimizer: Optimizer, param: Tensor, group: dict[str, Any]) -> tuple[str, int | None]:
    """How a parameter is stepped, and the rank that was asked for where its matrix is too small for it."""
    if not isinstance(optimizer, Chain):
        return type(optimizer).__name__, None
    rule = optimizer.rule_for(param, group)
    asked = group.get("rank")
    too_small = asked is not None and param.ndim >= 2 and not hasattr(rule, "rank")
    return _named(rule), asked if too_small else None


def _named(part: Any) -> str:
    """A rule or a basis in words: what it holds, and how."""
    name = _named(part.inner) if hasattr(part, "inner") else type(part).__name__
    if hasattr(part, "bits"):
        return f"{name} in {part.bits} bits"
    if not hasattr(part, "rank"):
        return name
    basis = f" {_named(part.basis)}" if hasattr(part, "basis") else f" {type(part).__name__}"
    return f"{name}, rank {part.rank}{basis}"


def _sides(optimizer: Optimizer, params: list[Tensor], group: dict[str, Any]) -> dict[str, int]:
    columns = rows = 0
    if not isinstance(optimizer, Chain):
        return {"columns": 0, "rows": 0}
    for param in params:
        rule = optimizer.rule_for(param, group)
        if hasattr(rule, "rank"):
            # What is no LowRank (APOLLO's rule) has no choice and projects the shorter side.
            height, width = matrix_shape(param.shape)
            right = rule.projects_columns(param.shape) if isinstance(rule, LowRank) else height >= width
            columns, rows = columns + right, rows + (not right)
    return {"columns": columns, "rows": rows}


def _holding(optimizer: Optimizer, index: int, params: list[Tensor]) -> Optimizer:
    """An optimizer like this one that holds only these parameters of its group `index`."""
    alone = copy.copy(optimizer)
    alone.param_groups = [{**optimizer.param_groups[index], "params": params}]
    return alone


def _left_out(rows: list[Touched], model: nn.Module) -> list[str]:
    """A line for each reason why a parameter is not what one might think it is."""
    params = dict(model.named_parameters())
    lines = []
    for rank in sorted({row.too_small for row in rows if row.too_small is not None}):
        names = [name for row in rows if row.too_small == rank for name in row.names]
        shown = ", ".join(f"{name} {list(params[name].shape)}" for name in names[:_NAMED_AT_MOST])
        more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
        lines.append(f"Stepped whole, because rank {rank} is not below their smaller side: {shown}{more}.")
    held = {name for row in rows for name in row.names}
    for words, left in (
        ("Frozen", [p for n, p in params.items() if n not in held and not p.requires_grad]),
        ("Trainable, but not this optimizer's", [p for n, p in params.items() if n not in held and p.requires_grad]),
    ):
        if left:
            lines.append(f"{words}: {_count(len(left), 'tensor')}, {_si(sum(p.numel() for p in left))} numbers.")
    return lines


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of equal columns: words to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    aligns = ("<", "<", ">", "<", ">", ">", "<", ">")
    return [
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, aligns, widths, strict=True)).rstrip() for row in table
    ]


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _si(number: int, unit: str = "") -> str:
    """18440 as "18.4 k", with "B" as "18.4 kB"."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {prefix}{unit}"
    return f"{number} {unit}".rstrip()
