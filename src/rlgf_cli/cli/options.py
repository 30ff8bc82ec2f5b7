"""The options of commands that are not config keys, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer


class Option(NamedTuple):
    """``type`` of the value (a list: the option may be given again), one sentence of help, and further names.

    ``show_default``: what the help says the default is, where that is not the value.
    """

    type: Any
    help: str
    names: tuple[str, ...] = ()
    show_default: str | bool = True
    metavar: str | None = None


OPTIONS = {
    "--config": Option(list[Path], "A recipe (YAML). Again: later ones win.", ("-c",)),
    "--set": Option(list[str], "key=value over the recipe, dotted keys."),
    "--resume": Option(bool, "Continue the unfinished run in the output."),
    "--overwrite": Option(bool, "Replace what this command wrote there before."),
    "--print-config": Option(bool, "Print the resolved config with origins, and stop."),
    "--json": Option(bool, "Print the result as JSON."),
    "--dry-run": Option(bool, "Print how many requests there would be and their cost; send none."),
    "compare --markdown": Option(bool, "Print one Markdown table, to paste, and the texts below it."),
    "generate --json": Option(bool, "Print JSON Lines even for one prompt."),
    "prepare FILES": Option(list[Path], "With --check: the files to check."),
    "prepare --map": Option(
        list[str], "KEY=COLUMN,... for prompt, references, id, meta.NAME; or a template: prompt={a} {b}."
    ),
    "prepare --check": Option(bool, "Only check JSONL files; list every bad line."),
    "prepare --kind": Option(
        str,
        "What --check expects: examples, guide, predictions, labelled.",
        show_default="the kind of the first line",
    ),
    "sweep RECIPES": Option(list[Path], "The sweep's YAML; of several, later ones win.", metavar="SWEEP.yaml"),
    "sweep --table": Option(bool, "Only write the table, of the points done so far."),
    "sweep --dry-run": Option(bool, "Print the runs with their commands and the cost."),
    "train --accelerate-config": Option(Path, "Start them with accelerate and this file."),
    "train --profile": Option(bool, "Print the time of each part of a step at the end."),
}
"""By flag, or by command and flag where one command alone has it, or has its own help for it. Capitals: an argument."""


def option_of(command: str, flag: str) -> Option:
    """The option that a command has under a flag."""
    return OPTIONS.get(f"{command} {flag}") or OPTIONS[flag]


AsJson = Annotated[bool, typer.Option("--json", help=OPTIONS["--json"].help, rich_help_panel="Run options")]
"""The option of a command that has no config."""
