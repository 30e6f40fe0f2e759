"""The measured total: what the device, or this process, really had allocated at its highest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

import torch


class TotalPeak(Protocol):
    """The highest memory use between `start` and now, except between `pause` and `resume`."""

    def start(self, already_held: int) -> None: ...
    def sample(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def read(self) -> int | None: ...


class CudaPeak:
    """Peak of PyTorch's allocator on one device, exact. Resets torch.cuda's own peak statistics."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peak = 0

    def start(self, already_held: int) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def sample(self) -> None:
        self._peak = max(self._peak, torch.cuda.max_memory_allocated(self._device))

    def pause(self) -> None:
        self.sample()

    def resume(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> int | None:
        return self._peak


class ProcessPeak:
    """Peak growth of this process's resident memory since `start`, plus what the run held already at `start`.

    It is the memory of the whole process: Python objects, loaded data and libraries first touched during the run count
    too. It cannot see memory that was free inside the process at `start` and is used again, so it may be too low in a
    process that did other work before. On Linux the kernel keeps the peak, and it is reset at `start` by writing to
    /proc/self/clear_refs; where that is not allowed the peak of samples (sampled steps' phase ends) takes its place.
    Elsewhere the total is not known.
    """

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._proc = proc
        self._offset = 0  # already held minus resident at start: turns resident bytes into the total
        self._peak: int | None = None
        self._kernel_keeps_peak = False

    def start(self, already_held: int) -> None:
        resident = self._field("VmRSS")
        if resident is not None:
            self._offset = already_held - resident
            self._kernel_keeps_peak = self._reset()
            self.sample()

    def sample(self) -> None:
        resident = self._field("VmHWM" if self._kernel_keeps_peak else "VmRSS")
        if resident is not None:
            self._peak = max(self._peak or 0, resident + self._offset)

    def pause(self) -> None:
        self.sample()

    def resume(self) -> None:
        if self._kernel_keeps_peak:
            self._reset()

    def read(self) -> int | None:
        return self._peak

    def _reset(self) -> bool:
        try:
            (self._proc / "clear_refs").write_text("5")  # proc(5): reset the peak resident set size to the present one
        except OSError:
            return False
        return True

    def _field(self, name: str) -> int | None:
        """A memory field of /proc/self/status in bytes, or None where there is no such thing."""
        try:
            found = re.search(rf"^{name}:\s+(\d+) kB", (self._proc / "status").read_text(), re.MULTILINE)
        except OSError:
            return None
        return int(found[1]) * 1024 if found else None


def peak_for(device: torch.device) -> TotalPeak:
    """The total to report for work on `device`: the GPU's memory, or this process's on a CPU."""
    return CudaPeak(device) if device.type == "cuda" else ProcessPeak()
