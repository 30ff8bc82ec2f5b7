"""Starts ``rlgf`` many times over: imports everything once, and forks a process for every command line it is given.

A process that is killed must be a real one, and importing torch takes most of a short run's time. Reads a JSON line
``{"argv": [...], "stderr": file, "watch": name, "events": file or null, "kill_at": n or null}``, answers with the
process's id and, when it has ended, with its status as ``os.waitstatus_to_exitcode`` gives it (-9: killed).

``watch`` is ``checkpoint`` or ``best``: what saves. ``events`` gets the names of what its second save does to the disk,
in order; with ``kill_at`` the process kills itself just before the n-th of them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
SAVE = 2
"""Which of the run's saves is watched: before it there is something to go back to, and something to rotate away."""


def preload() -> None:
    import peft  # noqa: F401
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401

    import rlgf_cli.scorers.coverage
    import rlgf_cli.scorers.rouge
    import rlgf_cli.stages.train  # noqa: F401
    from rlgf_cli.cli.app import main  # noqa: F401


def watch_a_save(what_saves: str, events: Path | None, kill_at: int | None) -> None:
    """Watch a save: calls that Python's auditing reports, writes of tensors, and the middle of them."""
    import safetensors.torch

    from rlgf_cli.artifacts import disk
    from rlgf_cli.runs import best, run_writer
    from rlgf_cli.training import checkpoint

    seen: list[str] = []
    saves, watching = 0, False
    writes: Counter[Path] = Counter()

    def happens(what: str) -> None:
        if watching:
            if len(seen) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(re.sub(r"\.\d+\.tmp", ".tmp", what))  # a temporary name holds the process's id

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGES:
            happens(f"{event} {' '.join(Path(a).name for a in args[:2] if isinstance(a, str | os.PathLike))}")
        elif event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and isinstance(args[0], str):
            happens(f"open {Path(args[0]).name}")

    def in_halves(self: Any, data: bytes, whole: Callable[..., int] = disk.RememberingWriter.write) -> int:
        view = memoryview(data)
        whole(self, bytes(view[: len(view) // 2]))
        writes[self.path] += 1
        if writes[self.path].bit_count() == 1:  # there are hundreds of them
            happens(f"half of write {writes[self.path]} to {self.path.name}")
        whole(self, bytes(view[len(view) // 2 :]))
        return len(view)

    def torn(tensors: Any, path: Any, *more: Any, write: Any = safetensors.torch.save_file, **kw: Any) -> None:
        write(tensors, path, *more, **kw)  # written by Rust, in a file of another name
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) // 2])
        happens(f"half of {Path(path).name}")
        Path(path).write_bytes(content)

    def watched(save: Callable[..., None]) -> Callable[..., None]:
        def second_save(*given: Any, **named: Any) -> None:
            nonlocal saves, watching
            saves += 1
            watching = saves == SAVE
            save(*given, **named)
            if watching:
                watching = False
                if events is not None:
                    events.write_text("\n".join(seen))

        return second_save

    sys.addaudithook(audit)
    disk.RememberingWriter.write = in_halves  # type: ignore[method-assign]
    checkpoint.save_file = torn  # type: ignore[attr-defined]
    where: Any = {"checkpoint": (run_writer.RunWriter, "checkpoint"), "best": (best, "save")}[what_saves]
    setattr(*where, watched(getattr(*where)))


def child(job: dict[str, Any]) -> None:
    from rlgf_cli.cli.app import main

    err = os.open(job["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(err, 2)
    os.dup2(err, 1)
    code: Any = 1
    try:
        if job.get("events") or job.get("kill_at") is not None:
            watch_a_save(job["watch"], Path(job["events"]) if job.get("events") else None, job.get("kill_at"))
        main(job["argv"])
        code = 0
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def serve() -> None:
    preload()
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(job)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
