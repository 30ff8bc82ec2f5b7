"""The command ``rlgf train``."""

from __future__ import annotations

import typer

from rlgf_cli.cli.invocation import Invocation


def train(invocation: Invocation) -> None:
    """Train a policy with reinforcement learning, alone or with a guide.

    Examples:

    ```
    rlgf train --alg ppo --model runs/sft --data train.jsonl --reward rouge -o runs/ppo
    rlgf train --alg ppo++ --model runs/sft --guide runs/guide.jsonl --data train.jsonl --reward rouge -o runs/ppopp
    rlgf train -c recipes/synthetic/train.yaml --alg aggrevated --guide hf:runs/guide --seed 1 -o runs/aggrevated
    ```
    """
    resolved, existing = invocation.resolve(), invocation.existing
    processes, accelerate_config = resolved.config.parallel.num_processes, invocation.options["accelerate_config"]
    from rlgf_cli.cli import launch

    if not invocation.options["dry_run"] and launch.wanted(processes, accelerate_config):
        raise typer.Exit(launch.launch(processes, accelerate_config))
    from rlgf_cli.stages import train as stage

    invocation.estimate(stage.dry_run, resolved)
    done = stage.run(resolved, existing=existing, profile=invocation.options["profile"])
    invocation.print({"output": str(done.folder), **done.summary}, done.folder)
