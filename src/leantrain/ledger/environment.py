"""The machine and software a figure was measured on, without anything that says whose machine it is."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

import leantrain


def describe(proc: Path = Path("/proc")) -> dict[str, object]:
    """Versions, processor, memory and GPUs as JSON-able values; unknown ones are None.

    Keys: leantrain, python, torch, cuda (the version PyTorch was built for), os, cpu, cores (this process may use),
    threads (of PyTorch), ram_bytes (of the machine), gpus (their names). No host, user or path names.
    """
    return {
        "leantrain": leantrain.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "os": _os(),
        "cpu": _field(proc / "cpuinfo", r"^model name\s*:\s*(.+)$") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_bytes": _ram_bytes(proc),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _os() -> str:
    # Only the numbers of the release: what follows them is free text and often names a host or a company.
    release = re.match(r"\d+(\.\d+)*", platform.release())
    return " ".join(filter(None, [platform.system(), release and release[0], platform.machine()]))


def _ram_bytes(proc: Path) -> int | None:
    total = _field(proc / "meminfo", r"^MemTotal:\s+(\d+) kB")
    return int(total) * 1024 if total else None


def _field(path: Path, pattern: str) -> str | None:
    try:
        found = re.search(pattern, path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None
