"""The HTML page of a report: its data, for the template, and the formats of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2

from rlgf_cli import __version__
from rlgf_cli.config.report import ReportConfig
from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.report import figures, tables, texts
from rlgf_cli.report.draw import DARK, LIGHT, Look, Plot
from rlgf_cli.report.plots import StyledSystem
from rlgf_cli.report.read import Evaluation, evaluation_of
from rlgf_cli.report.systems import (
    FEW_SEEDS,
    Level,
    System,
    curves_of,
    guide_level,
    passing_step,
    score_figure,
    start_level,
)

HELD_OUT, TRAINING = "eval/score", "score/mean"
_MARKS = {
    "o": "M14 2a4 4 0 1 0 .01 0z", "s": "M10 2h8v8h-8z", "^": "M14 1l5 9h-10z", "D": "M14 1l5 5-5 5-5-5z",
    "v": "M14 11l5-9h-10z", "P": "M12 1h4v3h3v4h-3v3h-4v-3h-3v-4h3z",
    "X": "M10 1l4 3 4-3 1 2-3 3 3 3-1 2-4-3-4 3-1-2 3-3-3-3z",
    "*": "M14 0l1.6 4h4.2l-3.4 2.6 1.3 4.2-3.7-2.6-3.7 2.6 1.3-4.2-3.4-2.6h4.2z",
}  # fmt: skip


@dataclass
class Sources:
    """The inputs of a report. ``guide_file`` and ``guide``: the texts or the evaluation that ``--guide`` names."""

    systems: list[System]
    config: ReportConfig
    comparison: tables.Compared | None = None
    guide_file: Path | None = None
    guide: Evaluation | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Levels:
    """The levels that curves are compared with: a guide's and a start's, by the systems' labels."""

    guides: Mapping[str, Level]
    starts: Mapping[str, Level]
    systems: Sequence[System]

    @property
    def all(self) -> list[Level]:
        """The distinct levels. A level that is not the only one of its kind, or the start of some trainings only, has
        the name of its system in the report, or of its folder, besides.
        """
        labels = {e.folder.resolve(): system.label for system in self.systems for e in system.first.evaluations}
        trained = [system for system in self.systems if system.trained]
        named = []
        for kind, levels in (("guide", self.guides), ("start", self.starts)):
            distinct = _distinct(levels)
            common = len(distinct) == 1 and (kind == "guide" or len(levels) == len(trained))
            for level in distinct:
                name = labels.get(level.evaluation.folder.resolve()) or _run_name(level.evaluation)
                named.append(replace(level, name=kind if common or name == kind else f"{kind}: {name}"))
        return named


def _distinct(levels: Mapping[str, Level]) -> list[Level]:
    """The levels of different folders."""
    return list({level.evaluation.folder.resolve(): level for level in levels.values()}.values())


def levels(systems: Sequence[System], guide: Evaluation | None) -> Levels:
    """The levels of every trained system. A system without a guide has the report's guide where there is only one."""
    guides: dict[str, Level] = {}
    starts: dict[str, Level] = {}
    others = [run for system in systems for run in system.runs]
    for system in systems:
        for run in system.trained[:1]:
            figure = score_figure(run, guide) if guide is not None else None
            level = Level("guide", guide, figure) if guide is not None and figure else guide_level(run)
            if level is not None:
                guides[system.label] = level
            if (start := start_level(run, others)) is not None:
                starts[system.label] = start
    if len(distinct := _distinct(guides)) == 1:
        for system in systems:
            if system.trained:
                guides.setdefault(system.label, distinct[0])
    return Levels(guides, starts, systems)


@dataclass(frozen=True)
class Page:
    """The HTML of a report, and its plots."""

    html: str
    plots: Sequence[Plot]


