"""The table of a sweep: ``rlgf compare`` of all systems with each baseline, as Markdown, CSV and HTML."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlgf_cli.artifacts.jsonl import atomic_text, write_json
from rlgf_cli.config.sweep import SweepConfig
from rlgf_cli.errors import UserError
from rlgf_cli.sweep import table, work
from rlgf_cli.sweep.grid import safe_name
from rlgf_cli.sweep.plan import Plan
from rlgf_cli.sweep.work import Cell


def write_table(config: SweepConfig, plan: Plan, *, log: Callable[[str], None]) -> str:
    """Compare the evaluated systems and write table.md, table.csv and table.html; returns the Markdown."""
    folders: dict[str, list[Path]] = {}
    for cell in plan.cells:
        if cell.is_done:
            folders.setdefault(cell.system, []).append(cell.folder)
    if len(folders) < 2:
        raise UserError(
            f"{len(folders)} of {len(plan.systems)} systems are evaluated so far, and a table compares",
            where=str(plan.output),
            hint="--resume goes on with the sweep",
        )
    bases = [base for base in plan.baselines if base in folders] or [next(iter(folders))]
    comparisons: dict[str, Any] = {}
    for base in bases:
        comparisons[base] = _compare(config, folders, base, log)
        write_json(plan.output / comparison_file(base), comparisons[base])
    rows = []
    for label in plan.systems:
        cells = [cell for cell in plan.cells if cell.system == label]
        rows.append(table.Row(label, len(cells), [_state(cell) for cell in cells if not cell.is_done]))
    built = table.build(comparisons, rows, baselines=plan.baselines, level=config.interval.level)
    markdown = table.to_markdown(built)
    for name, text in (
        ("table.md", markdown),
        ("table.csv", table.to_csv(built)),
        ("table.html", table.to_html(built, plan.output.name)),
    ):
        with atomic_text(plan.output / name) as stream:
            stream.write(text)
    return markdown


def _state(cell: Cell) -> str:
    what = "its run" if cell.seed is None else f"seed {cell.seed}"
    return f"{what} {cell.state}{': ' + cell.message if cell.message else ''}"


def comparison_file(base: str) -> str:
    """The file of the comparison of all systems with ``base``."""
    return f"comparison_{safe_name(base)}.json"


def _compare(
    config: SweepConfig, folders: Mapping[str, Sequence[Path]], base: str, log: Callable[[str], None]
) -> dict[str, Any]:
    """The output of ``rlgf compare`` of all systems with one of them; its messages go to ``log``."""
    labels = [base, *(label for label in folders if label != base)]
    words = [f"{label}={folder}" for label in labels for folder in folders[label]]
    if config.figures is not None:
        words += ["--metrics", ",".join(config.figures)]
    words += ["--level", str(config.interval.level), "--resamples", str(config.interval.resamples)]
    command = [*work.RLGF, "compare", *words, "--seed", str(config.seed), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    messages = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode:
        errors = [line for line in messages if line.startswith("error: ")]
        first = (errors or messages[-1:] or ["no message"])[0]
        raise UserError(f"rlgf compare, against {base}: {first.removeprefix('error: ')}")
    for line in messages:
        log(line)
    return dict(json.loads(done.stdout))
