"""``rlgf sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rlgf_cli import console
from rlgf_cli.cli import options

SWEEP = "Sweep options"


def sweep(
    recipes: Annotated[
        list[Path] | None,
        typer.Argument(metavar="SWEEP.yaml", help="The sweep; of several the later ones win.", show_default=False),
    ] = None,
    output: options.Output = None,
    config: options.Config = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", help="Runs at once.", rich_help_panel=SWEEP)] = None,
    budget_usd: Annotated[
        float | None,
        typer.Option("--budget-usd", help="Hard cap on what all guides cost together.", rich_help_panel=SWEEP),
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Only the table, of what is there so far.", rich_help_panel=SWEEP)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the runs with their commands and the cost.", rich_help_panel=SWEEP),
    ] = False,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    print_config: options.PrintConfig = False,
    as_json: options.AsJson = False,
) -> None:
    """Train a grid of runs and compare them.

    One YAML says what is varied; every point is trained, evaluated, and a row of the table.

    ```
    rlgf sweep recipes/demo/sweep.yaml -o runs/sweep --dry-run
    rlgf sweep recipes/demo/sweep.yaml -o runs/sweep --jobs 2
    rlgf sweep recipes/demo/sweep.yaml -o runs/sweep --resume
    ```
    """
    given = {"output": output, "seed": seed, "jobs": jobs, "budget_usd": budget_usd}
    resolved = options.resolve("sweep:SweepConfig", [*(recipes or []), *(config or [])], set_, given)
    if print_config:
        options.print_config(resolved)
        return
    existing = options.existing(resume, overwrite)
    from rlgf_cli.stages import sweep as stage

    if dry_run:
        _print_plan(stage.dry_run(resolved), as_json)
        return
    done = stage.table(resolved) if table else stage.run(resolved, existing=existing)
    if as_json:
        console.result_json(done.to_json())
    elif done.markdown is not None:
        console.result(done.markdown.rstrip())
    console.log(f"wrote {done.folder}")
    if done.problem is not None:
        raise done.problem


def _print_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        console.result_json(plan)
        return
    points = plan.pop("points")
    for point in points:
        console.result(f"# {point['title']}")
        for command in point["commands"]:
            console.result(command)
    for name, value in plan.items():
        shown = " .. ".join(f"{part:,.7g}" for part in value) if isinstance(value, list) else value
        console.result(f"# {name.replace('_', ' ')}: {'unknown' if value is None else shown}")
