"""How the hosts of a lab are joined: by a bridge of the kernel's, or by a switch of ours where that cannot delay.

A link has a rate each way, which `tc tbf` keeps at both of its ends: at the host's for what it sends, at the bridge's
for what it receives.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from benchmarks.netlab.counters import INTERFACE
from benchmarks.netlab.namespaces import has_netem, inside, ip, tc

_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_BURST_S, _LEAST_BURST, _MOST_BURST = 0.00524, 16 * 1024, 256 * 1024
"""What a line may send at once after a pause: so many seconds of its rate, in bytes at least and at most. That is 16 KB
at 10 Mbit/s, 64 KB at 100 Mbit/s and 256 KB at 1 Gbit/s; with less, the kernel's timers cannot keep the rate up."""
_QUEUE_MS = 200
"""A packet that would wait longer than this is dropped."""
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h


class Links(Protocol):
    """The cables between the hosts."""

    def plug(self, host: int, there: bool) -> None:
        """Pull a host's cable out at the far end, or put it back in."""
        ...

    def stop(self) -> None:
        """End what runs for them outside the kernel."""
        ...


def join(hosts: Sequence[str], middle: str, rate: str | None, delay_ms: float) -> Links:
    """Give each host an interface called eth0, up, without an address, and join them in the namespace `middle`."""
    bits = bits_per_second(rate)
    if delay_ms and not has_netem():
        return UserSpaceSwitch(hosts, bits, delay_ms / 1e3)
    return Bridge(hosts, middle, bits, delay_ms)


def bits_per_second(rate: str | None) -> float | None:
    """100mbit as tc writes it, or None or "unlimited" for a link that is as fast as the machine."""
    if rate is None or rate == "unlimited":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    if found is None or not float(found[1]):
        raise ValueError(f"rate must be like 100mbit, 1gbit or 56kbit, or unlimited; got {rate!r}")
    return float(found[1]) * _UNITS[found[2]]


class Bridge:
    """One veth pair per host, with tbf at both ends and netem for the delay, on one bridge."""

    def __init__(self, hosts: Sequence[str], middle: str, bits: float | None, delay_ms: float) -> None:
        self._middle = middle
        # Without snooping and addresses of its own, the bridge sends nothing itself.
        ip(
            f"link add bridge0 netns {middle} type bridge mcast_snooping 0",
            *(f"link add {INTERFACE} netns {host} type veth peer name port{number} netns {middle}"
              for number, host in enumerate(hosts)),
        )  # fmt: skip
        ports = [f"port{number}" for number in range(len(hosts))]
        ip(
            "link set bridge0 addrgenmode none",
            "link set bridge0 up",
            *(f"link set {port} master bridge0 addrgenmode none" for port in ports),
            *(f"link set {port} up" for port in ports),
            inside=middle,
        )
        for host, port in zip(hosts, ports, strict=True):
            place = "root"
            if delay_ms:  # once per way: at the sender
                tc(f"qdisc add dev {INTERFACE} root handle 1: netem delay {delay_ms}ms limit 100000", inside=host)
                place = "parent 1:1"
            if bits:
                tc(f"qdisc add dev {INTERFACE} {place} {_token_bucket(bits)}", inside=host)
                tc(f"qdisc add dev {port} root {_token_bucket(bits)}", inside=middle)

    def plug(self, host: int, there: bool) -> None:
        """Take the bridge's end of the cable down, or up."""
        ip(f"link set port{host} {'up' if there else 'down'}", inside=self._middle)

    def stop(self) -> None:
        """Nothing: the interfaces go with their namespaces."""


class UserSpaceSwitch:
    """One TAP device per host, and a process that carries frames between them: `benchmarks.netlab.switch`."""

    def __init__(self, hosts: Sequence[str], bits: float | None, delay_s: float) -> None:
        taps = [_open_tap(host) for host in hosts]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.netlab.switch", str(bits or 0), str(delay_s), *map(str, taps)],
                stdin=subprocess.PIPE,
                pass_fds=taps,
                cwd=Path(__file__).parent.parent.parent,
            )
        finally:
            for tap in taps:
                os.close(tap)

    def plug(self, host: int, there: bool) -> None:
        """Tell the switch, which loses the frames of a host whose cable is out."""
        assert self._process.stdin is not None
        self._process.stdin.write(bytes([2 * host + there]))
        self._process.stdin.flush()

    def stop(self) -> None:
        """End the process; the interfaces go with it."""
        self._process.kill()
        self._process.communicate()


def _token_bucket(bits: float) -> str:
    burst = min(max(round(bits / 8 * _BURST_S), _LEAST_BURST), _MOST_BURST)
    return f"tbf rate {bits:.0f}bit burst {burst}b latency {_QUEUE_MS}ms"


def _open_tap(host: str) -> int:
    with inside(host):
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", INTERFACE.encode(), _IFF_TAP | _IFF_NO_PI))
    return tap
