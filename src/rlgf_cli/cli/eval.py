"""``rlgf eval``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlgf_cli import console
from rlgf_cli.cli import options
from rlgf_cli.cli.numbers import interval, number, percent

if TYPE_CHECKING:
    from rlgf_cli.stages.eval import EvalResult

EVAL, GENERATION = "Evaluation options", "Generation options"


def evaluate(
    model: Annotated[
        str | None,
        typer.Option("--model", help="The checkpoint that writes the texts.", rich_help_panel=EVAL),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="JSONL with prompts and references.", rich_help_panel=EVAL)
    ] = None,
    predictions: Annotated[
        str | None,
        typer.Option(
            "--predictions",
            help="Score texts made elsewhere: a predictions.jsonl, a guide.jsonl, or id and text per line.",
            rich_help_panel=EVAL,
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            help="Names with commas between; reward:NAME scores with a reward. Default: rouge.",
            rich_help_panel=EVAL,
        ),
    ] = None,
    output: options.Output = None,
    limit: options.Limit = None,
    on_missing: Annotated[
        str | None,
        typer.Option(
            "--on-missing",
            help="Examples without a prediction: error or skip.",
            rich_help_panel=EVAL,
        ),
    ] = None,
    max_cost_usd: options.MaxCost = None,
    max_calls: options.MaxCalls = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="0 (the default) is greedy.", rich_help_panel=GENERATION),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="0 (the default): all tokens.", rich_help_panel=GENERATION)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="1 (the default): all tokens.", rich_help_panel=GENERATION)
    ] = None,
    num_beams: Annotated[
        int | None, typer.Option("--num-beams", help="Above 1: beam search.", rich_help_panel=GENERATION)
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "--max-tokens", help="Default: 64.", rich_help_panel=GENERATION)
    ] = None,
    min_new_tokens: Annotated[
        int | None, typer.Option("--min-new-tokens", help="No ending before.", rich_help_panel=GENERATION)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Rows generated at a time.", rich_help_panel=GENERATION)
    ] = None,
    on_overlong: Annotated[
        str | None,
        typer.Option("--on-overlong", help="Prompts too long: error, truncate or skip.", rich_help_panel=GENERATION),
    ] = None,
    config: options.Config = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.DType = None,
    trust_remote_code: options.TrustRemoteCode = None,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    print_config: options.PrintConfig = False,
    as_json: options.AsJson = False,
) -> None:
    """Score a model or predictions.

    Figures come with their intervals; what they are made of is kept for each example.

    ```
    rlgf eval --model runs/sft --data test.jsonl --metrics rouge,bleu,bertscore
    rlgf eval --model t5 --data test.jsonl --metrics reward:coverage -o out/
    rlgf eval --predictions guide.jsonl --data test.jsonl -o runs/guide/eval
    ```
    """
    flags = {
        "model": model,
        "data": data,
        "predictions": predictions,
        "metrics": metrics,
        "output": output,
        "limit": limit,
        "on_missing": on_missing,
        "budget.max_cost_usd": max_cost_usd,
        "budget.max_calls": max_calls,
        "decoding.temperature": temperature,
        "decoding.top_k": top_k,
        "decoding.top_p": top_p,
        "decoding.num_beams": num_beams,
        "decoding.batch_size": batch_size,
        "lengths.max_new_tokens": max_new_tokens,
        "lengths.min_new_tokens": min_new_tokens,
        "lengths.on_overlong": on_overlong,
        "seed": seed,
        "device": device,
        "model.dtype": dtype,
        "model.trust_remote_code": trust_remote_code,
    }
    resolved = options.resolve("eval:EvalConfig", config, set_, flags)
    if print_config:
        options.print_config(resolved)
        return
    from rlgf_cli.stages import eval as stage

    done = stage.run(resolved, existing=options.existing(resume, overwrite))
    if as_json:
        console.result_json(done.scores)
    else:
        console.result(_table(done))
    _notes(done)


def _table(done: EvalResult) -> str:
    rows = [
        [name, number(entry["value"]), interval(entry["low"], entry["high"]), str(entry["n"])]
        for name, entry in done.scores["metrics"].items()
    ]
    return console.table(["metric", "value", f"{percent(done.scores['interval']['level'])} interval", "n"], rows)


def _notes(done: EvalResult) -> None:
    """What was counted, for the person who reads the numbers."""
    counts: dict[str, Any] = {key: n for key, n in done.scores["counts"].items() if n}
    skipped = {f"{name}.skipped": e["n_skipped"] for name, e in done.scores["metrics"].items() if e["n_skipped"]}
    console.log(", ".join(f"{key} {n}" for key, n in {**counts, **skipped}.items()))
    console.log(f"wrote {done.folder}")
