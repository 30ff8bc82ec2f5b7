"""``rlgf make-negatives``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rlgf_cli import console
from rlgf_cli.cli import options

FAILURES = "Failure options"


def make_negatives(
    data: Annotated[
        str | None,
        typer.Option("--data", help="JSONL with prompts and references.", rich_help_panel=options.COMMON),
    ] = None,
    output: options.Output = None,
    limit: options.Limit = None,
    kinds: Annotated[
        str | None,
        typer.Option("--kinds", help="Names with commas between. Default: all.", rich_help_panel=FAILURES),
    ] = None,
    per_reference: Annotated[
        int | None,
        typer.Option("--per-reference", help="Bad texts for each good one. Default: 1.", rich_help_panel=FAILURES),
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option(
            "--samples",
            help="Texts of the starting policy (rlgf generate): those that break a rule are taken.",
            rich_help_panel=FAILURES,
        ),
    ] = None,
    config: options.Config = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    overwrite: options.Overwrite = False,
    print_config: options.PrintConfig = False,
    as_json: options.AsJson = False,
) -> None:
    """Make bad texts of many kinds from good ones, to train a reward model on.

    ```
    rlgf make-negatives --data train.jsonl -o negatives.jsonl
    rlgf make-negatives --data train.jsonl --kinds cut_off,repetition -o neg.jsonl
    rlgf make-negatives --data train.jsonl --samples sft_texts.jsonl -o neg.jsonl
    ```
    """
    flags = {
        "data": data,
        "output": output,
        "limit": limit,
        "kinds": kinds,
        "per_reference": per_reference,
        "samples": samples,
        "seed": seed,
    }
    resolved = options.resolve("make_negatives:MakeNegativesConfig", config, set_, flags)
    if print_config:
        options.print_config(resolved)
        return
    from rlgf_cli.stages import make_negatives as stage

    done = stage.run(resolved, existing="overwrite" if overwrite else "refuse")
    if as_json:
        console.result_json({"path": str(done.path), **done.summary})
        return
    _tell(done.summary)
    console.result(str(done.path))


def _tell(summary: dict[str, Any]) -> None:
    """What was made and what was dropped, for the person who watches."""
    names = dict.fromkeys([*summary["made"], *summary["not_applicable"], *summary["equal_to_reference"]])
    rows = [
        [name, *(str(summary[what].get(name, 0)) for what in ("made", "not_applicable", "equal_to_reference"))]
        for name in names
    ]
    console.log(console.table(["kind", "made", "does not apply", "equal to a reference"], rows))
    console.log(f"good texts: {summary['good']}, rows: {summary['rows']}")
    if own := summary.get("on_policy"):
        console.log(
            f"on_policy: {own['made']} made, {own['no_rule_broken']} broke no rule, {own['empty']} empty, "
            f"{own['left_over']} left over"
        )
    if summary["without_references"]:
        console.log(f"examples without a reference: {summary['without_references']}")
