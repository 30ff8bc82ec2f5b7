"""Runs of ``rlgf`` for a sweep's tests: one process imports everything once and forks for each run; importing torch
takes most of a short run's time.

``python fork_server.py serve SOCKET`` serves. ``python fork_server.py run SOCKET WORDS...`` stands in the place of
``python -m rlgf_cli WORDS...``: the same working folder, environment, output, signals and exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from typing import Any


def preload() -> None:
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    import rlgf_cli.scorers.coverage
    import rlgf_cli.stages.compare
    import rlgf_cli.stages.eval
    import rlgf_cli.stages.train  # noqa: F401
    from rlgf_cli.cli.app import main  # noqa: F401


def child(job: dict[str, Any], out: int, err: int) -> None:
    from rlgf_cli.cli.app import main

    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code: Any = 1
    try:
        main(job["words"])
    except SystemExit as ended:
        code = ended.code
    except KeyboardInterrupt:
        code = 130
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def answer(connection: socket.socket) -> None:
    message, handles, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    pid = os.fork()
    if pid == 0:
        child(json.loads(message), *handles)
    for handle in handles:
        os.close(handle)
    connection.sendall(f"{pid}\n".encode())

    def wait() -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):  # whoever asked may have been killed
            connection.sendall(f"{code}\n".encode())
        connection.close()

    threading.Thread(target=wait, daemon=True).start()


def serve(path: str) -> None:
    preload()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while True:
            answer(server.accept()[0])


def run(path: str, words: list[str]) -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        job = {"words": words, "cwd": os.getcwd(), "env": dict(os.environ)}  # noqa: PTH109
        socket.send_fds(connection, [json.dumps(job).encode()], [1, 2])
        told = connection.makefile()
        pid = int(told.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        code = int(told.readline())
    if code < 0:
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(run(sys.argv[2], sys.argv[3:]))
