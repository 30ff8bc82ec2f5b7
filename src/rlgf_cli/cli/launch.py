"""``--num-processes N``: run the command line in several processes of this machine, or through ``accelerate launch``.

The processes are not started by ``torchrun``, because it ends every failed run with a traceback and exit code 1. Here
the user sees the messages and the exit code of the processes.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlgf_cli import signals
from rlgf_cli.errors import UserError

EXIT_CODE = "RLGF_EXIT_CODE"
"""Environment variable: the file to which the main process writes its exit code for a launcher that returns another."""
BY_ACCELERATE = "ACCELERATE_MIXED_PRECISION"
"""Environment variable that ``accelerate launch`` sets in every process that it starts."""
_GRACE_S = 20.0
"""Seconds that the other processes have to end by themselves after one has failed."""


def wanted(count: int | None, accelerate_config: Path | None) -> bool:
    """Whether this process has to start the run's processes."""
    if "WORLD_SIZE" in os.environ or EXIT_CODE in os.environ or BY_ACCELERATE in os.environ:
        return False
    return accelerate_config is not None or (count or 1) > 1


def launch(count: int | None, accelerate_config: Path | None) -> int:
    """Run the command line of this process in others, and return their common exit code."""
    arguments = ["-m", "rlgf_cli", *sys.argv[1:]]
    if accelerate_config is None:
        return _wait(_start(arguments, count or 1))
    if not accelerate_config.is_file():
        raise UserError("no such file", where=str(accelerate_config), hint="`accelerate config` writes one")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate_config)]
    command += ["--num_processes", str(count)] if count else []
    folder = Path(tempfile.mkdtemp(prefix="rlgf-"))
    try:
        exit_code = folder / "exit_code"
        environment = {**os.environ, EXIT_CODE: str(exit_code)}
        code = _wait([subprocess.Popen([*command, *arguments], env=environment, start_new_session=True)])
        return int(exit_code.read_text()) if exit_code.is_file() else code
    finally:
        shutil.rmtree(folder)


def leave_exit_code(code: int) -> None:
    """Write the main process's exit code to the file that a launcher has named for it."""
    if EXIT_CODE in os.environ and os.environ.get("RANK", "0") == "0":
        Path(os.environ[EXIT_CODE]).write_text(str(code), encoding="utf-8")


def _start(arguments: list[str], count: int) -> list[subprocess.Popen[Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RLGF_LAUNCHER": str(os.getpid()),
    }
    if "OMP_NUM_THREADS" not in os.environ:
        common["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    return [
        # a session of its own: Ctrl-C reaches the launcher, which forwards it to each process once
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,
        )
        for rank in range(count)
    ]


def _wait(processes: list[subprocess.Popen[Any]]) -> int:
    """Wait for all processes, forward signals to them, and stop those that would wait for one that has failed."""
    with _forwarding_signals(processes):
        first = 0
        failed_at: float | None = None
        while any(process.poll() is None for process in processes):
            ended = [process.returncode for process in processes if process.returncode]
            if ended and failed_at is None:
                first, failed_at = ended[0], time.monotonic()
            if failed_at is not None and time.monotonic() > failed_at + _GRACE_S:
                _signal(processes, signal.SIGKILL)
            time.sleep(0.05)
        codes = [first, *(process.returncode for process in processes)]
        code = next((code for code in codes if code), 0)
        return code if code >= 0 else 128 - code


@contextmanager
def _forwarding_signals(processes: list[subprocess.Popen[Any]]) -> Iterator[None]:
    kinds = [signal.SIGINT, *signals.ENDING]
    before = {kind: signal.signal(kind, lambda number, _: _signal(processes, number)) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
        _signal(processes, signal.SIGKILL)


def _signal(processes: list[subprocess.Popen[Any]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)
