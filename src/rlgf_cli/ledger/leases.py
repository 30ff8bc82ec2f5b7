"""The owners of leases: names of processes, and whether a process has ended."""

from __future__ import annotations

import os
import socket
import time
from functools import cache
from pathlib import Path

import psutil


@cache
def boot() -> str | None:
    """The id of this machine's boot: processes with the same one share a monotonic clock. None where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


@cache
def _machine() -> str:
    """The host's name, its boot and the namespace of process ids: containers with one name have one each."""
    try:
        namespace = Path("/proc/self/ns/pid").readlink().name
    except OSError:
        namespace = ""
    digits = "".join(filter(str.isdigit, namespace))
    return f"{socket.gethostname()}/{boot() or ''}/{digits}"


def this_process() -> str:
    """A name for this process that no other one has, on this machine or another, before or after it."""
    return f"{_machine()}:{os.getpid()}:{_started(psutil.Process())}"


def monotonic() -> float | None:
    """Seconds of the clock that all processes of this boot share and that nobody sets; None where there is none."""
    return time.monotonic() if boot() is not None else None


def _started(process: psutil.Process) -> str:
    """The start time of a process. Linux counts from the boot time, which changes when the clock is set."""
    return f"{process.create_time() - (psutil.boot_time() if psutil.LINUX else 0.0):.2f}"


def is_dead(owner: str) -> bool:
    """Whether the owner of a lease is known to be a process that has ended: of this machine, of this boot, and in
    this process's namespace. A batch never is."""
    machine, _, rest = owner.partition(":")
    pid, _, started = rest.partition(":")
    if machine != _machine() or not pid.isdigit():
        return False
    try:
        process = psutil.Process(int(pid))
        return process.status() == psutil.STATUS_ZOMBIE or _started(process) != started
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
