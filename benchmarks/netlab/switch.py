"""A switch in user space, which delays packets where the kernel cannot: one process, one TAP device per host.

A frame leaves the sender when its line is free and has carried it, reaches the receiver when that one's line has too,
and is handed over `delay` later. Nothing is dropped for want of room: senders stop when their windows are full.

    line free again     up[s]   = max(now, up[s]) + bytes / rate          s: sender
    handed over         down[r] = max(up[s], down[r] + bytes / rate)      r: receiver, a frame passes through both lines
                        at down[r] + delay                                at once and does not wait twice
"""

from __future__ import annotations

import heapq
import os
import select
import sys
import time
from collections.abc import Sequence

_FRAME = 65536 + 14
_BATCH = 64
"""Frames read from one host before the others and the clock are looked at again."""


def forward(taps: Sequence[int], seconds_per_byte: float, delay: float, control: int) -> None:
    """Carry frames until the control pipe is closed."""
    up, down = [0.0] * len(taps), [0.0] * len(taps)
    plugged = [True] * len(taps)
    due: list[tuple[float, int, int, bytes]] = []
    number = 0  # frames that are due at once leave in the order they came
    sender_of = {tap: sender for sender, tap in enumerate(taps)}
    while True:
        wait = max(0.0, due[0][0] - time.monotonic()) if due else None
        readable, _, _ = select.select([control, *taps], [], [], wait)
        for descriptor in readable:
            if descriptor == control:
                orders = os.read(control, 64)
                if not orders:
                    return
                for order in orders:
                    plugged[order // 2] = bool(order % 2)
                continue
            sender = sender_of[descriptor]
            now = time.monotonic()
            for _ in range(_BATCH):
                try:
                    frame = os.read(descriptor, _FRAME)
                except OSError:  # nothing more, or the interface is down
                    break
                receiver = frame[5] - 1  # the last byte of the address of a host is its number
                if not 0 <= receiver < len(taps) or frame[0] != 2 or not plugged[sender]:
                    continue
                line = len(frame) * seconds_per_byte
                up[sender] = max(now, up[sender]) + line
                down[receiver] = max(up[sender], down[receiver] + line)
                number += 1
                heapq.heappush(due, (down[receiver] + delay, number, receiver, frame))
        now = time.monotonic()
        while due and due[0][0] <= now:
            _, _, receiver, frame = heapq.heappop(due)
            if plugged[receiver]:
                try:
                    os.write(taps[receiver], frame)
                except OSError:  # its interface is down: the frame is lost, as on a cable
                    continue


def main() -> None:
    bits_per_second, delay = float(sys.argv[1]), float(sys.argv[2])
    os.setpriority(os.PRIO_PROCESS, 0, -20)  # a delay is exact only if the switch runs when a frame is due
    forward([int(tap) for tap in sys.argv[3:]], 8 / bits_per_second if bits_per_second else 0.0, delay, control=0)


if __name__ == "__main__":
    main()
