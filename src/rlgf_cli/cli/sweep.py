"""The command ``rlgf sweep``."""

from __future__ import annotations

from typing import Any

from rlgf_cli import console
from rlgf_cli.cli.invocation import Invocation, shown


def sweep(invocation: Invocation) -> None:
    """Train a grid of runs and compare them.

    One YAML says what is varied; every point is trained, evaluated, and a row of the table.

    ```
    rlgf sweep recipes/synthetic/sweep.yaml -o runs/sweep --dry-run
    rlgf sweep recipes/synthetic/sweep.yaml -o runs/sweep --jobs 2
    rlgf sweep recipes/synthetic/sweep.yaml -o runs/sweep --resume
    ```
    """
    invocation.options["config"] = [*(invocation.options["recipes"] or []), *(invocation.options["config"] or [])]
    resolved, existing = invocation.resolve(), invocation.existing
    from rlgf_cli.stages import sweep as stage

    if invocation.options["dry_run"]:
        _print_plan(stage.dry_run(resolved), invocation.as_json)
        return
    done = stage.table(resolved) if invocation.options["table"] else stage.run(resolved, existing=existing)
    if invocation.as_json:
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
        console.result(f"# {name.replace('_', ' ')}: {shown(value)}")
