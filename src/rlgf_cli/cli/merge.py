"""The command ``rlgf merge``."""

from __future__ import annotations

from rlgf_cli import console
from rlgf_cli.cli.invocation import Invocation


def merge(invocation: Invocation) -> None:
    """Merge LoRA into plain weights.

    ```
    rlgf merge --model runs/sft-lora -o runs/sft-merged
    rlgf merge --model runs/ppopp --dtype bfloat16 -o runs/ppopp-bf16
    rlgf merge --model runs/sft-lora -o runs/sft-merged --overwrite
    ```
    """
    resolved, existing = invocation.resolve(), invocation.existing
    from rlgf_cli.stages import merge as stage

    console.result(str(stage.run(resolved, existing=existing)))
