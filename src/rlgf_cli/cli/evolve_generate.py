"""``rlgf evolve generate``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rlgf_cli import console
from rlgf_cli.cli import evolve_options as shared
from rlgf_cli.cli import options
from rlgf_cli.cli.evolve_options import EVOLVE


def evolve_generate(
    guide: shared.Guide = None,
    data: shared.Data = None,
    output: options.Output = None,
    limit: options.Limit = None,
    config: options.Config = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            help="random, round-robin, paper, or the folder of rlgf evolve train.",
            rich_help_panel=EVOLVE,
        ),
    ] = None,
    operations: shared.Operations = None,
    steps: shared.Steps = None,
    passes: Annotated[
        int | None, typer.Option("--passes", help="Chains of each seed. Default: 1.", rich_help_panel=EVOLVE)
    ] = None,
    batch_size: shared.BatchSize = None,
    answers: Annotated[
        bool | None,
        typer.Option("--answers/--no-answers", help="Ask the guide for answers, or not.", rich_help_panel=EVOLVE),
    ] = None,
    encoder: shared.Encoder = None,
    reviewer: shared.Reviewer = None,
    max_new_tokens: shared.MaxNewTokens = None,
    max_answer_tokens: Annotated[
        int | None, typer.Option("--max-answer-tokens", help="Longest answer, in tokens.", rich_help_panel=EVOLVE)
    ] = None,
    base_url: options.BaseUrl = None,
    api: options.Api = None,
    device: options.Device = None,
    max_cost_usd: options.MaxCost = None,
    max_calls: options.MaxCalls = None,
    guide_mode: options.GuideMode = None,
    dry_run: options.DryRun = False,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    print_config: options.PrintConfig = False,
    as_json: options.AsJson = False,
) -> None:
    """Evolve seed instructions into a new set, with the guide's answers.

    A policy chooses how the guide rewrites each seed, step by step. What breaks a rule, or is no news, is left out and
    counted. The set is prompts and references, as rlgf sft takes them.

    ```
    rlgf evolve generate --guide gpt-3.5 --data seeds.jsonl -o runs/evolved --dry-run
    rlgf evolve generate --guide gpt-3.5 --policy runs/policy --data seeds.jsonl \\
      -o runs/evolved --max-cost-usd 5
    rlgf sft --model gpt2 --data runs/evolved/instructions.jsonl -o runs/sft
    ```
    """
    flags = {
        "guide": guide,
        "data": data,
        "output": output,
        "limit": limit,
        "seed": seed,
        "policy": policy,
        "operations": operations,
        "steps": steps,
        "passes": passes,
        "batch_size": batch_size,
        "answers": answers,
        "novelty.encoder": encoder,
        "reviewer": reviewer,
        "max_new_tokens": max_new_tokens,
        "max_answer_tokens": max_answer_tokens,
        "guide.base_url": base_url,
        "guide.api": api,
        "device": device,
        "guide.mode": guide_mode,
        "budget.max_cost_usd": max_cost_usd,
        "budget.max_calls": max_calls,
    }
    existing = options.existing(resume, overwrite)
    resolved = options.resolve("evolve_generate:EvolveGenerateConfig", config, set_, flags)
    if print_config:
        options.print_config(resolved)
        return
    from rlgf_cli.stages import evolve_generate as stage

    if dry_run:
        options.print_estimate(stage.dry_run(resolved), as_json)
        return
    done = stage.run(resolved, existing=existing)
    if as_json:
        console.result_json({"path": str(done.folder), **done.summary, "spend": done.spend})
        return
    _tell(done.summary, resolved.config.answers)
    console.result(str(done.folder))


def _tell(summary: dict[str, Any], answers: bool) -> None:
    """What was kept and what was not, for the person who watches."""
    rows = [[name, str(n["asked"]), str(n["kept"])] for name, n in summary["operations"].items()]
    console.log(console.table(["operation", "asked", "kept"], rows))
    for what in ("rejected", "answers_rejected"):
        if summary[what]:
            counts = ", ".join(f"{name}: {count}" for name, count in summary[what].items())
            console.log(f"{what.replace('_', ' ')}: {counts}")
    console.log(
        f"{summary['instructions']} instructions of {summary['queries']} queries "
        f"({summary['queries_per_instruction']:g} each)"
    )
    if not answers:
        console.log("without answers: rlgf sft needs references, which rlgf collect-guide can ask for")
