"""The command ``rlgf generate``."""

from __future__ import annotations

from rlgf_cli import console
from rlgf_cli.cli.invocation import Invocation


def generate(invocation: Invocation) -> None:
    """Generate text from a checkpoint.

    ```
    rlgf generate --model runs/sft --prompt "dog park run"
    rlgf generate --model runs/sft --data val.jsonl --temperature 0 -o out.jsonl
    rlgf generate --model runs/sft --data val.jsonl -n 4 --top-p 0.9 | head
    ```
    """
    resolved, existing = invocation.resolve(), invocation.existing
    from rlgf_cli.artifacts.jsonl import dump_line
    from rlgf_cli.stages import generate as stage

    result = stage.run(resolved, existing=existing)
    if result.path is not None:
        console.result(str(result.path))
        return
    for record in result.records:
        as_text = resolved.config.prompt is not None and not invocation.as_json
        console.result(record.prediction if as_text else dump_line(record).rstrip("\n"))
