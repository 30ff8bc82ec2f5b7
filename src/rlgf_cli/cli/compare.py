"""``rlgf compare``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlgf_cli import console
from rlgf_cli.cli import options
from rlgf_cli.cli.numbers import interval, number, percent
from rlgf_cli.errors import UserError

if TYPE_CHECKING:
    from rlgf_cli.stages.compare import Comparison

COMPARE = "Comparison options"


def compare(
    systems: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders that rlgf eval wrote, or runs with eval/ in them; the first is the base. "
            "name=FOLDER names one.",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            help="Names with commas between: rouge, rouge.rougeL. Default: all.",
            rich_help_panel=COMPARE,
        ),
    ] = None,
    force: Annotated[
        bool | None,
        typer.Option(
            "--force",
            help="Compare in spite of different signatures, references or prompts.",
            rich_help_panel=COMPARE,
        ),
    ] = None,
    level: Annotated[
        float | None,
        typer.Option("--level", help="Of the intervals. Default: 0.95.", rich_help_panel=COMPARE),
    ] = None,
    resamples: Annotated[
        int | None,
        typer.Option("--resamples", help="Bootstrap resamples. Default: 10000.", rich_help_panel=COMPARE),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Also write the comparison to this JSON file.",
            rich_help_panel=options.COMMON,
        ),
    ] = None,
    config: options.Config = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    overwrite: options.Overwrite = False,
    print_config: options.PrintConfig = False,
    as_json: options.AsJson = False,
) -> None:
    """Compare evaluations.

    Each system is compared with the first on the same prompts: mean, difference, and their bootstrap
    intervals. A `*` marks a difference whose interval excludes 0.

    ```
    rlgf compare runs/sft runs/ppopp
    rlgf compare sft=runs/a/eval ppo=runs/b/eval --metrics reward.total,rouge
    rlgf compare runs/sft runs/ppo runs/ppopp --json -o comparison.json
    ```
    """
    flags = {
        "systems": systems or None,
        "metrics": [name.strip() for name in metrics.split(",") if name.strip()] if metrics else None,
        "force": force,
        "output": output,
        "seed": seed,
        "interval.level": level,
        "interval.resamples": resamples,
    }
    if systems is not None and len(systems) == 1:
        raise UserError("one system alone cannot be compared", hint="rlgf compare BASE OTHER [MORE ...]")
    resolved = options.resolve("compare:CompareConfig", config, set_, flags)
    if print_config:
        options.print_config(resolved)
        return
    from rlgf_cli.stages import compare as stage

    comparison = stage.run(resolved, existing="overwrite" if overwrite else "refuse")
    if as_json:
        console.result_json(comparison.to_json())
        return
    for i, (name, figure) in enumerate(comparison.figures.items()):
        if i:
            console.result()
        skipped = f", {figure['n_skipped']} skipped" if figure["n_skipped"] else ""
        console.result(f"{name} (n = {figure['n']}{skipped})")
        console.result(_table(comparison, figure))


def _table(comparison: Comparison, figure: dict[str, Any]) -> str:
    level = f"{percent(comparison.level)} interval"
    base = figure["rows"][0]["system"]
    rows = []
    for row in figure["rows"]:
        cells = [row["system"], number(row["value"]), interval(row["low"], row["high"])]
        if (difference := row.get("difference")) is None:
            rows.append([*cells, "", "", ""])
        else:
            rows.append(
                [
                    *cells,
                    number(difference["value"], signed=True),
                    interval(difference["low"], difference["high"], signed=True),
                    "*" if difference["excludes_zero"] else "",
                ]
            )
    return console.table(["system", "value", level, f"minus {base}", level, "excludes 0"], rows)
