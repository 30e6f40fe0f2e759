"""Energy from a fake sysfs tree and a fake NVML."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from leantrain.ledger.energy import EnergyMeter, Nvml, Rapl, Unavailable, meter_for

RANGE = 1_000_000_000  # micro-joules at which the fake counters wrap around


def domain(powercap: Path, folder: str, name: str, micro_joules: int) -> None:
    path = powercap / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (path / "energy_uj").write_text(f"{micro_joules}\n")


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    domain(tmp_path, "intel-rapl:0", "package-0", 100_000_000)
    domain(tmp_path, "intel-rapl:0:0", "core", 7)
    domain(tmp_path, "intel-rapl:0:1", "dram", 5_000_000)
    domain(tmp_path, "intel-rapl:1", "package-1", RANGE - 1_000_000)
    domain(tmp_path, "intel-rapl:2", "psys", 7)
    return tmp_path


def test_packages_and_memory_count_but_not_their_parts_nor_the_platform(powercap: Path) -> None:
    source = Rapl(powercap)
    domain(powercap, "intel-rapl:0", "package-0", 103_500_000)  # 3.5 J
    domain(powercap, "intel-rapl:0:0", "core", 900_000_000)
    domain(powercap, "intel-rapl:0:1", "dram", 5_250_000)  # 0.25 J
    domain(powercap, "intel-rapl:2", "psys", 900_000_000)
    assert source.read() == pytest.approx(3.75)


def test_a_counter_that_wrapped_around_is_continued(powercap: Path) -> None:
    source = Rapl(powercap)
    domain(powercap, "intel-rapl:1", "package-1", 2_000_000)  # 1 J to the end of its range, 2 J beyond
    assert source.read() == pytest.approx(3.0)
    domain(powercap, "intel-rapl:1", "package-1", 2_500_000)
    assert source.read() == pytest.approx(3.5)


def test_no_counters_is_a_reason_and_not_zero_joules(tmp_path: Path) -> None:
    meter = EnergyMeter(lambda: Rapl(tmp_path / "powercap"))
    meter.start()
    meter.stop()
    assert meter.joules is None
    assert meter.source == "not available: this machine offers no RAPL counters"


def forbid_reading(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # Root reads everything, so a test run by root cannot rely on file modes.
    read_text = Path.read_text

    def refuse(self: Path, *args: object) -> str:
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self)

    monkeypatch.setattr(Path, "read_text", refuse)


def test_counters_that_only_root_may_read_say_so(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_reading(monkeypatch, "energy_uj")
    meter = EnergyMeter(lambda: Rapl(powercap))
    meter.start()
    assert meter.joules is None
    assert meter.source == "not available: RAPL counters (energy_uj) may not be read by this user"


def test_permission_lost_on_the_way_makes_the_whole_figure_unavailable(
    powercap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = EnergyMeter(lambda: Rapl(powercap))
    meter.start()
    assert (meter.joules, meter.source) == (0.0, "rapl")
    forbid_reading(monkeypatch, "energy_uj")
    meter.update()
    assert meter.joules is None
    assert meter.source.startswith("not available: RAPL")


def test_a_counter_that_holds_no_number_is_a_reason(powercap: Path) -> None:
    (powercap / "intel-rapl:0" / "energy_uj").write_text("\n")
    with pytest.raises(Unavailable, match="could not be read"):
        Rapl(powercap)


class FakeSource:
    name = "fake"

    def __init__(self) -> None:
        self.joules, self.readings = 1000.0, 0

    def read(self) -> float:
        self.readings += 1
        return self.joules


def test_only_the_time_between_start_and_stop_counts() -> None:
    source = FakeSource()
    meter = EnergyMeter(lambda: source)
    for used, unused in [(3.0, 50.0), (4.0, 60.0)]:
        meter.start()
        source.joules += used
        meter.stop()
        source.joules += unused
        meter.update()
    assert meter.joules == pytest.approx(7.0)


def test_polling_reads_the_hardware_only_every_ten_seconds() -> None:
    source, now = FakeSource(), [0.0]
    meter = EnergyMeter(lambda: source, now=lambda: now[0])
    meter.start()
    for second in range(1, 26):
        now[0] = float(second)
        meter.poll()
    assert source.readings == 1 + 2


def test_joules_add_up_over_a_resumed_run_unless_a_part_was_not_read(tmp_path: Path) -> None:
    source = FakeSource()
    meter = EnergyMeter(lambda: source)
    meter.load_state_dict({"joules": 5.0})
    meter.start()
    source.joules += 2
    meter.stop()
    assert meter.state_dict() == {"joules": 7.0}
    meter.load_state_dict({"joules": None})
    assert meter.joules is None
    assert meter.source == "not available: it could not be read in an earlier part of this run"


class FakeNvml:
    class NVMLError(Exception):
        pass

    def __init__(self, energy: int | None) -> None:
        self.energy = energy

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "GPU-abc"
        if self.energy is None:
            raise self.NVMLError("Not Supported")
        return self.energy


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    return torch.device("cuda", 0)


def test_nvml_counts_milli_joules_of_the_gpu_in_use(gpu: torch.device) -> None:
    nvml = FakeNvml(5_000)
    meter = EnergyMeter(lambda: Nvml(gpu, nvml))
    meter.start()
    nvml.energy = 7_500
    meter.stop()
    assert (meter.joules, meter.source) == (2.5, "nvml")


def test_a_gpu_that_does_not_count_energy_says_so(gpu: torch.device) -> None:
    with pytest.raises(Unavailable, match="Not Supported"):
        Nvml(gpu, FakeNvml(None))


def test_each_device_has_its_own_kind_of_counter() -> None:
    for device in ("cpu", "cuda"):
        meter = meter_for(torch.device(device))
        assert meter.source == "not available: not started"
