"""Progress is told in plain lines to files, live on terminals, and not at all where nobody should speak."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from leantrain.display import Pace, clock, peak_memory, size, summary, watch

EVENTS: list[dict[str, Any]] = [
    {"kind": "start", "name": "small", "step": 0, "steps": 40, "parameters": 1234567, "device": "cpu", "world": 1},
    {"kind": "step", "step": 10, "loss": 2.5, "lr": 0.001, "tokens": 5000, "examples": 40, "seconds": 2.0},
    {"kind": "checkpoint", "step": 10, "path": "here"},
    {"kind": "eval", "step": 10, "val_loss": 2.25, "tokens": 5000, "seconds": 2.0},
    {"kind": "step", "step": 20, "loss": 2.0, "lr": 0.0005, "tokens": 10000, "examples": 80, "seconds": 3.0},
    {"kind": "note", "text": "something [to] know"},
    {"kind": "end", "name": "small", "status": "finished", "seconds": 3.0, "final": {"val_loss": 2.25, "x": None}},
]


def shown(events: list[dict[str, Any]], *, terminal: bool = False, quiet: bool = False) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, highlight=False)
    with watch(quiet, console) as on_event:
        for event in events:
            on_event(event)
    return text.getvalue()


def test_a_file_gets_a_line_for_every_event_worth_one() -> None:
    lines = shown(EVENTS).splitlines()
    assert [line.split("  peak ")[0] for line in lines] == [
        "small: 1,234,567 parameters, 40 steps on cpu",
        "step 10/40  loss 2.5000  lr 0.001  2,500 tokens/s",
        "step 10/40  val loss 2.2500",
        "step 20/40  loss 2.0000  lr 0.0005  5,000 tokens/s",
        "note: something [to] know",
        "small finished  after 3.0 s of training  val loss 2.2500",
    ]
    assert lines[1].endswith("left 6.0 s")
    assert lines[3].endswith("left 2.0 s")


def test_a_file_gets_no_escape_codes_and_no_broken_lines() -> None:
    long = [EVENTS[0] | {"name": "n" * 300}]
    assert "\x1b" not in shown(EVENTS)
    assert shown(long).count("\n") == 1


def test_a_terminal_gets_a_bar_with_the_newest_figures() -> None:
    text = shown(EVENTS[:-1], terminal=True)
    assert "\x1b[" in text
    assert "loss 2.0000  val loss 2.2500  lr 0.0005  5,000 tokens/s" in text
    assert "20/40" in text
    assert "something [to] know" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_says_nothing(terminal: bool) -> None:
    assert shown(EVENTS, terminal=terminal, quiet=True) == ""


def test_only_the_first_process_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert shown(EVENTS) == ""
    monkeypatch.setenv("RANK", "0")
    assert shown(EVENTS) != ""


@pytest.mark.parametrize("terminal", [True, False])
def test_several_runs_one_after_another_are_told_apart(terminal: bool) -> None:
    again = [event | {"name": "second"} if "name" in event else event for event in EVENTS]
    text = shown([*EVENTS, *again], terminal=terminal)
    assert text.index("small finished") < text.index("second: ") < text.index("second finished")


@pytest.mark.parametrize("terminal", [True, False])
def test_an_end_without_a_start_is_told(terminal: bool) -> None:
    assert "a was finished before" in shown(
        [{"kind": "end", "name": "a", "status": "was finished before"}], terminal=terminal
    )


def test_going_on_is_told() -> None:
    assert "(going on from step 10)" in shown([EVENTS[0] | {"step": 10}])


def test_data_without_tokens_are_counted_in_examples() -> None:
    pace = Pace.of(EVENTS[0])
    pace.see({"kind": "step", "step": 10, "tokens": 0, "examples": 40, "seconds": 2.0})
    assert (pace.unit, pace.rate) == ("examples", 20)


def test_a_run_that_goes_on_has_a_speed_only_from_its_second_line() -> None:
    """The first line counts what was done before, in seconds that were counted before too."""
    pace = Pace.of(EVENTS[0] | {"step": 10})
    pace.see(EVENTS[4])
    first = pace.rate
    pace.see({"kind": "step", "step": 30, "tokens": 11000, "examples": 90, "seconds": 4.0})
    assert first is None
    assert pace.rate == 1000
    assert pace.seconds_left == 1


def test_memory_of_this_process_is_not_shown_for_a_run_in_another() -> None:
    here, elsewhere = shown(EVENTS[:2]), shown([event | {"run": "a"} for event in EVENTS[:2]])
    assert "peak" in here
    assert "peak" not in elsewhere


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory()
    if before is None:
        pytest.skip("this system does not tell")
    held = bytearray(before)  # as much again, so that the peak must rise wherever it was
    held[::4096] = b"x" * len(held[::4096])
    assert peak_memory() > before


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 B"), (999, "999 B"), (1536000, "1.54 MB"), (24e9, "24 GB"), (3e15, "3e+03 TB")]
)
def test_sizes_are_in_powers_of_1000(number: float, words: str) -> None:
    assert size(number) == words


@pytest.mark.parametrize(("seconds", "words"), [(4.24, "4.2 s"), (60, "0:01:00"), (3725.6, "1:02:06")])
def test_durations(seconds: float, words: str) -> None:
    assert clock(seconds) == words


def figure(mean: float, std: float | None = 0.5) -> dict[str, Any]:
    return {"mean": mean, "std": std, "n": 1 if std is None else 3}


def test_the_table_of_a_comparison_has_means_spreads_and_ratios() -> None:
    adamw = {"val_loss": figure(2.0), "peak_bytes": figure(4e6, 0.0), "seconds": figure(10)}
    galore = {"val_loss": figure(2.1, None), "peak_bytes": figure(1e6, 0.0), "seconds": figure(20)}
    against = {"val_loss": {"ratio": 1.05}, "peak_bytes": {"ratio": 0.25}, "seconds": {"ratio": None}}
    results = {
        "baseline": "adamw",
        "runs": {
            "adamw": {"status": "finished", "summary": adamw, "versus_baseline": {}},
            "galore": {"status": "interrupted", "summary": galore, "versus_baseline": against},
        },
    }
    text = io.StringIO()
    summary(results, Console(file=text, width=110))
    lines = [line.strip() for line in text.getvalue().splitlines() if line.strip()]
    assert [" ".join(line.split()) for line in lines if "─" not in line] == [
        "run val loss peak memory opt. state time",
        "adamw (baseline) 2.0000 ± 0.5000 4 MB not measured 10.0 s ± 0.5 s",
        "galore (interrupted) 2.1000 1 MB not measured 20.0 s ± 0.5 s",
        "x 1.05 x 0.25",
    ]