def build(sources: Sources) -> Page:
    """Draw the plots and render the page."""
    config, systems = sources.config, sources.systems
    styled = [StyledSystem(system, Look.of(i)) for i, system in enumerate(systems)]
    of = levels(systems, sources.guide)
    rows = tables.evaluation_rows([(s.system, s.look) for s in styled])
    rows += _level_rows(rows, of)
    columns = tables.columns(rows)
    known = [column.figure for column in columns]
    main = _main_figure(config, systems, rows, known)
    columns.sort(key=lambda column: column.figure != main)
    drawn = figures.report_plots(styled, of.all, rows, main, _against(config, main, known))
    prompts, common = _prompts(sources, rows, main)
    trained = [system for system in systems if system.trained]
    samples = [(s, texts.samples(s.system.trained[0])) for s in styled if s.system.trained]
    shared = _shared(trained or systems)
    view: dict[str, Any] = {
        "title": config.title or _title(systems),
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "light": LIGHT,
        "dark": DARK,
        "marks": _MARKS,
        "overview": [_overview(s, of, main, shared) for s in styled],
        "shared": shared,
        "levels": of.all,
        "guides": bool(of.guides),
        "held_out": HELD_OUT,
        "drawn": drawn,
        "rows": rows,
        "columns": columns,
        "main": main,
        "data_notes": tables.data_notes(rows),
        "comparison": sources.comparison,
        "prompts": prompts,
        "common": common,
        "config": config,
        "samples": samples,
        "opened": next((s.system.label for s, steps in samples if texts.guided(steps)), None),
        "spend": _spend(systems),
        "differing": tables.differing(trained) if len(trained) > 1 else [],
        "trained": trained,
        "configs": [(s, tables.config_rows(s.system.first)) for s in styled if s.system.first.values],
        "environment": tables.environment([run for system in systems for run in system.runs]),
        "warned": [
            (system, run, warnings)
            for system in systems
            for run in system.runs
            if (warnings := tables.warnings_of(run))
        ],
        "notes": [*sources.notes, *_notes(systems)],
        "few_seeds": FEW_SEEDS,
    }
    return Page(_environment().get_template("template.html").render(view), drawn.all)


def _environment() -> jinja2.Environment:
    """The template's environment: everything but the plots is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rlgf_cli.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, moment=moment, signed=lambda v: number(v, signed=True), p=p_value)
    environment.filters.update(brief=brief, visible=texts.visible, duration=duration, count=count)
    return environment


def number(value: float | None, *, signed: bool = False) -> str:
    """Three decimals, from 100 on one; a dash for None."""
    if value is None:
        return "–"
    digits = 1 if abs(value) >= 100 else 3
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def p_value(value: float | None) -> str:
    """Four decimals, never 0."""
    return "–" if value is None else "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def count(value: float | None) -> str:
    """A whole number with separators; a dash for None."""
    return "–" if value is None else f"{value:,.0f}"


def brief(path: str) -> str:
    """The end of a long path; other texts as they are."""
    head, _, name = path.rpartition("/")
    return path if len(path) <= 16 or not head else f"…/{name}"


def moment(text: str | None) -> str:
    """A time of a manifest without the ISO marks."""
    return "–" if not text else text.replace("T", " ").replace("+00:00", " UTC")


def duration(seconds: float | None) -> str:
    """Hours, minutes, seconds."""
    if not seconds:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _title(systems: Sequence[System]) -> str:
    names = [texts.visible(system.label) for system in systems]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _run_name(evaluation: Evaluation) -> str:
    return evaluation.folder.parent.name if evaluation.name == "eval" else evaluation.name


def _level_rows(rows: Sequence[tables.EvaluationRow], of: Levels) -> list[tables.EvaluationRow]:
    """Rows for the levels' evaluations that no row has yet."""
    present = {evaluation.folder.resolve() for row in rows for evaluation in row.evaluations}
    looks = {"guide": Look("guide", "D", "-"), "start": Look("start", "s", "-")}
    return [
        tables.EvaluationRow(level.name, looks[level.name.partition(":")[0]], [level.evaluation], given=False)
        for level in of.all
        if level.evaluation.folder.resolve() not in present
    ]


def _main_figure(
    config: ReportConfig, systems: Sequence[System], rows: Sequence[tables.EvaluationRow], known: Sequence[str]
) -> str | None:
    """The figure that is shown first."""
    if config.score is not None:
        if config.score not in known:
            raise UserError(f"no evaluation has the figure {config.score!r}", hint=did_you_mean(config.score, known))
        return config.score
    for run in (run for system in systems for run in system.trained):
        for evaluation in (evaluation for row in rows for evaluation in row.evaluations):
            if (figure := score_figure(run, evaluation)) is not None:
                return figure
    return known[0] if known else None


