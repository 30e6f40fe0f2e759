"""The environment: complete, JSON-able, and nobody's name in it."""

from __future__ import annotations

import getpass
import json
import platform
import socket
from pathlib import Path

import pytest
import torch

import leantrain
from leantrain.ledger.environment import describe


def test_it_names_versions_processor_and_memory(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Zeta 9000 CPU\n\nmodel name\t: another\n")
    (tmp_path / "meminfo").write_text("MemTotal:       2048 kB\nMemFree: 1 kB\n")
    found = describe(tmp_path)
    assert found["cpu"] == "Zeta 9000 CPU"
    assert found["ram_bytes"] == 2048 * 1024
    assert found["torch"] == torch.__version__
    assert found["leantrain"] == leantrain.__version__
    assert found["python"] == platform.python_version()
    assert found["threads"] == torch.get_num_threads()
    assert set(found) == {
        "leantrain", "python", "torch", "cuda", "os", "cpu", "cores", "threads", "ram_bytes", "gpus",
    }  # fmt: skip


def test_without_proc_memory_is_unknown(tmp_path: Path) -> None:
    assert describe(tmp_path)["ram_bytes"] is None
    assert describe(tmp_path)["cpu"]


def test_it_gives_nobody_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "6.1.0-secret-host.internal")
    text = json.dumps(describe())
    assert "secret" not in text
    assert "6.1.0" in text
    for name in (socket.gethostname(), getpass.getuser(), str(Path.cwd()), str(Path.home())):
        assert f'"{name}"' not in text
        assert len(name) < 6 or name not in text
