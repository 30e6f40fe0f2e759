"""What exchanges would cost on a network, for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from leantrain.display import size, table
from leantrain.plan.links import OnLink

_WIDTH = 120


def show_links(rows: Sequence[OnLink], title: str) -> None:
    """Print a table, the fastest exchange first."""
    dense = next(row for row in rows if row.exchange == "Dense")
    head = ["exchange", "sent per step", "on the link", "work", "together", "x Dense", "faster below"]
    lines = [
        [
            row.exchange, size(row.bytes), _seconds(row.seconds - row.work), _seconds(row.work), _seconds(row.seconds),
            f"{dense.seconds / row.seconds:.1f}", break_even(row.break_even),
        ]
        for row in rows
    ]  # fmt: skip
    console = Console(highlight=False)
    console.print(title, markup=False)
    table(head, lines, Console(highlight=False, width=max(console.width, _WIDTH)), numbers=True)


def links_to_json(rows: Sequence[OnLink]) -> list[dict[str, Any]]:
    """The rows as plain data; a break-even bandwidth without end is null with `always_faster`."""
    return [
        {
            "exchange": row.exchange, "bytes_per_step": row.bytes, "hops": row.hops, "work_seconds": row.work,
            "seconds": row.seconds, "always_faster": row.break_even == math.inf,
            "break_even_bits_per_second": None if row.break_even in (None, math.inf) else row.break_even,
        }
        for row in rows
    ]  # fmt: skip


def break_even(bits_per_second: float | None) -> str:
    """A bandwidth as people write it."""
    if bits_per_second is None:
        return ""
    if bits_per_second == math.inf:
        return "always"
    if bits_per_second <= 0:
        return "never"
    for unit, name in ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")):
        if bits_per_second >= unit:
            return f"{bits_per_second / unit:.3g} {name}"
    return f"{bits_per_second:.3g} bit/s"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
