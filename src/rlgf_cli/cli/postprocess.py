"""``rlgf postprocess``."""

from __future__ import annotations

from typing import Annotated

import typer

from rlgf_cli import console
from rlgf_cli.cli import options

MENDING = "Mending options"


def postprocess(
    predictions: Annotated[
        str | None,
        typer.Argument(help="A predictions.jsonl, guide.jsonl, or id and text per line.", show_default=False),
    ] = None,
    output: options.Output = None,
    rules: Annotated[
        str | None,
        typer.Option(
            "--rules",
            help="In order: end_mark, repetition, repeats, unfinished, trim. Default: all but trim.",
            rich_help_panel=MENDING,
        ),
    ] = None,
    max_words: Annotated[
        int | None,
        typer.Option("--max-words", help="Trim longer texts to whole sentences.", rich_help_panel=MENDING),
    ] = None,
    config: options.Config = None,
    set_: options.Set = None,
    overwrite: options.Overwrite = False,
    print_config: options.PrintConfig = False,
    as_json: options.AsJson = False,
) -> None:
    """Mend texts by rules: cut loops, unfinished sentences and what follows an end mark.

    ```
    rlgf postprocess runs/sft/eval/predictions.jsonl -o mended.jsonl
    rlgf postprocess texts.jsonl --rules repetition,unfinished -o mended.jsonl
    rlgf postprocess texts.jsonl --max-words 40 -o mended.jsonl
    ```
    """
    flags = {"predictions": predictions, "output": output, "rules": rules, "max_words": max_words}
    resolved = options.resolve("postprocess:PostprocessConfig", config, set_, flags)
    if print_config:
        options.print_config(resolved)
        return
    from rlgf_cli.stages import postprocess as stage

    done = stage.run(resolved, existing="overwrite" if overwrite else "refuse")
    if as_json:
        console.result_json({"path": str(done.path), **done.summary})
        return
    by_rule = ", ".join(f"{name} {n}" for name, n in done.summary["rules"].items())
    console.log(f"{done.summary['changed']} of {done.summary['records']} texts changed ({by_rule})")
    console.result(str(done.path))
