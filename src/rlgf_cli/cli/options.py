"""Flags that several commands share, and the way from flags to a resolved config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlgf_cli.errors import UserError

if TYPE_CHECKING:
    from rlgf_cli.artifacts.rundir import Existing

COMMON, RUN, MODEL, TEXT = "Common options", "Run options", "Model options", "Text options"
SPEND, GUIDE = "Budget and limits", "Guide options"

Config = Annotated[
    list[Path] | None,
    typer.Option("--config", "-c", help="A recipe (YAML). Again: later ones win.", rich_help_panel=COMMON),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value over the recipe, dotted keys.", rich_help_panel=COMMON),
]
Output = Annotated[
    str | None,
    typer.Option("--output-dir", "-o", "--output", help="Where the product goes.", rich_help_panel=COMMON),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything random.", rich_help_panel=COMMON)]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with what the output already holds.", rich_help_panel=RUN)
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what this command wrote there before.", rich_help_panel=RUN),
]
PrintConfig = Annotated[
    bool,
    typer.Option("--print-config", help="Print the resolved config with origins, and stop.", rich_help_panel=RUN),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=RUN)]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=MODEL)]
DType = Annotated[
    str | None, typer.Option("--dtype", "--torch-dtype", help="float32 or bfloat16.", rich_help_panel=MODEL)
]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option("--trust-remote-code", help="Run code that comes with a hub model.", rich_help_panel=MODEL),
]
Limit = Annotated[
    int | None, typer.Option("--limit", "-L", help="Use only the first N records.", rich_help_panel=COMMON)
]
BaseUrl = Annotated[
    str | None,
    typer.Option("--base-url", help="OpenAI-compatible endpoint; else $OPENAI_BASE_URL.", rich_help_panel=GUIDE),
]
Api = Annotated[str | None, typer.Option("--api", help="chat or completion.", rich_help_panel=GUIDE)]
System = Annotated[str | None, typer.Option("--system", help="System message (chat API).", rich_help_panel=GUIDE)]
PromptTemplate = Annotated[
    str | None,
    typer.Option("--prompt-template", help="What the guide is asked; holds {prompt}.", rich_help_panel=GUIDE),
]
MaxCost = Annotated[
    float | None,
    typer.Option("--max-cost-usd", help="Hard cap on what the guide may cost.", rich_help_panel=SPEND),
]
MaxCalls = Annotated[
    int | None, typer.Option("--max-calls", help="Hard cap on calls of the guide.", rich_help_panel=SPEND)
]
GuideMode = Annotated[
    str | None,
    typer.Option("--guide-mode", help="live, record (cache), or replay (cache alone).", rich_help_panel=SPEND),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be asked and cost; do nothing.", rich_help_panel=RUN)
]


def existing(resume: bool, overwrite: bool) -> Existing:
    """What to do with an output that is already there."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other", hint="choose one")
    return "resume" if resume else "overwrite" if overwrite else "refuse"


def resolve(kind_path: str, config: list[Path] | None, sets: list[str] | None, flags: dict[str, Any]) -> Any:
    """The resolved config of the stage whose model ``module:Class`` names; imported only now."""
    import importlib

    from rlgf_cli.config.loader import resolve as merge

    module, _, name = kind_path.partition(":")
    kind = getattr(importlib.import_module(f"rlgf_cli.config.{module}"), name)
    return merge(kind, files=config or (), sets=sets or (), flags=flags)


def print_config(resolved: Any) -> None:
    """The resolved config as YAML, each value with its origin behind it where it is not a default."""
    import yaml

    from rlgf_cli import console

    data = resolved.to_json()
    console.result(yaml.safe_dump(data["values"], sort_keys=False, allow_unicode=True).rstrip())
    for key, origin in data["origins"].items():
        if origin != "default":
            console.result(f"# {key}: {origin}")


def print_estimate(estimate: dict[str, Any], as_json: bool) -> None:
    """What a dry run found: one line a figure, intervals as low, expected and high."""
    from rlgf_cli import console

    if as_json:
        console.result_json(estimate)
        return
    for name, value in estimate.items():
        shown = " .. ".join(f"{part:,.7g}" for part in value) if isinstance(value, list) else value
        console.result(f"{name.replace('_', ' ')}: {'unknown' if value is None else shown}")
