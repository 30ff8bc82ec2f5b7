"""``rlgf evolve generate``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rlgf_cli import console
from rlgf_cli.cli import options

EVOLVE = "Evolution options"


def evolve_generate(
    guide: Annotated[
        str | None,
        typer.Option("--guide", help="hf:PATH, openai:MODEL, or an alias (rlgf ls guides)."),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="JSONL file with the seed instructions.")] = None,
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
    operations: Annotated[
        str | None,
        typer.Option("--operations", help="YAML file of operations; else the built-in six.", rich_help_panel=EVOLVE),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Rewrites of a chain. Default: 6.", rich_help_panel=EVOLVE)
    ] = None,
    passes: Annotated[
        int | None, typer.Option("--passes", help="Chains of each seed. Default: 1.", rich_help_panel=EVOLVE)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Chains side by side.", rich_help_panel=EVOLVE)
    ] = None,
    answers: Annotated[
        bool | None,
        typer.Option("--answers/--no-answers", help="Ask the guide for answers, or not.", rich_help_panel=EVOLVE),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder", help="Text encoder that novelty is measured with; else words.", rich_help_panel=EVOLVE
        ),
    ] = None,
    reviewer: Annotated[
        str | None,
        typer.Option(
            "--reviewer", help="Guide that says whether a rewrite asks for something else.", rich_help_panel=EVOLVE
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Longest rewrite, in tokens.", rich_help_panel=EVOLVE)
    ] = None,
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
