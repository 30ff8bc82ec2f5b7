"""``rlgf collect-guide``."""

from __future__ import annotations

from typing import Annotated

import typer

from rlgf_cli import console
from rlgf_cli.cli import options


def collect_guide(
    guide: Annotated[
        str | None,
        typer.Option("--guide", help="hf:PATH, openai:MODEL, or an alias (rlgf ls guides)."),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="JSONL file with the prompts.")] = None,
    samples: Annotated[int | None, typer.Option("--samples", "-k", help="Texts per prompt.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", help="Longest text, in tokens.")] = None,
    output: options.Output = None,
    limit: options.Limit = None,
    config: options.Config = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    base_url: options.BaseUrl = None,
    api: options.Api = None,
    system: options.System = None,
    prompt_template: options.PromptTemplate = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 is greedy.", rich_help_panel=options.GUIDE)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Nucleus; 1 is all.", rich_help_panel=options.GUIDE)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Best k tokens; 0 is all.", rich_help_panel=options.GUIDE)
    ] = None,
    num_beams: Annotated[
        int | None, typer.Option("--num-beams", help="Beam search (hf: only).", rich_help_panel=options.GUIDE)
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", help="Requests at once (API).", rich_help_panel=options.GUIDE)
    ] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", help="Seconds per attempt (API).", rich_help_panel=options.GUIDE)
    ] = None,
    max_retries: Annotated[
        int | None, typer.Option("--max-retries", help="Retries per request (API).", rich_help_panel=options.GUIDE)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Texts at once (hf:).", rich_help_panel=options.GUIDE)
    ] = None,
    on_overlong: Annotated[
        str | None,
        typer.Option(
            "--on-overlong",
            help="error or truncate, for prompts that do not fit (hf:).",
            rich_help_panel=options.GUIDE,
        ),
    ] = None,
    device: options.Device = None,
    dtype: options.DType = None,
    max_cost_usd: options.MaxCost = None,
    max_calls: options.MaxCalls = None,
    guide_mode: options.GuideMode = None,
    rpm: Annotated[
        float | None, typer.Option("--rpm", help="Requests per minute, at most.", rich_help_panel=options.SPEND)
    ] = None,
    tpm: Annotated[
        float | None, typer.Option("--tpm", help="Tokens per minute, at most.", rich_help_panel=options.SPEND)
    ] = None,
    batch: Annotated[
        bool | None,
        typer.Option("--batch", help="The batch API: cheaper, within a day.", rich_help_panel=options.SPEND),
    ] = None,
    dry_run: options.DryRun = False,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    print_config: options.PrintConfig = False,
    as_json: options.AsJson = False,
) -> None:
    """Buy a guide's text once and keep it: prompts in, one JSONL line per text out.

    Lines are written as they arrive; --resume asks only for what is missing, and what any run has bought comes
    from the cache. The key of an API is read from OPENAI_API_KEY.

    ```
    rlgf collect-guide --guide gpt-3.5 --data train.jsonl -k 2 -o guide.jsonl --dry-run
    rlgf collect-guide --guide gpt-3.5 --data train.jsonl -k 2 -o guide.jsonl --max-cost-usd 5
    rlgf collect-guide --guide hf:runs/large --data train.jsonl -o guide.jsonl
    rlgf collect-guide --guide openai:qwen --base-url http://127.0.0.1:8000/v1 \\
      --data train.jsonl -o guide.jsonl --resume
    ```
    """
    flags = {
        "guide": guide,
        "data": data,
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "output": output,
        "limit": limit,
        "seed": seed,
        "guide.base_url": base_url,
        "guide.api": api,
        "guide.system": system,
        "guide.prompt_template": prompt_template,
        "guide.sampling.temperature": temperature,
        "guide.sampling.top_p": top_p,
        "guide.sampling.top_k": top_k,
        "guide.sampling.num_beams": num_beams,
        "guide.concurrency": concurrency,
        "guide.timeout_s": timeout,
        "guide.max_retries": max_retries,
        "guide.batch_size": batch_size,
        "guide.on_overlong": on_overlong,
        "guide.device": device,
        "guide.dtype": dtype,
        "guide.mode": guide_mode,
        "guide.requests_per_minute": rpm,
        "guide.tokens_per_minute": tpm,
        "budget.max_cost_usd": max_cost_usd,
        "budget.max_calls": max_calls,
        "batch": batch,
    }
    existing = options.existing(resume, overwrite)
    resolved = options.resolve("collect_guide:CollectGuideConfig", config, set_, flags)
    if print_config:
        options.print_config(resolved)
        return
    from rlgf_cli.stages import collect_guide as stage

    if dry_run:
        options.print_estimate(stage.dry_run(resolved), as_json)
        return
    result = stage.run(resolved, existing=existing)
    if as_json:
        console.result_json({"path": str(result.path), **result.summary, "spend": result.spend})
    else:
        console.result(str(result.path))
