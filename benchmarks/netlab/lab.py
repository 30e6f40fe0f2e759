"""The lab: hosts to run processes on, links to cut, counters to read.

with Lab(hosts=4, rate="100mbit", delay_ms=10) as lab:
    lab.torchrun("-m", "leantrain", "train", "recipe.yaml")
    print(lab.bytes(0).payload())
"""

from __future__ import annotations

import atexit
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import IO, Any

from benchmarks.netlab import namespaces
from benchmarks.netlab.counters import INTERFACE, Counter, here
from benchmarks.netlab.links import Links, bits_per_second, join
from benchmarks.netlab.workers import GRACE_S, WorkerError, in_workers

LEAST, MOST = 2, 8
_numbers = itertools.count(1)


class Unavailable(RuntimeError):
    """This machine can have no network lab; the message is the reason."""


class Lab:
    """Hosts as network namespaces of this machine, each with one interface, eth0, to the same switch.

    Nothing of it is visible outside: addresses 10.77.0.1 and up in namespaces of their own. On leaving the block
    everything that still runs on the hosts is killed and all of it is taken down; what a killed lab left behind is
    taken down by the next one.

    Args:
        hosts: 2 to 8.
        rate: of every link, each way, as tc writes it: "10mbit", "100mbit", "1gbit"; None or "unlimited".
        delay_ms: from any host to any other, one way, beside what the rate takes.

    Raises:
        Unavailable: no root, no iproute2, or a kernel without namespaces, veth or tbf.
        ValueError: an argument that is not allowed.
    """

    def __init__(self, hosts: int = 4, rate: str | None = None, delay_ms: float = 0.0) -> None:
        if not LEAST <= hosts <= MOST:
            raise ValueError(f"hosts must be {LEAST} to {MOST}, got {hosts}")
        if delay_ms < 0:
            raise ValueError(f"delay_ms must be at least 0, got {delay_ms}")
        self.size, self.bits, self.rate, self.delay_ms = hosts, bits_per_second(rate), rate, delay_ms
        self._prefix = f"netlab-{os.getpid()}-{next(_numbers)}"
        self.hosts = [f"{self._prefix}-host{host}" for host in range(hosts)]
        self._middle = f"{self._prefix}-switch"
        self._links: Links | None = None
        self._ports = itertools.count(29501)  # a new one each time: the last one may linger
        self._started: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Lab:
        reason = namespaces.why_not()
        if reason:
            raise Unavailable(reason)
        namespaces.sweep()
        atexit.register(self._close)
        try:
            namespaces.ip(*(f"netns add {name}" for name in (*self.hosts, self._middle)))
            self._links = join(self.hosts, self._middle, self.rate, self.delay_ms)
            for host, name in enumerate(self.hosts):
                namespaces.ip(
                    "link set lo up",
                    f"link set {INTERFACE} address {_hardware_address(host)} addrgenmode none txqueuelen 10000",
                    f"addr add {self.address(host)}/24 dev {INTERFACE}",
                    f"link set {INTERFACE} up",
                    # Known beforehand, so that nobody has to ask: counters hold what processes sent, and nothing else.
                    *(f"neigh add {self.address(peer)} lladdr {_hardware_address(peer)} dev {INTERFACE} nud permanent"
                      for peer in range(self.size) if peer != host),
                    inside=name,
                )  # fmt: skip
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def address(self, host: int) -> str:
        """The host's IPv4 address."""
        return f"10.77.0.{host + 1}"

    # Running things on the hosts.

    def start(
        self, host: int, argv: Sequence[str], env: Mapping[str, str] | None = None, **popen: Any
    ) -> subprocess.Popen[Any]:
        """Start a command on a host. Its process id is the command's own; whatever still runs at the end is killed.

        Args:
            host: number of the host, from 0.
            argv: the command. "python" and "torchrun" are those of this interpreter.
            env: added to this process's environment, GLOO_SOCKET_IFNAME=eth0 and OMP_NUM_THREADS=1.
            popen: further arguments of subprocess.Popen.
        """
        command = ["ip", "netns", "exec", self.hosts[host], *_own(argv)]
        process = subprocess.Popen(command, env={**os.environ, **self._environment(), **(env or {})}, **popen)
        self._started.append(process)
        return process

    def run(
        self, host: int, argv: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 300.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end.

        Raises:
            subprocess.CalledProcessError: it failed; stdout and stderr are in the error.
            subprocess.TimeoutExpired: it took too long, and was killed.
        """
        with self.start(host, argv, env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            finally:
                process.kill()
        done = subprocess.CompletedProcess(list(argv), process.returncode, out, err)
        done.check_returncode()
        return done

    def torchrun(self, *args: str, env: Mapping[str, str] | None = None, timeout_s: float = 600.0) -> list[str]:
        """Run one process on every host by the torchrun line of the README, to the end of all.

        Args:
            args: what torchrun shall start: a script, or -m and a module, and their arguments.
            env: as for `start`.
            timeout_s: for all of it.

        Returns:
            What each printed, stdout and stderr together, by host.

        Raises:
            WorkerError: one failed or did not end; the message has the end of what each printed.
        """
        with ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in self.hosts]
            processes = [
                self.start(host, self.torchrun_line(host, *args), env, stdout=file, stderr=subprocess.STDOUT)
                for host, file in enumerate(files)
            ]
            ended = _wait(processes, timeout_s)
            for process in processes:
                process.kill()
                process.wait()
            printed = [_text(file) for file in files]
        if not ended:
            ends = (f"host {host}, status {process.returncode}:\n{text[-2000:]}"
                    for host, (process, text) in enumerate(zip(processes, printed, strict=True)))  # fmt: skip
            raise WorkerError("\n".join(ends))
        return printed

    def torchrun_line(self, host: int, *args: str) -> list[str]:
        """The command that a user types on a host: one process there, meeting the others at host 0."""
        return [
            "torchrun", f"--nnodes={self.size}", f"--node-rank={host}", "--nproc-per-node=1",
            f"--master-addr={self.address(0)}", "--master-port=29500", *args,
        ]  # fmt: skip

    def workers(self, work: Callable[..., Any], *args: Any, group: bool = True, timeout_s: float = 600.0) -> list[Any]:
        """What `work(rank, *args)` returns in one forked process per host, as JSON has it. Fast: nothing is imported.

        Args:
            work: the function; it sees RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them.
            args: handed to it as they are.
            group: join the processes by gloo before. False leaves it to `work`.
            timeout_s: for all of it, and for each collective.

        Raises:
            WorkerError: one of them raised, died or was late; the message has the tracebacks.
        """
        port = str(next(self._ports))
        environments = [
            {**self._environment(), "RANK": str(host), "WORLD_SIZE": str(self.size), "LOCAL_RANK": "0",
             "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": self.address(0), "MASTER_PORT": port}
            for host in range(self.size)
        ]  # fmt: skip
        return in_workers(self.hosts, environments, work, args, group=group, timeout_s=timeout_s)

    # Looking at them, and breaking them.

    def bytes(self, host: int) -> Counter:
        """What the host's interface has counted since the lab began."""
        with namespaces.inside(self.hosts[host]):
            return here()

    def all_bytes(self) -> list[Counter]:
        """Every host's counter."""
        return [self.bytes(host) for host in range(self.size)]

    def dropped(self) -> int:
        """Packets that found a queue full, over all queues of the lab. TCP sends them again, and counters see that."""
        seen = [namespaces.queues(name) for name in (*self.hosts, self._middle)]
        return sum(int(number) for text in seen for number in re.findall(r"dropped (\d+)", text))

    def cut(self, host: int) -> None:
        """Pull the host's cable out. Nobody is told: packets are lost both ways, as when a machine is cut off."""
        assert self._links is not None
        self._links.plug(host, there=False)

    def mend(self, host: int) -> None:
        """Put the cable back in. TCP goes on by itself when it next tries, which may take as long as the cut did."""
        assert self._links is not None
        self._links.plug(host, there=True)

    def _environment(self) -> dict[str, str]:
        return {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}

    def _close(self) -> None:
        atexit.unregister(self._close)
        if self._prefix.split("-")[1] != str(os.getpid()):  # a forked process has no lab
            return
        if self._links is not None:
            self._links.stop()
            self._links = None
        for process in self._started:
            process.kill()  # also if it is still on its way into the namespace
        namespaces.remove((*self.hosts, self._middle))
        for process in self._started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        self._started.clear()


def _hardware_address(host: int) -> str:
    return f"02:00:00:00:00:{host + 1:02x}"


def _own(argv: Sequence[str]) -> list[str]:
    """The command with this interpreter's own python and torchrun."""
    own = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    return [*own.get(argv[0], [argv[0]]), *argv[1:]]


def _wait(processes: Sequence[subprocess.Popen[Any]], timeout_s: float) -> bool:
    """Whether all end well in time. After one failed the others have a moment to say what they saw of it."""
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.returncode for process in processes):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(0.02)
    return all(process.returncode == 0 for process in processes)


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
