"""The command ``rlgf train-reward``."""

from __future__ import annotations

from rlgf_cli.cli.invocation import Invocation


def train_reward(invocation: Invocation) -> None:
    """Train a classifier or a reward model.

    ```
    rlgf train-reward --model gpt2 --data labelled.jsonl -o runs/clf
    rlgf train-reward --model small.yaml --data a.jsonl --label-key meta.label -o clf
    rlgf train-reward --objective pairwise --model gpt2 --data pairs.jsonl -o runs/rm
    ```
    """
    resolved, existing = invocation.resolve(), invocation.existing
    from rlgf_cli.stages import train_reward as stage

    done = stage.run(resolved, existing=existing)
    invocation.print({"path": str(done.folder), **done.summary}, done.folder)
