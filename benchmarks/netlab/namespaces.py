"""Hosts as the kernel knows them: network namespaces with names that say whose they are.

A namespace is called netlab-PID-N-PLACE, PID being the process whose lab it belongs to. One whose process is gone was
left behind by a lab that was killed, and `sweep` takes it down with everything that still runs in it.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FOLDER = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_NAME = re.compile(r"netlab-(\d+)-\d+-\w+")


def why_not() -> str | None:
    """Why this machine can have no network lab, or None if it can."""
    if os.name != "posix" or not hasattr(os, "geteuid"):
        return "the network lab needs Linux"
    if os.geteuid() != 0:
        return "the network lab needs root: it makes network namespaces"
    missing = [command for command in ("ip", "tc") if shutil.which(command) is None]
    if missing:
        return f"the network lab needs {' and '.join(missing)} (package iproute2)"
    name = f"netlab-{os.getpid()}-0-probe"
    try:
        ip(f"netns add {name}")
        ip("link add probe0 type veth peer name probe1", "link set lo up", inside=name)
        tc("qdisc add dev probe0 root tbf rate 1mbit burst 8kb latency 200ms", inside=name)
    except OSError as error:
        return f"the network lab needs namespaces, veth and tbf: {error}"
    finally:
        remove([name])
    return None


def ip(*commands: str, inside: str | None = None) -> str:
    """Run `ip` commands as one batch, in a namespace if one is named.

    Raises:
        OSError: one of them failed; those before it stay done.
    """
    return _batch("ip", commands, inside)


def tc(*commands: str, inside: str | None = None) -> str:
    """Run `tc` commands as one batch, in a namespace if one is named.

    Raises:
        OSError: one of them failed; those before it stay done.
    """
    return _batch("tc", commands, inside)


def queues(name: str) -> str:
    """What `tc` says of the queues in a namespace, with their counts."""
    return subprocess.run(["tc", "-n", name, "-s", "qdisc", "show"], check=True, capture_output=True, text=True).stdout


def has_netem() -> bool:
    """Whether this kernel can delay packets itself. Minimal kernels of virtual machines often cannot."""
    name = f"netlab-{os.getpid()}-0-netem"
    try:
        ip(f"netns add {name}")
        tc("qdisc add dev lo root netem delay 1ms", inside=name)
    except OSError:
        return False
    finally:
        remove([name])
    return True


def enter(name: str) -> None:
    """Move this thread into a namespace; the sockets it opens from now on are there."""
    _enter(FOLDER / name)


@contextmanager
def inside(name: str) -> Iterator[None]:
    """This thread is in the namespace for the length of the block."""
    before = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)
    try:
        _enter(FOLDER / name)
        yield
    finally:
        _set(before)
        os.close(before)


def remove(names: Iterable[str]) -> None:
    """Kill what runs in the namespaces, and delete them with their interfaces. Ones that are not there are no error."""
    for name in names:
        for pid in pids(name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def pids(name: str) -> list[int]:
    """The processes in a namespace; none if it is not there."""
    return [int(pid) for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True).stdout.split()]


def sweep() -> list[str]:
    """Remove what labs left behind whose process is gone; returns the names."""
    found = [(name, _NAME.fullmatch(name)) for name in (os.listdir(FOLDER) if FOLDER.is_dir() else ())]
    left = [name for name, match in found if match and not Path(f"/proc/{match[1]}").exists()]
    remove(left)
    return left


def _batch(program: str, commands: Iterable[str], inside: str | None) -> str:
    where = ["-n", inside] if inside else []
    lines = "".join(f"{command}\n" for command in commands)
    done = subprocess.run([program, *where, "-batch", "-"], input=lines, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{program} {' '.join(where)}: {' '.join(done.stderr.split())} in {lines!r}")
    return done.stdout


def _enter(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _set(descriptor)
    finally:
        os.close(descriptor)


def _set(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
