"""The command ``rlgf collect-guide``."""

from __future__ import annotations

from rlgf_cli.cli.invocation import Invocation


def collect_guide(invocation: Invocation) -> None:
    """Buy a guide's text once and keep it: prompts in, one JSONL line per text out.

    Lines are written as texts arrive; --resume requests only the missing texts, and texts that any run has bought come
    from the cache. The key of an API is read from its variable (`rlgf ls providers`). With --reward and --keep-above,
    texts that score less go to a second file, *.dropped.jsonl.

    ```
    rlgf collect-guide --guide gpt-3.5 --data train.jsonl -k 2 -o guide.jsonl --dry-run
    rlgf collect-guide --guide gpt-3.5 --data train.jsonl -k 2 -o guide.jsonl --max-cost-usd 5
    rlgf collect-guide --guide gpt-3.5 --data train.jsonl -k 8 --reward rouge --keep-above 0.3 -o guide.jsonl
    rlgf collect-guide --guide hf:runs/large --data train.jsonl -o guide.jsonl
    rlgf collect-guide --guide openai:qwen --base-url http://127.0.0.1:8000/v1 \\
      --data train.jsonl -o guide.jsonl --resume
    ```
    """
    resolved, existing = invocation.resolve(), invocation.existing
    from rlgf_cli.stages import collect_guide as stage

    invocation.estimate(stage.dry_run, resolved)
    done = stage.run(resolved, existing=existing)
    invocation.print({"path": str(done.path), **done.summary, "spend": done.spend}, done.path)
