"""What exchanges cost on a network: the arithmetic, and that the work is really measured."""

from __future__ import annotations

import json
import math

import pytest
import torch

from leantrain.cli import main
from leantrain.errors import UsageError
from leantrain.exchange.channel import ring_bytes
from leantrain.plan.links import EXCHANGES, OnLink, bits_per_second, plan_links
from leantrain.plan.show_links import break_even

PARAMS = [torch.empty(2000, 1000, device="meta"), torch.empty(1000, device="meta")]


@pytest.fixture(scope="module")
def rows() -> dict[str, OnLink]:
    return {row.exchange: row for row in plan_links(PARAMS, 4, 1e8, latency=0.01)}


def test_seconds_are_bytes_hops_and_work(rows: dict[str, OnLink]) -> None:
    assert rows.keys() == EXCHANGES.keys()
    for row in rows.values():
        assert row.seconds == pytest.approx(8 * row.bytes / 1e8 + 0.01 * row.hops + row.work)
    dense = rows["Dense"]
    assert dense.bytes == sum(ring_bytes(param.numel(), 4, 4) for param in PARAMS)
    assert (dense.hops, dense.break_even) == (6, None)
    assert dense.work < 1e-4 < min(rows[name].work for name in ("MajorityVote", "PowerSGD", "EntropyCoded"))


@pytest.mark.parametrize("latency", [0.0, 0.01])
def test_at_the_break_even_bandwidth_both_take_as_long(latency: float) -> None:
    rows = {row.exchange: row for row in plan_links(PARAMS, 4, 1e8, latency)}
    finite = [row for row in rows.values() if row.break_even and math.isfinite(row.break_even)]
    assert {row.exchange for row in finite} >= ({"HalfPrecision"} if latency else {"MajorityVote", "PowerSGD"})
    for row in finite:
        seconds = [8 * each.bytes / row.break_even + latency * each.hops + each.work for each in (row, rows["Dense"])]
        assert seconds[0] == pytest.approx(seconds[1], rel=1e-6)


def test_what_meets_seldom_saves_latency_too_and_so_may_pay_on_any_link(rows: dict[str, OnLink]) -> None:
    assert rows["DiLoCo"].break_even == math.inf
    assert rows["DiLoCo"].hops < 1


def test_what_sends_more_never_pays_and_what_sends_less_pays_on_a_slow_link(rows: dict[str, OnLink]) -> None:
    assert rows["MoNNA"].break_even == 0  # whole models to each of three
    for name in ("MajorityVote", "DeepGradientCompression", "DiLoCo"):
        assert rows[name].seconds < rows["Dense"].seconds / 5


def test_on_a_link_like_memory_nothing_pays() -> None:
    fast = {row.exchange: row for row in plan_links(PARAMS, 4, 400e9)}
    assert fast["Dense"].seconds < min(fast[name].seconds for name in ("MajorityVote", "PowerSGD", "EntropyCoded"))


@pytest.mark.parametrize(("text", "bits"), [("100Mbit", 1e8), ("1 Gbit/s", 1e9), ("2.5Gbitps", 2.5e9), ("9kbit", 9e3)])
def test_bandwidths_are_read_as_people_write_them(text: str, bits: float) -> None:
    assert bits_per_second(text) == bits


@pytest.mark.parametrize("text", ["", "100", "100MB", "fast", "-1Mbit", "0Mbit"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"bandwidth must be a number above 0 and a unit, such as 100Mbit"):
        bits_per_second(text)


@pytest.mark.parametrize(
    ("bits", "words"), [(None, ""), (math.inf, "always"), (0.0, "never"), (2.5e9, "2.5 Gbit/s"), (98e3, "98 kbit/s")]
)
def test_break_even_is_written_as_people_read_it(bits: float | None, words: str) -> None:
    assert break_even(bits) == words


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", "llama-tiny", "--bandwidth", "100Mbit", "--processes", "3"]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "MajorityVote" in table and "faster below" in table
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["exchange"] for row in found["exchanges"]} == EXCHANGES.keys()
    assert main([*command, "--json", "--memory", "2GB", "--context", "16", "--dtype", "float32"]) == 0
    assert {"combinations", "exchanges"} <= json.loads(capsys.readouterr().out).keys()
