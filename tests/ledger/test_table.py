"""The printed table: every figure with a unit a person can read, unknown ones said to be so."""

from __future__ import annotations

from typing import Any

import pytest

from leantrain.ledger.table import render


def summary(**changes: Any) -> dict[str, Any]:
    return {
        "steps": 1200,
        "step_seconds": {"median": 0.0412, "p99": 0.055, "max": 1.25, "total": 61.0},
        "phase_seconds": {
            "data": 0.0, "forward": 0.0103, "backward": 0.02, "exchange": 0.0, "update": 0.01, "other": 9e-4,
        },
        "peak_bytes": {
            "parameters": 4096, "gradients": 4096, "optimizer_state": 8192,
            "activations": 3 * 2**20, "other": 100, "total": 2**30,
        },
        "flops": {"per_step": 2_500_000_000, "total": 3 * 10**12},
        "bytes_sent": 0,
        "examples": 19_200,
        "tokens": 0,
        "energy_joules": None,
        "energy_source": "not available: this machine offers no RAPL counters",
        "events": {"svd_fell_back": 2},
        "device": "cpu",
        **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "steps                1,200 on cpu, 19,200 examples",
        "time per step        41.2 ms median, 55.0 ms 99th percentile, 1.25 s worst, 61.0 s in all",
        "  forward            10.3 ms  25%",
        "  other              900 us  2%",
        "FLOPs per step       2.50 GFLOP, 3.00 TFLOP in all",
        "peak memory          1.00 GiB",
        "  parameters         4.00 KiB",
        "  saved activations  3.00 MiB",
        "  other              100 B",
        "energy               not available: this machine offers no RAPL counters",
        "  svd_fell_back      2",
    ],
)
def test_the_table_says(line: str) -> None:
    assert line in render(summary()).splitlines()


def test_phases_that_took_no_time_are_left_out() -> None:
    assert "exchange" not in render(summary())


def test_unknown_figures_say_so_instead_of_zero() -> None:
    unknown = summary(flops={"per_step": None, "total": None}, energy_joules=1234.0, energy_source="rapl")
    unknown["peak_bytes"] = dict.fromkeys(unknown["peak_bytes"])
    text = render(unknown)
    assert "FLOPs per step       not measured" in text.splitlines()
    assert "peak memory          not measured" in text.splitlines()
    assert "energy               1.23 kJ (rapl)" in text.splitlines()


def test_flops_by_phase_are_shown_with_their_share() -> None:
    assert "  backward           1.25 GFLOP  50%" in render(summary(), {"backward": 1_250_000_000, "update": 0})
