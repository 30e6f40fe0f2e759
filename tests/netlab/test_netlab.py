"""The lab against what the kernel and the clock say: joined hosts, kept rates and delays, true counters, no leftovers.

Bounds on time are one-sided where another program on the machine could break them: a link is never faster than its
rate. `python -m benchmarks.netlab.check` measures the other side, on a quiet machine.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.netlab import HEADER, Counter, Lab, Unavailable, WorkerError, check, here, namespaces, why_not, workers
from benchmarks.netlab.links import bits_per_second

REASON = why_not()
needs_lab = pytest.mark.skipif(REASON is not None, reason=str(REASON))
PORT = 6000
HOLDS_A_LAB = """
import time
from benchmarks.netlab import Lab
with Lab(2) as lab:
    lab.start(0, ["sleep", "1000"])
    print(lab.hosts[0], flush=True)
    time.sleep(100)
"""


def ours() -> set[str]:
    """Namespaces of this process's labs that are there."""
    listed = os.listdir(namespaces.FOLDER) if namespaces.FOLDER.is_dir() else []
    return {name for name in listed if name.startswith(f"netlab-{os.getpid()}-")}


def transfer(rank: int, server: str, size: int) -> dict[str, float]:
    """Rank 1 sends `size` bytes to rank 0 over one connection."""
    before = here()
    started = time.perf_counter()
    if rank == 0:
        with socket.create_server((server, PORT)) as listening:
            listening.settimeout(60)
            wire, _ = listening.accept()
            with wire:
                started, left = time.perf_counter(), size
                while left:
                    left -= len(wire.recv(min(left, 1 << 16)))
                seconds = time.perf_counter() - started
                wire.sendall(b"done")
    else:
        wire = connected((server, PORT))
        with wire:
            wire.sendall(bytes(size))
            assert wire.recv(4) == b"done"
        seconds = time.perf_counter() - started
    time.sleep(0.3)  # the last acknowledgements
    sent = here() - before
    return {"seconds": seconds, "payload": sent.payload(), "tx": sent.tx_bytes, "rx": sent.rx_bytes,
            "packets": sent.tx_packets}  # fmt: skip


def connected(address: tuple[str, int]) -> socket.socket:
    for _ in range(200):
        try:
            return socket.create_connection(address, timeout=60)
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise TimeoutError(address)


def echoes(rank: int, server: str, count: int, wait_s: float) -> list[float]:
    """Seconds until the answer to each datagram of rank 1 to rank 0; -1 where none came in time."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wire:
        wire.settimeout(wait_s if rank else 10)
        if rank == 0:
            wire.bind((server, PORT))
            while (received := wire.recvfrom(16))[0] != b"end":
                wire.sendto(*received)
            return []
        if rank > 1:
            return []
        time.sleep(0.5)
        for number in range(count):
            started = time.perf_counter()
            wire.sendto(bytes([number]), (server, PORT))
            try:
                wire.recv(16)
                found.append(time.perf_counter() - started)
            except TimeoutError:
                found.append(-1.0)
        wire.sendto(b"end", (server, PORT))
    return found


@pytest.mark.parametrize("written, bits", [("10mbit", 1e7), ("1.5gbit", 1.5e9), ("56kbit", 56e3), (None, None)])
def test_a_rate_is_written_as_tc_writes_it(written: str | None, bits: float | None):
    assert bits_per_second(written) == bits


@pytest.mark.parametrize("rate", ["fast", "0mbit", "100", "100mbps", "-1gbit"])
def test_a_rate_that_is_none_is_refused(rate: str):
    with pytest.raises(ValueError, match=f"100mbit.*{rate}"):
        Lab(rate=rate)


@pytest.mark.parametrize("hosts", [1, 9])
def test_too_few_or_too_many_hosts_are_refused(hosts: int):
    with pytest.raises(ValueError, match=f"2 to 8, got {hosts}"):
        Lab(hosts)


def test_a_negative_delay_is_refused():
    with pytest.raises(ValueError, match="delay_ms"):
        Lab(delay_ms=-1)


def test_counters_add_subtract_and_leave_headers_out():
    before, after = Counter(100, 200, 1, 2), Counter(1100, 260, 4, 3)
    assert after - before == Counter(1000, 60, 3, 1)
    assert (after - before) + before == after
    assert (after - before).payload() == 1000 - 3 * HEADER


def test_without_root_the_reason_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unavailable, match="root"), Lab():
        pass


def test_without_tc_the_reason_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "")
    assert "iproute2" in str(why_not())


@needs_lab
def test_a_megabyte_is_counted_as_a_megabyte_plus_a_header_for_each_packet():
    size = 1_000_000
    with Lab(2, "100mbit") as lab:
        receiver, sender = lab.workers(transfer, lab.address(0), size, group=False)
        ends = lab.all_bytes()
    assert sender["tx"] > size + HEADER * sender["packets"] - 100
    assert abs(sender["payload"] - size) < 200  # the packets of the handshake have other headers
    assert abs(receiver["payload"] - len("done")) < 200
    assert (ends[0].tx_bytes, ends[0].rx_bytes) == (ends[1].rx_bytes, ends[1].tx_bytes)
    assert 0 <= ends[1].tx_bytes - sender["tx"] < 1_000


@needs_lab
@pytest.mark.parametrize("rate, delay_ms", [("10mbit", 0.0), ("100mbit", 0.0), ("20mbit", 5.0)])
def test_a_link_is_no_faster_than_its_rate(rate: str, delay_ms: float):
    size = 1_000_000
    with Lab(2, rate, delay_ms) as lab:
        receiver, _ = lab.workers(transfer, lab.address(0), size, group=False)
    burst = 2 * 70_000  # each end of the cable may send so much at once
    assert receiver["seconds"] > 8 * (size - burst) / bits_per_second(rate)
    assert receiver["seconds"] < 20 * 8 * size / bits_per_second(rate)


@needs_lab
def test_links_without_a_rate_are_much_faster():
    with Lab(2) as lab:
        receiver, _ = lab.workers(transfer, lab.address(0), 1_000_000, group=False)
    assert receiver["seconds"] < 0.5  # at 10 Mbit/s it would be 0.8


@needs_lab
def test_a_delay_is_waited_for_once_each_way():
    plain = min(check.round_trips_ms(0.0))
    delayed = min(check.round_trips_ms(25.0))
    assert plain < 10
    assert 50 <= delayed < 50 + 10


@needs_lab
@pytest.mark.parametrize("delay_ms", [0.0, 2.0])
def test_a_cut_host_hears_nothing_until_it_is_mended(delay_ms: float):
    with Lab(3, delay_ms=delay_ms) as lab:
        assert min(lab.workers(echoes, lab.address(0), 3, 5.0, group=False)[1]) > 0
        lab.cut(0)
        assert lab.workers(lost, lab.address(0), group=False) == [True, True, True]
        lab.mend(0)
        time.sleep(0.2)
        assert min(lab.workers(echoes, lab.address(0), 3, 5.0, group=False)[1]) > 0


def lost(rank: int, server: str) -> bool:
    """Whether nothing comes: at rank 0 from the others, at the others an answer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wire:
        wire.settimeout(0.5)
        if rank == 0:
            wire.bind((server, PORT))
        else:
            wire.sendto(b"?", (server, PORT))
        try:
            wire.recvfrom(16)
        except (TimeoutError, ConnectionRefusedError):
            return True
    return False


