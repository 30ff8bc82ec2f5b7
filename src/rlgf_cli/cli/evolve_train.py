"""``rlgf evolve train``."""

from __future__ import annotations

from typing import Annotated

import typer

from rlgf_cli import console
from rlgf_cli.cli import evolve_options as shared
from rlgf_cli.cli import options
from rlgf_cli.cli.evolve_options import EVOLVE

LEARNING = "Learning options"


def evolve_train(
    data: shared.Data = None,
    guide: shared.Guide = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", help="learned, random, round-robin or paper.", rich_help_panel=options.COMMON),
    ] = None,
    output: options.Output = None,
    limit: options.Limit = None,
    operations: shared.Operations = None,
    reviewer: shared.Reviewer = None,
    encoder: shared.Encoder = None,
    steps: shared.Steps = None,
    batch_size: shared.BatchSize = None,
    max_new_tokens: shared.MaxNewTokens = None,
    memory: Annotated[
        int | None, typer.Option("--memory", help="Kept rewrites that novelty looks at.", rich_help_panel=EVOLVE)
    ] = None,
    iterations: Annotated[
        int | None, typer.Option("--iterations", help="Walks and updates. Default: 50.", rich_help_panel=LEARNING)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="Adam's.", rich_help_panel=LEARNING)
    ] = None,
    entropy_coef: Annotated[
        float | None, typer.Option("--entropy-coef", help="Weight of the entropy.", rich_help_panel=LEARNING)
    ] = None,
    save_every: Annotated[
        int | None, typer.Option("--save-every", help="Iterations between checkpoints.", rich_help_panel=options.RUN)
    ] = None,
    config: options.Config = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    device: options.Device = None,
    base_url: options.BaseUrl = None,
    api: options.Api = None,
    max_cost_usd: options.MaxCost = None,
    max_calls: options.MaxCalls = None,
    guide_mode: options.GuideMode = None,
    dry_run: options.DryRun = False,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    print_config: options.PrintConfig = False,
    as_json: options.AsJson = False,
) -> None:
    """Learn which operation to evolve an instruction by next.

    A guide rewrites instructions by the chosen operation; what is new and sound is kept and rewarded. The policy is
    what `rlgf evolve generate` is steered by. What was bought is in the cache: --resume pays for nothing twice.

    ```
    rlgf evolve train --data seeds.jsonl --guide gpt-3.5 -o runs/policy --dry-run
    rlgf evolve train --data seeds.jsonl --guide gpt-3.5 -o runs/policy --max-cost-usd 5
    rlgf evolve train --data seeds.jsonl --guide hf:runs/large --policy paper -o p
    rlgf evolve train --data seeds.jsonl --guide openai:qwen \\
      --base-url http://127.0.0.1:8000/v1 --encoder encoders/minilm -o runs/policy
    ```
    """
    flags = {
        "data": data,
        "guide": guide,
        "policy": policy,
        "output": output,
        "limit": limit,
        "operations": operations,
        "reviewer": reviewer,
        "novelty.encoder": encoder,
        "steps": steps,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "memory": memory,
        "iterations": iterations,
        "ppo.learning_rate": learning_rate,
        "ppo.entropy_coef": entropy_coef,
        "save_every": save_every,
        "seed": seed,
        "device": device,
        "guide.base_url": base_url,
        "guide.api": api,
        "guide.mode": guide_mode,
        "budget.max_cost_usd": max_cost_usd,
        "budget.max_calls": max_calls,
    }
    existing = options.existing(resume, overwrite)
    resolved = options.resolve("evolve_train:EvolveTrainConfig", config, set_, flags)
    if print_config:
        options.print_config(resolved)
        return
    from rlgf_cli.stages import evolve_train as stage

    if dry_run:
        options.print_estimate(stage.dry_run(resolved), as_json)
        return
    result = stage.run(resolved, existing=existing)
    if as_json:
        console.result_json({"path": str(result.folder), **result.summary, "spend": result.spend})
    else:
        console.result(str(result.folder))
