"""What the kernel counted on a host's interface: bytes and packets, each way."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "eth0"
HEADER = 66
"""Bytes of header in a packet of an established connection: Ethernet 14, IPv4 20, TCP 20 and its timestamps 12."""


@dataclass(frozen=True)
class Counter:
    """Bytes and packets that an interface has sent (tx) and received (rx). Counters add and subtract.

    A packet is what the interface was handed. Where the kernel leaves segmentation to it that is up to 64 KB at once,
    and one header is counted for all of them.
    """

    tx_bytes: int = 0
    rx_bytes: int = 0
    tx_packets: int = 0
    rx_packets: int = 0

    def payload(self) -> int:
        """Bytes sent without headers; 8 bytes too many for every connection that was set up meanwhile."""
        return self.tx_bytes - HEADER * self.tx_packets

    def __add__(self, other: Counter) -> Counter:
        return Counter(
            self.tx_bytes + other.tx_bytes,
            self.rx_bytes + other.rx_bytes,
            self.tx_packets + other.tx_packets,
            self.rx_packets + other.rx_packets,
        )

    def __sub__(self, before: Counter) -> Counter:
        return Counter(
            self.tx_bytes - before.tx_bytes,
            self.rx_bytes - before.rx_bytes,
            self.tx_packets - before.tx_packets,
            self.rx_packets - before.rx_packets,
        )


def here(interface: str = INTERFACE) -> Counter:
    """What an interface in the calling thread's own namespace has counted so far."""
    table = Path("/proc/thread-self/net/dev").read_text(encoding="ascii")
    found = re.search(rf"^ *{re.escape(interface)}:(.*)$", table, re.MULTILINE)
    if found is None:
        raise OSError(f"no interface {interface} in this network namespace")
    numbers = [int(number) for number in found[1].split()]
    return Counter(tx_bytes=numbers[8], rx_bytes=numbers[0], tx_packets=numbers[9], rx_packets=numbers[1])
