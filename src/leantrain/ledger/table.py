"""A ledger's summary as lines of plain text for a person."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_LABELS = {"optimizer_state": "optimizer state", "activations": "saved activations", "other": "other"}


def render(summary: dict[str, Any], flops_by_phase: dict[str, int] | None = None) -> str:
    """A table of what a run cost, without a trailing newline. Raises nothing; what is unknown says so."""
    rows = list(_rows(summary, flops_by_phase or {}))
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join(f"{label:<{width}}{value}".rstrip() for label, value in rows)


def _rows(summary: dict[str, Any], flops_by_phase: dict[str, int]) -> Iterator[tuple[str, str]]:
    step, flops = summary["step_seconds"], summary["flops"]
    yield "steps", f"{summary['steps']:,} on {summary['device']}{_amounts(summary)}"
    yield (
        "time per step",
        (
            f"{_seconds(step['median'])} median, {_seconds(step['p99'])} 99th percentile, "
            f"{_seconds(step['max'])} worst, {_seconds(step['total'])} in all"
        ),
    )
    for phase, seconds in summary["phase_seconds"].items():
        if seconds:
            yield f"  {phase}", f"{_seconds(seconds)}{_share(seconds, step['median'])}"
    for block, phases in summary.get("block_seconds", {}).items():
        parts = ", ".join(f"{phase} {_seconds(seconds)}" for phase, seconds in phases.items())
        yield f"  block {block}", f"{parts} in the mean"
    per_step, total = (_scaled(flops[key], 1000, "FLOP") for key in ("per_step", "total"))
    yield "FLOPs per step", per_step if flops["total"] is None else f"{per_step}, {total} in all"
    for phase, count in flops_by_phase.items():
        if count:
            yield f"  {phase}", f"{_scaled(count, 1000, 'FLOP')}{_share(count, flops['per_step'])}"
    yield "peak memory", _scaled(summary["peak_bytes"]["total"], 1024, "B")
    for kind, size in summary["peak_bytes"].items():
        if kind != "total":
            yield f"  {_LABELS.get(kind, kind)}", _scaled(size, 1024, "B")
    yield "bytes sent", _scaled(summary["bytes_sent"], 1024, "B")
    joules = summary["energy_joules"]
    yield "energy", f"{_scaled(joules, 1000, 'J')} ({summary['energy_source']})" if joules is not None else (
        summary["energy_source"])  # fmt: skip
    for name, count in summary["events"].items():
        yield f"  {name}", f"{count:,}"


def _amounts(summary: dict[str, Any]) -> str:
    return "".join(f", {summary[what]:,} {what}" for what in ("examples", "tokens") if summary[what])


def _share(part: float, whole: float) -> str:
    return f"  {part / whole:.0%}" if whole else ""


def _seconds(seconds: float) -> str:
    """Three significant digits in s, ms or us."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds * 1e6)} us"


def _scaled(value: float | None, base: int, unit: str) -> str:
    """Three significant digits with a prefix: of 1024 (KiB, MiB) or of 1000 (kJ, GFLOP)."""
    if value is None:
        return "not measured"
    prefixes = ("", "Ki", "Mi", "Gi", "Ti", "Pi") if base == 1024 else ("", "k", "M", "G", "T", "P", "E")
    power = 0
    while abs(value) >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    return f"{_three(value) if power else f'{value:,.0f}'} {prefixes[power]}{unit}"


def _three(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