@needs_lab
def test_workers_meet_by_gloo_and_give_back_what_they_found():
    with Lab(3) as lab:
        assert lab.workers(meet, 10) == [[0, 33], [1, 33], [2, 33]]


def meet(rank: int, number: int) -> list[int]:
    import torch

    total = torch.tensor([number + rank])
    dist.all_reduce(total)
    return [dist.get_rank(), int(total)]


@needs_lab
def test_a_worker_that_fails_ends_the_others_and_is_quoted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "GRACE_S", 0.5)
    started = time.monotonic()
    with Lab(2) as lab, pytest.raises(WorkerError, match=r"rank 1.*\n.*(?s:.*)no luck"):
        lab.workers(fail, group=False, timeout_s=120)
    assert time.monotonic() - started < 60


def fail(rank: int) -> None:
    if rank == 1:
        raise LookupError("no luck")
    time.sleep(300)


@needs_lab
def test_torchrun_starts_one_process_on_every_host(tmp_path: Path):
    script = tmp_path / "say.py"
    script.write_text(
        "import os, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "everyone = [None] * dist.get_world_size()\n"
        "dist.all_gather_object(everyone, os.readlink('/proc/self/ns/net'))\n"
        "print(dist.get_rank(), len(set(everyone)), os.environ['GLOO_SOCKET_IFNAME'])\n"
        "dist.destroy_process_group()\n"
    )
    with Lab(2) as lab:
        printed = lab.torchrun(str(script), timeout_s=120)
    assert "0 2 eth0" in printed[0]
    assert "1 2 eth0" in printed[1]


@needs_lab
def test_a_command_runs_on_its_host_and_its_failure_is_seen():
    with Lab(2) as lab:
        assert lab.address(1) in lab.run(1, ["ip", "addr", "show", "eth0"]).stdout
        assert lab.run(0, ["python", "-c", "import sys; print(sys.executable)"]).stdout.strip() == sys.executable
        with pytest.raises(subprocess.CalledProcessError):
            lab.run(0, ["python", "-c", "raise SystemExit(3)"])


@needs_lab
@pytest.mark.parametrize("delay_ms", [0.0, 1.0])
def test_nothing_is_left_behind_also_after_an_error(delay_ms: float):
    with pytest.raises(KeyboardInterrupt), Lab(2, delay_ms=delay_ms) as lab:
        process = lab.start(0, ["sleep", "1000"])
        assert len(ours()) == 3
        raise KeyboardInterrupt
    assert process.returncode is not None
    assert ours() == set()


@needs_lab
def test_two_labs_at_once_do_not_see_each_other():
    with Lab(2) as one, Lab(2) as other:
        assert one.address(0) == other.address(0)
        receiver, _ = one.workers(transfer, one.address(0), 100_000, group=False)
        assert receiver["rx"] > 100_000
        assert other.bytes(0).rx_bytes < 1_000


@needs_lab
def test_the_next_lab_takes_down_what_a_killed_one_left(repository: Path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_LAB], stdout=subprocess.PIPE, text=True, cwd=repository
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        process.send_signal(signal.SIGKILL)
    assert (namespaces.FOLDER / name).exists()
    pids: list[int] = []
    while not pids:  # it may still be on its way into the namespace
        pids = namespaces.pids(name)
    with Lab(2):
        assert not (namespaces.FOLDER / name).exists()
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False
