"""The command ``rlgf evolve train``."""

from __future__ import annotations

from rlgf_cli.cli.invocation import Invocation


def evolve_train(invocation: Invocation) -> None:
    """Learn which operation to evolve an instruction by next.

    A guide rewrites instructions by the chosen operation; a rewrite that is new and breaks no rule is kept and
    rewarded. `rlgf evolve generate` takes the policy. Bought texts are in the cache: --resume pays for none of them
    twice.

    ```
    rlgf evolve train --data seeds.jsonl --guide gpt-3.5 -o runs/policy --dry-run
    rlgf evolve train --data seeds.jsonl --guide gpt-3.5 -o runs/policy --max-cost-usd 5
    rlgf evolve train --data seeds.jsonl --guide hf:runs/large --policy paper -o p
    rlgf evolve train --data seeds.jsonl --guide openai:qwen \\
      --base-url http://127.0.0.1:8000/v1 --encoder encoders/minilm -o runs/policy
    ```
    """
    resolved, existing = invocation.resolve(), invocation.existing
    from rlgf_cli.stages import evolve_train as stage

    invocation.estimate(stage.dry_run, resolved)
    done = stage.run(resolved, existing=existing)
    invocation.print({"path": str(done.folder), **done.summary, "spend": done.spend}, done.folder)
