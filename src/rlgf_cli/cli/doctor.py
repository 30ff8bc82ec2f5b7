"""``rlgf doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rlgf_cli import console
from rlgf_cli.cli import options
from rlgf_cli.errors import RlgfError

if TYPE_CHECKING:
    from rlgf_cli.stages.doctor import Check, Diagnosis

GUIDE = "Guide options"
_LONGEST = 160


def doctor(
    guide: Annotated[
        str | None, typer.Option("--guide", help="FILE.jsonl, hf:PATH, openai:MODEL, or an alias.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The policy: a checkpoint folder or hub name.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="JSONL file with the prompts.")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", "-L", help="Use only the first N prompts. Default: 20.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="The limit that training will have. Default: 64.")
    ] = None,
    config: options.Config = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    base_url: Annotated[
        str | None,
        typer.Option("--base-url", help="OpenAI-compatible endpoint; else $OPENAI_BASE_URL.", rich_help_panel=GUIDE),
    ] = None,
    api: Annotated[str | None, typer.Option("--api", help="chat or completion.", rich_help_panel=GUIDE)] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="System message (chat API).", rich_help_panel=GUIDE)
    ] = None,
    prompt_template: Annotated[
        str | None,
        typer.Option("--prompt-template", help="What the guide is asked; holds {prompt}.", rich_help_panel=GUIDE),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 is greedy.", rich_help_panel=GUIDE)
    ] = None,
    max_cost_usd: options.MaxCost = None,
    max_calls: options.MaxCalls = None,
    guide_mode: options.GuideMode = None,
    device: options.Device = None,
    dtype: options.DType = None,
    trust_remote_code: options.TrustRemoteCode = None,
    print_config: options.PrintConfig = False,
    as_json: options.AsJson = False,
) -> None:
    """Check a guide and a policy on your prompts before you train.

    A live guide is asked for a text per prompt and, where it can, to go on from the middle of it. Exit code 1
    where a truth is broken that training relies on.

    ```
    rlgf doctor --guide guide.jsonl --model runs/sft --data train.jsonl
    rlgf doctor --guide gpt-3.5 --model runs/sft --data train.jsonl -L 5 --max-new-tokens 48
    rlgf doctor --guide hf:runs/large --model runs/sft --data train.jsonl --json
    ```
    """
    flags = {
        "guide": guide,
        "model": model,
        "data": data,
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "guide.base_url": base_url,
        "guide.api": api,
        "guide.system": system,
        "guide.prompt_template": prompt_template,
        "guide.sampling.temperature": temperature,
        "guide.mode": guide_mode,
        "guide.device": device,
        "guide.dtype": dtype,
        "budget.max_cost_usd": max_cost_usd,
        "budget.max_calls": max_calls,
        "model.device": device,
        "model.dtype": dtype,
        "model.trust_remote_code": trust_remote_code,
    }
    resolved = options.resolve("doctor:DoctorConfig", config, set_, flags)
    if print_config:
        options.print_config(resolved)
        return
    from rlgf_cli.stages import doctor as stage

    diagnosis = stage.run(resolved)
    if as_json:
        console.result_json(diagnosis.to_json())
    else:
        _show(diagnosis)
    if diagnosis.broken:
        remedies = [check.remedy for check in diagnosis.checks if check.status == "fail" and check.remedy]
        raise RlgfError(
            f"{len(diagnosis.broken)} of {len(diagnosis.checks)} checks failed: {', '.join(diagnosis.broken)}",
            hint="; ".join(dict.fromkeys(remedies)) or None,
        )


def _show(diagnosis: Diagnosis) -> None:
    console.result(f"{diagnosis.guide} and {diagnosis.model} on {diagnosis.prompts} prompts of {diagnosis.data}")
    for check in diagnosis.checks:
        console.result()
        for line in _lines(check):
            console.result(line)


def _lines(check: Check) -> list[str]:
    lines = [f"{check.status:<4}  {check.name}: {check.finding}", f"      {check.explanation}"]
    if check.remedy:
        lines.append(f"      remedy: {check.remedy}")
    for sample in check.samples:
        lines.append(f"      lost {sample['lost']}:" if "lost" in sample else "      sample:")
        lines += [f"        {name}: {_short(text)}" for name, text in sample.items() if name != "lost"]
    return lines


def _short(text: str) -> str:
    """A text on one line, line breaks shown; the middle of a long one is left out."""
    shown = repr(text)
    half = _LONGEST // 2
    return shown if len(shown) <= _LONGEST else f"{shown[:half]} ... {shown[-half:]}"
