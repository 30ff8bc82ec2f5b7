"""Locks of outputs: one process at a time writes a run's folder, or a file. The system releases a lock when its process
ends, however it ends, so that a killed run needs no cleaning up.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import warnings
import weakref
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from rlgf_cli.errors import RlgfWarning, UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FOLDER_LOCK = ".run.lock"
_GRACE_S = 1.0
"""Seconds in which a process that is about to end may release the lock."""


class Lock:
    """A lock that this process holds, until :meth:`release` or its own end."""

    def __init__(self, path: Path, fd: int) -> None:
        self.release = weakref.finalize(self, _release, path, fd)


_held: weakref.WeakValueDictionary[Path, Lock] = weakref.WeakValueDictionary()
"""The locks of this process, by the file: to claim an output again is no conflict."""


def lock_path(output: Path) -> Path:
    """The lock's file: in a folder, or beside a file."""
    return output / FOLDER_LOCK if output.is_dir() else output.with_name(f".{output.name}.lock")


def hold(output: Path, command: str) -> Lock | None:
    """Lock an output, whose folder exists. None, with a warning, on a file system without locks.

    Raises UserError where another process holds it.
    """
    path = lock_path(output).resolve()
    if (held := _held.get(path)) is not None and held.release.alive:
        return held
    if fcntl is None:
        return None
    deadline = time.monotonic() + _GRACE_S
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                text = f"{output} cannot be locked ({error.strerror}): do not write to it with two commands at once"
                warnings.warn(text, RlgfWarning, stacklevel=2)
                return None
            if time.monotonic() > deadline:
                raise _refusal(output, path) from None
            time.sleep(0.05)
            continue
        if _is_file_of(path, fd):
            break
        os.close(fd)  # its holder has removed it meanwhile
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": command,
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    with contextlib.suppress(OSError):  # a full disk; the lock holds without it
        os.truncate(fd, 0)
        os.pwrite(fd, json.dumps(owner).encode(), 0)
    _held[path] = lock = Lock(path, fd)
    return lock


@contextlib.contextmanager
def released_on_error(lock: Lock | None) -> Iterator[None]:
    """Release a lock where the block, which claims the output, refuses it."""
    try:
        yield
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def refuse_held(output: Path) -> None:
    """Raise UserError where another process holds the lock of an output. Nothing is written."""
    path = lock_path(output).resolve()
    if fcntl is None or path in _held or not path.is_file():
        return
    with contextlib.suppress(OSError), path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refusal(output, path) from None


def _is_file_of(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _refusal(output: Path, path: Path) -> UserError:
    try:
        owner = json.loads(path.read_bytes())
        who = f"process {owner['pid']} on {owner['host']} (rlgf {owner['command']}, since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        who = "its process did not say which it is"
    return UserError(
        f"another command is writing to it: {who}",
        where=str(output),
        hint="wait until it has ended, or end it; another -o leaves it alone",
    )


def _release(path: Path, fd: int) -> None:
    # removed while it is held: nobody can lock a file that another one has just removed
    with contextlib.suppress(OSError):
        if _is_file_of(path, fd):
            path.unlink()
    with contextlib.suppress(OSError):
        os.close(fd)
