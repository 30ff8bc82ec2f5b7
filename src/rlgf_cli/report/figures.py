"""The plots of a report, by their places in it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rlgf_cli.errors import UserError
from rlgf_cli.report import paths, plots, tables, texts
from rlgf_cli.report.draw import Plot
from rlgf_cli.report.paths import Estimate, Point
from rlgf_cli.report.plots import Distribution, IntervalRow, StyledSystem
from rlgf_cli.report.systems import Level, measures, score_figure, watched_figure

_DETAIL_POINTS = 1200
DETAILS: dict[str, dict[str, str]] = {
    "Distance and entropy": {
        "kl/episode": "KL per episode (nats)",
        "kl/mean": "KL per policy token (nats)",
        "kl/coef": "KL coefficient",
        "policy/entropy": "entropy (nats per token)",
    },
    "Updates": {
        "ppo/clip_fraction": "share of clipped tokens",
        "ppo/approx_kl": "KL of old and new policy (nats)",
        "loss/policy": "policy loss",
        "loss/likelihood": "negative log-likelihood (nats)",
        "update/grad_norm": "gradient norm",
        "lr": "learning rate",
    },
    "Critics": {
        "value/explained_policy": "variance explained, policy's critic",
        "value/explained_guide": "variance explained, guide's critic",
        "loss/value_policy": "value loss, policy's critic",
        "loss/value_guide": "value loss, guide's critic",
    },
    "Lengths and roll-ins": {
        "length/mean": "tokens per episode",
        "eval/length": "words per held-out text",
        "length/truncated": "share of episodes cut at the limit",
        "rollin/share": "share of episodes with a roll-in",
        "rollin/tokens": "tokens per roll-in",
    },
    "Guide": {
        "guide/requests": "texts requested per step",
        "guide/reuse": "uses per distinct text",
        "guide/gated": "episodes gated",
        "guide/failed": "texts refused per step",
        "guide/calls": "calls charged so far",
        "guide/usd": "US dollars charged so far",
    },
}
"""Figures of metrics.jsonl below the main ones, by heading, with the labels of their axes."""


_SEEDS = "of several seeds: their mean, from the lowest to the highest"


@dataclass(frozen=True)
class ReportPlots:
    """The plots of a page by their places; None, or no heading, where there is nothing to show."""

    held_out: Plot | None
    watched: Plot | None
    training: Plot | None
    kl: Plot | None
    authors: Plot | None
    evaluation: Plot | None
    against: Plot | None
    scores: Plot | None
    words: Plot | None
    details: dict[str, list[Plot]]

    @property
    def all(self) -> list[Plot]:
        learning = [self.held_out, self.watched, self.training, self.kl, self.authors]
        first = [*learning, self.evaluation, self.against, self.scores, self.words]
        return [plot for plot in [*first, *itertools.chain(*self.details.values())] if plot is not None]


def report_plots(
    systems: Sequence[StyledSystem],
    levels: Sequence[Level],
    rows: Sequence[tables.EvaluationRow],
    main: str | None,
    against: str | None = None,
) -> ReportPlots:
    """Draw every plot that there are data for. ``main`` is the figure of the evaluations that comes first, ``against``
    the one that it is drawn against (None: none).
    """
    held_out = plots.learning("held-out", "Held-out score", systems, "eval/score", what="held-out score", levels=levels)
    training = plots.learning("training", "Training score", systems, "score/mean", what="score of the episodes")
    score = ("eval/score", "held-out score") if held_out is not None else ("score/mean", "score of the episodes")
    details = {}
    for heading, labels in DETAILS.items():
        drawn = [
            plots.learning(figure.replace("/", "-"), figure, systems, figure, what=label, points=_DETAIL_POINTS)
            for figure, label in labels.items()
        ]
        details[heading] = [plot for plot in drawn if plot is not None]
    details["Time"] = [plot for plot in [plots.time_parts(systems)] if plot is not None]
    scores, words = _histograms(systems, rows, main)
    return ReportPlots(
        held_out,
        _against_watched(systems, rows),
        training,
        paths.against_kl(systems, figure=score[0], kl="kl/episode", what=score[1]),
        plots.learning("authors", "Who writes", systems, "tokens/policy", what="share of tokens by the policy"),
        _intervals(rows, main),
        _against_figure(rows, main, against),
        scores,
        words,
        {heading: drawn for heading, drawn in details.items() if drawn},
    )


def _against_watched(systems: Sequence[StyledSystem], rows: Sequence[tables.EvaluationRow]) -> Plot | None:
    """The held-out score against the watched figure: of the first system that has both, and of those with the same
    reward and watched figure; the other systems that have both are named, and neither path nor point. Rows of systems
    without a path are points, where their evaluations have the two figures."""
    runs = [(s, run) for s in systems for run in s.system.trained if paths.watched_path(run) is not None]
    if not runs:
        return None
    run = runs[0][1]
    alike = [s for s in systems if any(s is of and measures(other) == measures(run) for of, other in runs)]
    points, kinds = [], set()
    for row in rows:
        figures = [(score_figure(run, e), watched_figure(run, e)) for e in row.evaluations]
        x, y = figures[0]
        if x is None or y is None or len(set(figures)) > 1 or row.look in [s.look for s, _ in runs]:
            continue
        points.append(_point(row, x, y))
        kinds |= {_bounds(row, figure)[1] for figure in (x, y)}
    notes = ""
    if points:
        notes = f" Single points: evaluations by rlgf eval. {_bars(kinds)}"
    if others := dict.fromkeys(s.name for s, _ in runs if s not in alike):
        notes += f" Not shown, for their reward or their watched figure is another one: {', '.join(others)}."
    watch = run.values.get("watch") or {}
    score = tables.short(run.values.get("reward")) or "the score"
    watched = str(watch.get("figure") or watch.get("name") or "another figure")
    return paths.against_watched(alike, points, score=score, watched=watched, notes=notes)


def _against_figure(rows: Sequence[tables.EvaluationRow], x: str | None, y: str | None) -> Plot | None:
    """Figure ``y`` against ``x``, a point per row that has both."""
    if x is None or y is None:
        return None
    shown = [row for row in rows if row.value(x) is not None and row.value(y) is not None]
    if not shown:
        raise UserError(
            f"no evaluation has both {x!r} and {y!r}", hint="evaluate with both metrics, or leave --against out"
        )
    kinds = {_bounds(row, figure)[1] for row in shown for figure in (x, y)}
    caption = f"{y} (up) and {x} (to the right) of rlgf eval. {_bars(kinds)}"
    return paths.against_figure([_point(row, x, y) for row in shown], x=x, y=y, caption=caption)


def _point(row: tables.EvaluationRow, x: str, y: str) -> Point:
    """A row whose evaluations all have both figures."""
    seeds = list(zip(row.values(x), row.values(y), strict=True))
    return Point(row.label, row.look, _bounds(row, x)[0], _bounds(row, y)[0], seeds if len(seeds) > 1 else ())


def _bars(kinds: Collection[str]) -> str:
    return f"Bars: {'; '.join(sorted(kinds))}.{' Small marks: the seeds.' if _SEEDS in kinds else ''}"


def _bounds(row: tables.EvaluationRow, figure: str) -> tuple[Estimate, str]:
    """A figure that all evaluations of a row have, with its interval (of several seeds from the lowest to the highest),
    and what kind of interval it is."""
    entries = [evaluation.figures[figure] for evaluation in row.evaluations]
    values = row.values(figure)
    mean = math.fsum(values) / len(values)
    if len(entries) > 1:
        return Estimate(mean, min(values), max(values)), _SEEDS
    level = (row.evaluations[0].about.get("interval") or {}).get("level")
    method = entries[0].get("method")
    kind = f"interval, {method}" if method else "bootstrap interval over prompts"
    kind = f"{100 * level:g} % {kind}" if level else "interval as in scores.json"
    return Estimate(mean, entries[0].get("low"), entries[0].get("high")), kind


def _intervals(rows: Sequence[tables.EvaluationRow], main: str | None) -> Plot | None:
    """The main figure of every row with its interval; of several seeds with the lowest and highest seed."""
    if main is None:
        return None
    bounds = [(row, *_bounds(row, main)) for row in rows if row.value(main) is not None]
    if not bounds:
        return None
    kinds = sorted({kind for _, _, kind in bounds})
    intervals = [IntervalRow(row.label, row.look, *estimate) for row, estimate, _ in bounds]
    return plots.intervals(intervals, main, f"{main} of rlgf eval. Bars: {'; '.join(kinds)}.")


def _histograms(
    systems: Sequence[StyledSystem], rows: Sequence[tables.EvaluationRow], main: str | None
) -> tuple[Plot | None, Plot | None]:
    """Scores and lengths of the evaluated texts, or, without an evaluation, scores of the last rollouts."""
    scores = [
        Distribution(row.label, row.look, [v for e in row.evaluations for v in e.values(main)]) for row in rows if main
    ]
    words = [
        Distribution(row.label, row.look, [len(text.split()) for e in row.evaluations for text in e.texts.values()])
        for row in rows
    ]
    what, whose = main or "", "evaluated texts, of all seeds together"
    if not any(row.values for row in scores):
        what, whose = "score", "episodes of the last saved rollouts (a few per run)"
        scores = [
            Distribution(s.system.label, s.look, [v for run in s.system.trained for v in texts.rollout_scores(run)])
            for s in systems
        ]
    caption = f"Shares of the {whose}; the triangle is the mean. All rows have the same scale."
    return (
        plots.histograms("scores", f"Scores: {what}", scores, what, caption),
        plots.histograms("words", "Lengths", words, "words per text", caption),
    )
