"""Runs several command lines in the processes that torchrun started, one after the other.

``torchrun many.py PLAN.json``: the plan is ``{"runs": [{"argv": [...], "outage": step or null}], "watch": folder}``.
Each process leaves ``rank_K.json``: the exit code of every run, and the paths below the folder that it opened for
writing, made, moved or removed, and for every network that was sharded the numbers in it and in this process's shard.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
PLAN = Path(sys.argv[1])
RANK = int(os.environ["RANK"])
wrote: list[str] = []


def watch(folder: str) -> None:
    changes = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "shutil.rmtree": 1}

    def hook(event: str, args: tuple[Any, ...]) -> None:
        paths: tuple[Any, ...] = args[: changes.get(event, 0)]
        if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            paths = args[:1]
        wrote.extend(str(p) for p in paths if isinstance(p, str | os.PathLike) and str(p).startswith(folder))

    sys.addaudithook(hook)


def main() -> None:
    from rlgf_cli.cli.app import main as rlgf
    from rlgf_cli.errors import StoppedEarly
    from rlgf_cli.training import loop
    from rlgf_cli.training.parallel.fsdp import ShardedProcesses
    from rlgf_cli.training.parallel.processes import Processes

    prepare = ShardedProcesses.prepare
    shards: list[list[int]] = []

    def prepared(self: ShardedProcesses, model: Any) -> None:
        before = [sum(p.numel() for p in part.parameters()) for part in (model.policy, model.ref_model, model.critics)]
        prepare(self, model)
        parts = (model.policy, model.ref_model, model.critics)
        shards.extend(
            [[b, sum(p.to_local().numel() for p in m.parameters())] for b, m in zip(before, parts, strict=True)]
        )

    ShardedProcesses.prepare = prepared  # type: ignore[method-assign]
    plan = json.loads(PLAN.read_text())
    watch(plan["watch"])
    Processes.leave = lambda self: None  # type: ignore[method-assign]  # the next run has the same processes
    original = loop.RolloutGenerator.generate
    codes = []
    for run in plan["runs"]:

        def generate(
            self: Any, regime: Any, prompts: Any, step: int, *more: Any, outage: Any = run["outage"], **kw: Any
        ):
            if RANK == 1 and step == outage:
                raise StoppedEarly("the guide is out", hint="--resume goes on")
            return original(self, regime, prompts, step, *more, **kw)

        loop.RolloutGenerator.generate = generate  # type: ignore[method-assign]
        try:
            rlgf(run["argv"])
        except SystemExit as ended:
            codes.append(ended.code)
    PLAN.with_name(f"rank_{RANK}.json").write_text(json.dumps({"codes": codes, "wrote": wrote, "shards": shards}))


main()
