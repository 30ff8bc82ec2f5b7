"""Flags that ``evolve train`` and ``evolve generate`` share."""

from __future__ import annotations

from typing import Annotated

import typer

from rlgf_cli.cli.options import COMMON

EVOLVE = "Evolving options"

Data = Annotated[str | None, typer.Option("--data", help="JSONL with the seed instructions.", rich_help_panel=COMMON)]
Guide = Annotated[
    str | None,
    typer.Option("--guide", help="Who rewrites: hf:PATH, openai:MODEL, alias.", rich_help_panel=COMMON),
]
Operations = Annotated[
    str | None,
    typer.Option("--operations", help="YAML of ways to rewrite; else six of them.", rich_help_panel=EVOLVE),
]
Reviewer = Annotated[
    str | None,
    typer.Option("--reviewer", help="Guide that says whether a rewrite differs.", rich_help_panel=EVOLVE),
]
Encoder = Annotated[
    str | None,
    typer.Option("--encoder", help="Text encoder for novelty; else words.", rich_help_panel=EVOLVE),
]
Steps = Annotated[int | None, typer.Option("--steps", help="Rewrites of a chain. Default: 6.", rich_help_panel=EVOLVE)]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Chains side by side.", rich_help_panel=EVOLVE)]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", help="Longest rewrite, in tokens.", rich_help_panel=EVOLVE)
]
