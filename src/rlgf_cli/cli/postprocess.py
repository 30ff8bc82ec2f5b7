"""The command ``rlgf postprocess``."""

from __future__ import annotations

from rlgf_cli import console
from rlgf_cli.cli.invocation import Invocation


def postprocess(invocation: Invocation) -> None:
    """Repair texts by rules: cut loops, unfinished sentences and what follows an end mark.

    ```
    rlgf postprocess runs/sft/eval/predictions.jsonl -o repaired.jsonl
    rlgf postprocess texts.jsonl --rules repetition,unfinished -o repaired.jsonl
    rlgf postprocess texts.jsonl --max-words 40 -o repaired.jsonl
    ```
    """
    resolved, existing = invocation.resolve(), invocation.existing
    from rlgf_cli.stages import postprocess as stage

    done = stage.run(resolved, existing=existing)
    if not invocation.as_json:
        by_rule = ", ".join(f"{name} {n}" for name, n in done.summary["rules"].items())
        console.log(f"{done.summary['changed']} of {done.summary['records']} texts changed ({by_rule})")
    invocation.print({"path": str(done.path), **done.summary}, done.path)
