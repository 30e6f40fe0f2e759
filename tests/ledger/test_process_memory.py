"""The measured total on a CPU: the kernel's peak, its replacement, and what is unknown."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from leantrain.ledger.process_memory import ProcessPeak

MIB = 2**20


def fake_proc(folder: Path, resident_kb: int, peak_kb: int, writable: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "status").write_text(f"Name:\tx\nVmHWM:\t {peak_kb} kB\nVmRSS:\t {resident_kb} kB\n")
    if writable:
        (folder / "clear_refs").write_text("")
    return folder


def test_the_total_is_growth_plus_what_was_held_at_the_start(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path / "proc", resident_kb=1000, peak_kb=1000)
    peak = ProcessPeak(proc)
    peak.start(already_held=300 * 1024)
    fake_proc(proc, resident_kb=1100, peak_kb=1700)
    peak.sample()
    assert (proc / "clear_refs").read_text() == ""  # written anew by fake_proc: the reset happened before
    assert peak.read() == (1700 - 1000 + 300) * 1024


def test_the_kernels_peak_is_reset_at_the_start_and_after_a_pause(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path / "proc", resident_kb=1000, peak_kb=9000)
    peak = ProcessPeak(proc)
    peak.start(already_held=0)
    assert (proc / "clear_refs").read_text() == "5"
    (proc / "clear_refs").write_text("")
    peak.pause()
    peak.resume()
    assert (proc / "clear_refs").read_text() == "5"


def test_the_peak_before_a_pause_is_kept_and_that_of_the_pause_is_not(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path / "proc", resident_kb=1000, peak_kb=1000)
    peak = ProcessPeak(proc)
    peak.start(already_held=0)
    fake_proc(proc, resident_kb=1100, peak_kb=1700)
    peak.pause()
    fake_proc(proc, resident_kb=1100, peak_kb=9000)
    peak.resume()
    fake_proc(proc, resident_kb=1100, peak_kb=1200)  # what the kernel says after the reset
    peak.sample()
    assert peak.read() == 700 * 1024


def test_without_permission_to_reset_samples_take_its_place(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path / "proc", resident_kb=1000, peak_kb=9000, writable=False)
    (proc / "clear_refs").mkdir()  # cannot be written to, not even by root
    peak = ProcessPeak(proc)
    peak.start(already_held=0)
    (proc / "status").write_text("VmHWM:\t 9000 kB\nVmRSS:\t 1500 kB\n")
    peak.sample()
    (proc / "status").write_text("VmHWM:\t 9000 kB\nVmRSS:\t 1200 kB\n")
    peak.sample()
    assert peak.read() == 500 * 1024


def test_without_proc_the_total_is_not_known(tmp_path: Path) -> None:
    peak = ProcessPeak(tmp_path / "nothing")
    peak.start(already_held=5)
    peak.sample()
    peak.resume()
    assert peak.read() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_used_for_a_moment_is_seen() -> None:
    peak = ProcessPeak()
    peak.start(already_held=0)
    np.ones(64 * MIB, dtype=np.uint8).sum()  # freed at once; large enough to be given back to the system
    peak.sample()
    total = peak.read()
    assert total is not None
    if peak._kernel_keeps_peak:
        assert 60 * MIB < total < 90 * MIB
