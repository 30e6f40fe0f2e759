"""Energy, read from the hardware's own counters or not reported at all; it is never estimated.

RAPL (Intel and AMD processors): the energy of the whole processor package and its memory, everything that runs on the
machine included. NVML (NVIDIA): the energy of one whole GPU. Processes on one machine read the same counters, so their
figures must not be added up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

POWERCAP = Path("/sys/class/powercap")
_POLL_SECONDS = 10.0  # a RAPL counter wraps after some 260 kJ: 20 minutes at 200 W


class Unavailable(Exception):
    """Energy cannot be read; the message is the reason."""


class Source(Protocol):
    """A counter of joules that only grows."""

    name: str

    def read(self) -> float:
        """Joules counted so far, from an arbitrary zero. Raises Unavailable."""
        ...


class Rapl:
    """Joules of the processor packages and of the memory attached to them.

    Counts the domains named package-* and dram. The core and uncore domains are parts of a package, and psys contains
    the packages; they would be counted twice. Raises Unavailable if there is no package counter, or not for us.
    """

    name = "rapl"

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._ranges: dict[Path, int] = {}
        self._joules = 0.0
        try:
            for folder in sorted(powercap.glob("intel-rapl:*")):
                domain = (folder / "name").read_text().strip()
                if domain.startswith("package") or domain == "dram":
                    self._ranges[folder] = int((folder / "max_energy_range_uj").read_text())
            self._last = {folder: self._micro_joules(folder) for folder in self._ranges}
        except (OSError, ValueError) as error:
            raise _unreadable(error) from error
        if not self._ranges:
            raise Unavailable("this machine offers no RAPL counters")

    def read(self) -> float:
        for folder, limit in self._ranges.items():
            try:
                now = self._micro_joules(folder)
            except (OSError, ValueError) as error:
                raise _unreadable(error) from error
            passed = now - self._last[folder]
            self._joules += (passed if passed >= 0 else passed + limit) / 1e6
            self._last[folder] = now
        return self._joules

    @staticmethod
    def _micro_joules(folder: Path) -> int:
        return int((folder / "energy_uj").read_text())


def _unreadable(error: Exception) -> Unavailable:
    if isinstance(error, PermissionError):
        return Unavailable("RAPL counters (energy_uj) may not be read by this user")
    return Unavailable(f"RAPL counters could not be read ({type(error).__name__})")


class Nvml:
    """Joules of the GPU `device` since its driver was loaded. `nvml` is the module pynvml.

    Raises Unavailable if pynvml is missing or the GPU does not count energy (older than Volta).
    """

    name = "nvml"

    def __init__(self, device: torch.device, nvml: Any = None) -> None:
        try:
            self._nvml = nvml or import_module("pynvml")
        except ImportError as error:
            raise Unavailable("pynvml is not installed (pip install leantrain[energy])") from error
        try:
            self._nvml.nvmlInit()
            # By UUID: NVML numbers all GPUs, PyTorch only those in CUDA_VISIBLE_DEVICES.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        except self._nvml.NVMLError as error:
            raise Unavailable(f"NVML: {error}") from error
        self.read()

    def read(self) -> float:
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError as error:
            raise Unavailable(f"NVML: {error}") from error


class EnergyMeter:
    """Adds up what a source counts between `start` and `stop`; once a reading fails, reports the reason instead.

    Args:
        open_source: makes the source, called at the first `start`; may raise Unavailable.
    """

    def __init__(self, open_source: Callable[[], Source], now: Callable[[], float] = time.monotonic) -> None:
        self._open, self._now = open_source, now
        self._source: Source | None = None
        self._joules = 0.0
        self._reason: str | None = None
        self._last: float | None = None  # reading up to which energy is counted; None while stopped
        self._next_poll = 0.0

    @property
    def joules(self) -> float | None:
        return None if self._reason is not None or self._source is None else self._joules

    @property
    def source(self) -> str:
        """Either "rapl", "nvml" or "not available: REASON"."""
        if self._reason is not None:
            return f"not available: {self._reason}"
        return self._source.name if self._source is not None else "not available: not started"

    def start(self) -> None:
        if self._reason is None:
            try:
                self._source = self._source or self._open()
                self._last = self._source.read()
                self._next_poll = self._now() + _POLL_SECONDS
            except Unavailable as error:
                self._reason = str(error)

    def poll(self) -> None:
        """Read the counter if that was not done lately, so that it cannot wrap around twice unseen."""
        if self._last is not None and self._now() >= self._next_poll:
            self.update()

    def update(self) -> None:
        """Count what was used up to now."""
        if self._source is None or self._last is None:
            return
        try:
            reading = self._source.read()
        except Unavailable as error:
            self._reason, self._last = str(error), None
            return
        self._joules += reading - self._last
        self._last, self._next_poll = reading, self._now() + _POLL_SECONDS

    def stop(self) -> None:
        self.update()
        self._last = None

    def state_dict(self) -> dict[str, Any]:
        return {"joules": self.joules}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["joules"] is None:
            self._reason = self._reason or "it could not be read in an earlier part of this run"
        else:
            self._joules = state["joules"]


def meter_for(device: torch.device) -> EnergyMeter:
    """The meter for work on `device`: its GPU's counter, or the processors' on a CPU."""
    return EnergyMeter((lambda: Nvml(device)) if device.type == "cuda" else Rapl)
