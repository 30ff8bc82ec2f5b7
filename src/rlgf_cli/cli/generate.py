"""``rlgf generate``."""

from __future__ import annotations

from typing import Annotated

import typer

from rlgf_cli import console
from rlgf_cli.cli import options
from rlgf_cli.cli import supervised_options as shared
from rlgf_cli.cli.options import COMMON, RUN, TEXT

DECODING = "Decoding options"


def generate(
    model: Annotated[
        str | None,
        typer.Option("--model", "--model-name-or-path", help="Checkpoint folder or hub name.", rich_help_panel=COMMON),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="JSONL with prompts.", rich_help_panel=COMMON)] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="One prompt, instead of --data.", rich_help_panel=COMMON)
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="JSONL file; without it the texts are printed.", rich_help_panel=COMMON),
    ] = None,
    limit: options.Limit = None,
    config: options.Config = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", help="Texts per prompt.", rich_help_panel=DECODING)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 is greedy.", rich_help_panel=DECODING)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="The k likeliest tokens; 0: all.", rich_help_panel=DECODING)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Nucleus sampling; 1: all.", rich_help_panel=DECODING)
    ] = None,
    num_beams: Annotated[
        int | None, typer.Option("--num-beams", help="Beam search above 1.", rich_help_panel=DECODING)
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Longest response.", rich_help_panel=DECODING)
    ] = None,
    min_new_tokens: Annotated[
        int | None, typer.Option("--min-new-tokens", help="No EOS before.", rich_help_panel=DECODING)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Prompts at once.", rich_help_panel=DECODING)
    ] = None,
    on_overlong: Annotated[
        str | None,
        typer.Option("--on-overlong", help="error, truncate or skip a prompt that does not fit.", rich_help_panel=TEXT),
    ] = None,
    device: options.Device = None,
    dtype: options.DType = None,
    revision: shared.Revision = None,
    trust_remote_code: options.TrustRemoteCode = None,
    overwrite: options.Overwrite = False,
    print_config: options.PrintConfig = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON Lines even for one prompt.", rich_help_panel=RUN)
    ] = False,
) -> None:
    """Generate text from a checkpoint.

    ```
    rlgf generate --model runs/sft --prompt "dog park run"
    rlgf generate --model runs/sft --data val.jsonl --temperature 0 -o out.jsonl
    rlgf generate --model runs/sft --data val.jsonl -n 4 --top-p 0.9 | head
    ```
    """
    flags = {
        "model": model,
        "data": data,
        "prompt": prompt,
        "output": output,
        "limit": limit,
        "seed": seed,
        "samples": samples,
        "decoding.temperature": temperature,
        "decoding.top_k": top_k,
        "decoding.top_p": top_p,
        "decoding.num_beams": num_beams,
        "decoding.batch_size": batch_size,
        "lengths.max_new_tokens": max_new_tokens,
        "lengths.min_new_tokens": min_new_tokens,
        "lengths.on_overlong": on_overlong,
        "model.device": device,
        "model.dtype": dtype,
        "model.revision": revision,
        "model.trust_remote_code": trust_remote_code,
    }
    resolved = options.resolve("generate:GenerateConfig", config, set_, flags)
    if print_config:
        options.print_config(resolved)
        return
    from rlgf_cli.artifacts.jsonl import dump_line
    from rlgf_cli.stages import generate as stage

    result = stage.run(resolved, existing=options.existing(False, overwrite))
    if result.path is not None:
        console.result(str(result.path))
        return
    for record in result.records:
        as_text = resolved.config.prompt is not None and not as_json
        console.result(record.prediction if as_text else dump_line(record).rstrip("\n"))
