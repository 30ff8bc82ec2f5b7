"""``rlgf report``."""

from __future__ import annotations

from typing import Annotated

import typer

from rlgf_cli import console
from rlgf_cli.cli import options

REPORT = "Report options"


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders of train, sft or eval. name=FOLDER names one; the same name again is another seed of it.",
            show_default=False,
        ),
    ] = None,
    title: Annotated[
        str | None, typer.Option("--title", help="Default: the systems' names.", rich_help_panel=REPORT)
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            "--score",
            help="Figure of the evaluations that comes first. Default: the trainings' reward.",
            rich_help_panel=REPORT,
        ),
    ] = None,
    guide: Annotated[
        str | None,
        typer.Option(
            "--guide",
            help="The guide: a guide.jsonl (its texts), or an evaluated folder (its level too). Default: what the "
            "trainings' configs name.",
            rich_help_panel=REPORT,
        ),
    ] = None,
    comparison: Annotated[
        str | None,
        typer.Option("--comparison", help="The JSON of rlgf compare -o, to be shown too.", rich_help_panel=REPORT),
    ] = None,
    texts: Annotated[
        int | None,
        typer.Option("--texts", help="Prompts shown with every system's text. Default: 12.", rich_help_panel=REPORT),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="The HTML file. Default: report.html in the first folder. A former report is replaced.",
            rich_help_panel=options.COMMON,
        ),
    ] = None,
    config: options.Config = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    print_config: options.PrintConfig = False,
    as_json: options.AsJson = False,
) -> None:
    """Show runs and evaluations on one HTML page.

    Learning curves, evaluations with their intervals, texts side by side, who wrote which words, spend and
    configuration: one file that needs no network. The plots lie beside it in plots/ as SVG and PNG. A training
    that is still going on can be looked at too.

    ```
    rlgf report runs/ppopp
    rlgf report SFT=runs/sft PPO=runs/ppo PPO++=runs/ppopp -o report.html
    rlgf report PPO++=runs/a PPO++=runs/b PPO++=runs/c --comparison comparison.json -o seeds.html
    ```
    """
    flags = {
        "runs": runs or None,
        "title": title,
        "score": score,
        "guide": guide,
        "comparison": comparison,
        "texts": texts,
        "output": output,
        "seed": seed,
    }
    resolved = options.resolve("report:ReportConfig", config, set_, flags)
    if print_config:
        options.print_config(resolved)
        return
    from rlgf_cli.stages import report as stage

    made = stage.run(resolved)
    if as_json:
        console.result_json({"path": str(made.path), "plots": [str(path) for path in made.plots]})
    else:
        console.result(str(made.path))
