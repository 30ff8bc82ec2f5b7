"""The config of ``rlgf report``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from rlgf_cli.config.common import COMMON, RUN, Seed
from rlgf_cli.section import Argument, Flag, Strict


class ReportConfig(Strict):
    """``runs``: folders of train, sft, train-reward or eval; ``name=folder`` gives one a name, and the same name again
    makes them seeds of one system.

    ``output`` null: ``report.html`` in the first folder. ``score`` names the figure of the evaluations that is shown
    first; null: the one that is the trainings' reward, else the first. ``against`` is another figure, against which
    that one is drawn. ``guide`` is a guide.jsonl, a predictions.jsonl or an evaluated folder; null: the guide of the
    trainings, where that is an evaluated checkpoint. ``comparison`` is what ``rlgf compare -o`` wrote. ``texts``
    prompts are shown with all texts, drawn with ``seed``.
    """

    usage: ClassVar[Mapping[str, str]] = {"runs": "rlgf report RUN [MORE ...]"}
    panels: ClassVar[Mapping[str, str]] = {
        "": "runs",
        "Report options": "title score against guide comparison texts",
        COMMON: "output --config --set seed",
        RUN: "--print-config --json",
    }
    runs: Annotated[
        list[str],
        Argument("Folders of train, sft or eval. name=FOLDER names one; the same name again is another seed of it."),
    ] = Field(min_length=1)
    output: Annotated[
        str | None,
        Flag("The HTML file. Default: report.html in the first folder. A former report is replaced.", "--output", "-o"),
    ] = None
    title: Annotated[str | None, Flag("Default: the systems' names.")] = None
    score: Annotated[
        str | None, Flag("Figure of the evaluations that comes first. Default: the trainings' reward.")
    ] = None
    against: Annotated[str | None, Flag("Another figure of the evaluations, to draw the first one against.")] = None
    guide: Annotated[
        str | None,
        Flag(
            "The guide: a guide.jsonl (its texts), or an evaluated folder (its level too). Default: what the "
            "trainings' configs name."
        ),
    ] = None
    comparison: Annotated[str | None, Flag("The JSON of rlgf compare -o, to be shown too.")] = None
    texts: Annotated[int, Flag("Prompts shown with every system's text. Default: {default}.")] = Field(12, ge=0, le=200)
    seed: Seed = 0
