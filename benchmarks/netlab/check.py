"""Does the lab keep what it promises on this machine? Run before any figure that was taken in it is believed.

    python -m benchmarks.netlab.check

Rates: an all-reduce of S bytes by W hosts must take 2 (W - 1) / W * 8 S / rate, and up to 12 % more for headers,
acknowledgements and the ends of the ring. Delay: a packet there and one back must take twice the delay, to 1 ms.
Count: what the kernel counted without headers must be what the ring sends, to 1 %.
"""

from __future__ import annotations

import socket
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from benchmarks.netlab.counters import here
from benchmarks.netlab.lab import Lab, Unavailable
from benchmarks.result import write_result

HIGHEST_RATIO, DELAY_MS, COUNT = 1.12, 1.0, 0.01
TURNS, ECHOES = 4, 20
MEGABYTES = {"10mbit": 2.0, "100mbit": 8.0, "1gbit": 8.0}
"""What is reduced at each rate: enough that a burst or a slow start does not show."""


@dataclass(frozen=True)
class AllReduce:
    """Seconds that an all-reduce took, those that the rate alone takes, and bytes over those of the ring."""

    seconds: float
    ideal: float
    bytes_ratio: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.ideal

    def good(self) -> bool:
        """Whether the lab keeps its rate and its counters are to be believed."""
        return 1.0 <= self.ratio <= HIGHEST_RATIO and abs(self.bytes_ratio - 1) <= COUNT


def all_reduce(hosts: int, rate: str, megabytes: float | None = None) -> AllReduce:
    """Measure all-reduces at a rate: the median of four, after one that warms the connections up."""
    numbers = int((megabytes or MEGABYTES[rate]) * 1e6 / 4)
    with Lab(hosts, rate) as lab:
        assert lab.bits is not None
        found = lab.workers(_all_reduce, numbers)
        sent = 2 * (hosts - 1) / hosts * 4 * numbers
        # Of one all-reduce: the time of the slowest host.
        seconds = statistics.median(max(turn) for turn in zip(*(each["seconds"] for each in found), strict=True))
        bytes_ratio = statistics.mean(each["payload"] for each in found) / sent
        return AllReduce(seconds, 8 * sent / lab.bits, bytes_ratio)


def round_trips_ms(delay_ms: float, rate: str | None = None) -> list[float]:
    """Milliseconds from one host to another and back, twenty times."""
    with Lab(2, rate, delay_ms) as lab:
        return [1e3 * seconds for seconds in lab.workers(_echo, lab.address(0), group=False)[1]]


def _all_reduce(rank: int, numbers: int) -> dict[str, object]:
    values, seconds, payload = torch.zeros(numbers), [], []
    for _ in range(TURNS + 1):
        dist.barrier()
        before, started = here(), time.perf_counter()
        dist.all_reduce(values)
        seconds.append(time.perf_counter() - started)
        time.sleep(0.1)  # acknowledgements
        payload.append((here() - before).payload())
    return {"seconds": seconds[1:], "payload": statistics.median(payload[1:])}


def _echo(rank: int, server: str) -> list[float]:
    address, found = (server, 5000), []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wire:
        wire.settimeout(5)
        if rank == 0:
            wire.bind(address)
            for _ in range(ECHOES):
                data, client = wire.recvfrom(64)
                wire.sendto(data, client)
            return []
        time.sleep(0.2)  # until the other is there
        for number in range(ECHOES):
            started = time.perf_counter()
            wire.sendto(bytes([number]), address)
            wire.recv(64)
            found.append(time.perf_counter() - started)
    return found


def main() -> None:
    rows, good = [], True
    try:
        for rate in MEGABYTES:
            for hosts in (2, 4):
                found = all_reduce(hosts, rate)
                good &= found.good()
                rows.append([
                    f"{MEGABYTES[rate]:g} MB all-reduce, {hosts} hosts at {rate}/s", f"{1e3 * found.ideal:.0f}",
                    f"{1e3 * found.seconds:.0f}", f"{found.ratio:.3f}", f"{found.bytes_ratio:.4f}",
                ])  # fmt: skip
        for delay_ms in (5.0, 10.0, 40.0):
            found_ms = statistics.median(round_trips_ms(delay_ms))
            good &= 0 <= found_ms - 2 * delay_ms < DELAY_MS
            rows.append([
                f"there and back, {delay_ms:g} ms each way", f"{2 * delay_ms:g}", f"{found_ms:.2f}",
                f"{found_ms / 2 / delay_ms:.3f}", "",
            ])  # fmt: skip
    except Unavailable as reason:
        print(f"skipped: {reason}", file=sys.stderr)
        return
    write_result(
        "netlab/check",
        title="What the network lab promises and what it does",
        columns=["what", "promised, ms", "measured, ms", "measured / promised", "bytes, kernel / ring"],
        rows=rows,
        notes=[
            f"Allowed: 1.00 to {HIGHEST_RATIO} of the time that the rate takes, {DELAY_MS:g} ms over the delay, "
            f"{COUNT:.0%} of the bytes without headers."
        ],
    )
    if not good:
        sys.exit("the lab does not keep what it promises here: is the machine doing something else?")


if __name__ == "__main__":
    main()
