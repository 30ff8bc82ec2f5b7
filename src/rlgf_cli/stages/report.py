"""``rlgf report``: one HTML page on runs and evaluations, and its plots as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlgf_cli.artifacts.evaluations import split_label
from rlgf_cli.artifacts.jsonl import write_bytes
from rlgf_cli.config.loader import Resolved
from rlgf_cli.config.report import ReportConfig
from rlgf_cli.errors import UserError
from rlgf_cli.report import page, tables
from rlgf_cli.report.read import Run, read_run
from rlgf_cli.report.systems import group_systems

_MARK = b'name="generator" content="rlgf report"'


@dataclass(frozen=True)
class ReportResult:
    """The page and the plots that were written."""

    path: Path
    plots: Sequence[Path]


def run(resolved: Resolved[ReportConfig]) -> ReportResult:
    """Read the runs, draw the plots and write the page. An existing report is replaced, another file is not.

    Raises UserError for folders that hold no run, and where there is nothing to show.
    """
    config = resolved.config
    named = [(label, read_run(Path(folder))) for label, folder in map(split_label, config.runs)]
    output = Path(config.output) if config.output is not None else named[0][1].folder / "report.html"
    _check_output(output)
    if not any(_has_content(run) for _, run in named):
        raise UserError(
            "there is nothing to show: no rows of metrics.jsonl and no evaluation",
            where=str(named[0][1].folder),
            hint="wait for the first step of a training, or run `rlgf eval`",
        )
    sources = page.Sources(group_systems(named), config)
    if config.comparison is not None:
        sources.comparison = tables.read_comparison(Path(config.comparison))
    if config.guide is not None:
        sources.guide, sources.guide_file = page.guide_sources(config.guide)
    made = page.build(sources)
    folder = output.parent / "plots"
    plots = []
    for plot in made.plots:
        for suffix, content in ((".svg", plot.svg.encode()), (".png", plot.png)):
            plots.append(folder / f"{output.stem}-{plot.name}{suffix}")
            write_bytes(plots[-1], content)
    write_bytes(output, made.html.encode())
    return ReportResult(output, plots)


def _check_output(output: Path) -> None:
    """Refuse an output that must not be replaced, before anything is drawn."""
    if output.is_dir():
        raise UserError("the output is a folder; a file name is needed", where=str(output), hint="-o report.html")
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError("a report is an HTML file", where=str(output), hint=f"-o {output}.html")
    if output.is_file():
        with output.open("rb") as stream:
            if _MARK not in stream.read(4096):
                raise UserError("this file was not written by rlgf report", where=str(output), hint="choose another -o")


def _has_content(run: Run) -> bool:
    return bool(run.curves or run.evaluations)
