"""A network on one machine: real processes, real sockets, links with a rate and a delay, and the kernel's own count.

    with Lab(hosts=4, rate="100mbit") as lab: ...

Run `python -m benchmarks.netlab.check` first: it measures whether the lab keeps what it promises on this machine.
"""

import os

# Hosts have addresses and no names, at which torch would wonder in a line per connection. It reads this when imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from benchmarks.netlab.counters import HEADER, Counter, here
from benchmarks.netlab.lab import Lab, Unavailable
from benchmarks.netlab.namespaces import why_not
from benchmarks.netlab.workers import WorkerError

__all__ = ["HEADER", "Counter", "Lab", "Unavailable", "WorkerError", "here", "why_not"]
