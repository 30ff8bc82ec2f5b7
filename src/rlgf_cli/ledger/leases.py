"""The owners of leases: names of processes, and whether a process has ended."""

from __future__ import annotations

import os
import socket

import psutil


def this_process() -> str:
    """A name for this process that no other one has, on this machine or another, before or after it."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(psutil.Process())}"


def _started(process: psutil.Process) -> str:
    """The start time of a process. Linux counts from the boot time, which changes when the clock is set."""
    return f"{process.create_time() - (psutil.boot_time() if psutil.LINUX else 0.0):.2f}"


def is_dead(owner: str) -> bool:
    """Whether the owner of a lease was a process of this machine that has ended. A batch never is."""
    host, _, rest = owner.partition(":")
    pid, _, started = rest.partition(":")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        process = psutil.Process(int(pid))
        return process.status() == psutil.STATUS_ZOMBIE or _started(process) != started
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
