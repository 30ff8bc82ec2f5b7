"""The command ``rlgf sft``."""

from __future__ import annotations

from rlgf_cli.cli.invocation import Invocation


def sft(invocation: Invocation) -> None:
    """Fine-tune a model on prompts and references, or on a guide's texts.

    ```
    rlgf sft --model gpt2 --data train.jsonl -o runs/sft
    rlgf sft --model t5-small --data train.jsonl --max-steps 2000 -o runs/t5
    rlgf sft --model small.yaml --data train.jsonl --epochs 20 -o runs/tiny
    rlgf sft --model runs/sft --data train.jsonl --guide guide.jsonl -o runs/clone
    ```
    """
    resolved, existing = invocation.resolve(), invocation.existing
    from rlgf_cli.stages import sft as stage

    done = stage.run(resolved, existing=existing)
    invocation.print({"path": str(done.folder), **done.summary}, done.folder)