def _against(config: ReportConfig, main: str | None, known: Sequence[str]) -> str | None:
    """The figure that the main one is drawn against."""
    against = config.against
    if against is not None and against not in known:
        raise UserError(f"no evaluation has the figure {against!r}", hint=did_you_mean(against, known))
    if against is not None and against == main:
        hint = "--score and --against take two figures of the evaluations"
        raise UserError(f"{against!r} would be drawn against itself", hint=hint)
    return against


def _shared(systems: Sequence[System]) -> list[tuple[str, str]]:
    """The facts that all systems have in common."""
    facts = [tables.about(system) for system in systems]
    return [pair for pair in facts[0] if all(pair in other for other in facts)]


def _overview(styled: StyledSystem, of: Levels, main: str | None, shared: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A system's row of the first table; the template reads its runs."""
    system = styled.system
    guide = of.guides.get(system.label)
    held_out = curves_of(system, HELD_OUT)
    evaluations = [run.evaluation for run in system.runs if run.evaluation is not None]
    evaluated = [e.figures[main]["value"] for e in evaluations if main is not None and main in e.figures]
    return {
        "styled": styled,
        "about": [pair for pair in tables.about(system) if pair not in shared],
        "runs": system.runs,
        "last": [float(curve.values[-1]) for curve in held_out],
        "evaluated": math.fsum(evaluated) / len(evaluated) if evaluated else None,
        "guide": guide,
        "passes": [passing_step(curve, guide.value) for curve in held_out] if guide is not None else None,
    }


def _prompts(
    sources: Sources, rows: Sequence[tables.EvaluationRow], main: str | None
) -> tuple[list[texts.Prompt], int]:
    shown = [texts.TextRow(row.label, row.look, row.evaluations[0]) for row in rows if row.evaluations[0].texts]
    guide: dict[str, str] = {}
    if sources.guide_file is not None and shown:
        guide = texts.guide_texts(sources.guide_file, shown[0].evaluation.records)
        if not guide:
            sources.notes.append(f"{sources.guide_file} has no text for any of the evaluated prompts.")
    config = sources.config
    prompts, common = texts.side_by_side(shown, guide, figure=main, count=config.texts, seed=config.seed)
    if len(shown) > 1 and not common:
        sources.notes.append("The evaluations have no prompt in common, so no texts stand side by side.")
    return prompts, common


def _spend(systems: Sequence[System]) -> list[tuple[str, Any, dict[str, Any]]]:
    rows: list[tuple[str, Any, dict[str, Any]]] = []
    files: dict[str, dict[str, Any]] = {}
    for system in systems:
        for run in system.trained:
            rows.append((system.label, run.seed, tables.spend(run)))
            files |= tables.guide_file_spend(run)
    return rows + [(f"{path} (collect-guide)", None, spent) for path, spent in files.items()]


def _notes(systems: Sequence[System]) -> list[str]:
    notes = []
    for system in systems:
        if keys := tables.unlike_seeds(system):
            notes.append(
                f"The runs of {system.label} differ in more than their seed: {', '.join(keys)}. "
                "They share a label, so they are shown as seeds of one system."
            )
        steps = {run.step for run in system.trained}
        if len(steps) > 1:
            notes.append(
                f"The runs of {system.label} have come to different steps ({', '.join(map(str, sorted(steps)))}); "
                "their mean ends with the shortest."
            )
        if len({run.seed for run in system.trained}) < len(system.trained):
            notes.append(f"Two runs of {system.label} have the same seed.")
    return notes


def guide_sources(name: str) -> tuple[Evaluation | None, Path | None]:
    """The evaluation in the folder that ``--guide`` names, or the file of texts."""
    path = Path(name)
    if path.is_dir():
        if (evaluation := evaluation_of(path)) is None:
            raise UserError(
                "there is no evaluation in it", where=name, hint="run `rlgf eval` on it first, or name a guide.jsonl"
            )
        return evaluation, None
    if not path.is_file():
        raise UserError("no such file or folder", where=name, hint="--guide takes a guide.jsonl or an evaluated folder")
    return None, path
