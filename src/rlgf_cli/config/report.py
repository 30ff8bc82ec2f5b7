"""``rlgf report``: the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from rlgf_cli.section import Strict


class ReportConfig(Strict):
    """``runs``: folders of train, sft, train-reward or eval; ``name=folder`` gives one a name, and the same name again
    makes them seeds of one system.

    ``output`` null: ``report.html`` in the first folder. ``score`` names the figure of the evaluations that is shown
    first; null: the one that is the trainings' reward, else the first. ``guide`` is a guide.jsonl, a predictions.jsonl
    or an evaluated folder; null: the guide of the trainings, where that is an evaluated checkpoint. ``comparison`` is
    what ``rlgf compare -o`` wrote. ``texts`` prompts are shown with all texts, drawn with ``seed``.
    """

    usage: ClassVar[Mapping[str, str]] = {"runs": "rlgf report RUN [MORE ...]"}
    runs: list[str] = Field(min_length=1)
    output: str | None = None
    title: str | None = None
    score: str | None = None
    guide: str | None = None
    comparison: str | None = None
    texts: int = Field(12, ge=0, le=200)
    seed: int = Field(0, ge=0)
