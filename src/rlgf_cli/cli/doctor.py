"""``rlgf doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rlgf_cli import console
from rlgf_cli.cli import options
from rlgf_cli.errors import RlgfError

if TYPE_CHECKING:
    from rlgf_cli.protocols import Check
    from rlgf_cli.stages.doctor import Diagnosis

_LONGEST = 160


def doctor(
    model: Annotated[
        str | None, typer.Option("--model", "--model-name-or-path", help="The policy: a checkpoint folder or hub name.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="JSONL file with the prompts.")] = None,
    reward: Annotated[
        str | None, typer.Option("--reward", help="Names from `rlgf ls rewards`, file.py:function; several by commas.")
    ] = None,
    guide: Annotated[
        str | None, typer.Option("--guide", help="FILE.jsonl, hf:PATH, openai:MODEL, or an alias.")
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option("--alg", "--algorithm", help="As training will have it. Default: ppo.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", "-L", help="Write and ask for the first N prompts. Default: 20.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="The limit that training will have. Default: 64.")
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Of the rollouts.")] = None,
    on_overlong: Annotated[
        str | None, typer.Option("--on-overlong", help="Longer prompts: error, truncate or skip.")
    ] = None,
    use_peft: Annotated[
        bool | None, typer.Option("--use-peft", help="With a fresh LoRA adapter.", rich_help_panel=options.MODEL)
    ] = None,
    config: options.Config = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    base_url: options.BaseUrl = None,
    api: options.Api = None,
    system: options.System = None,
    prompt_template: options.PromptTemplate = None,
    guide_temperature: Annotated[
        float | None,
        typer.Option("--guide-temperature", help="The guide's; 0 is greedy.", rich_help_panel=options.GUIDE),
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
    """Check what you would train with: model, data, reward and guide.

    Flags and recipes are those of `rlgf train`. The policy writes a text per prompt, and the truths of step 0 are held
    against it; a live guide is asked for a text per prompt and, where it can, to go on from the middle of it. Exit code
    1 where a truth is broken that training relies on.

    ```
    rlgf doctor --model runs/sft --data train.jsonl --reward rouge
    rlgf doctor -c recipes/demo/train.yaml --alg ppo++ --model runs/sft --guide guide.jsonl --data train.jsonl
    rlgf doctor --guide gpt-3.5 --model runs/sft --data train.jsonl -L 5 --max-new-tokens 48 --json
    ```
    """
    flags = {
        "algorithm.name": algorithm,
        "guide.name": guide,
        "model.name": model,
        "data": data,
        "reward": reward,
        "prompts": limit,
        "lengths.max_new_tokens": max_new_tokens,
        "lengths.on_overlong": on_overlong,
        "rollout.temperature": temperature,
        "lora.enabled": use_peft,
        "seed": seed,
        "guide.base_url": base_url,
        "guide.api": api,
        "guide.system": system,
        "guide.prompt_template": prompt_template,
        "guide.sampling.temperature": guide_temperature,
        "guide.mode": guide_mode,
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
    who = f"{diagnosis.guide} and {diagnosis.model}" if diagnosis.guide else diagnosis.model
    console.result(f"{who} on {diagnosis.prompts} prompts of {diagnosis.data}")
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
