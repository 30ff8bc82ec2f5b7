"""The plots of a report, by their places in it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from rlgf_cli.report import plots, tables, texts
from rlgf_cli.report.draw import Plot
from rlgf_cli.report.plots import Distribution, IntervalRow, StyledSystem
from rlgf_cli.report.systems import Level

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


@dataclass(frozen=True)
class ReportPlots:
    """The plots of a page by their places; None, or no heading, where there is nothing to show."""

    held_out: Plot | None
    training: Plot | None
    kl: Plot | None
    authors: Plot | None
    evaluation: Plot | None
    scores: Plot | None
    words: Plot | None
    details: dict[str, list[Plot]]

    @property
    def all(self) -> list[Plot]:
        first = [self.held_out, self.training, self.kl, self.authors, self.evaluation, self.scores, self.words]
        return [plot for plot in [*first, *itertools.chain(*self.details.values())] if plot is not None]


def report_plots(
    systems: Sequence[StyledSystem], levels: Sequence[Level], rows: Sequence[tables.EvaluationRow], main: str | None
) -> ReportPlots:
    """Draw every plot that there are data for."""
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
        training,
        plots.against_kl(systems, figure=score[0], kl="kl/episode", what=score[1]),
        plots.learning("authors", "Who writes", systems, "tokens/policy", what="share of tokens by the policy"),
        _intervals(rows, main),
        scores,
        words,
        {heading: drawn for heading, drawn in details.items() if drawn},
    )


def _intervals(rows: Sequence[tables.EvaluationRow], main: str | None) -> Plot | None:
    """The main figure of every row with its interval; of several seeds with the lowest and highest seed."""
    intervals = []
    kinds = set()
    for row in rows:
        if main is None or (value := row.value(main)) is None:
            continue
        entries = [evaluation.figures[main] for evaluation in row.evaluations]
        if len(entries) > 1:
            low, high = min(e["value"] for e in entries), max(e["value"] for e in entries)
            kinds.add("of several seeds: their mean, from the lowest to the highest")
        else:
            low, high = entries[0].get("low"), entries[0].get("high")
            level = (row.evaluations[0].about.get("interval") or {}).get("level")
            method = entries[0].get("method")
            kind = f"interval, {method}" if method else "bootstrap interval over prompts"
            kinds.add(f"{100 * level:g} % {kind}" if level else "interval as in scores.json")
        intervals.append(IntervalRow(row.label, row.look, value, low, high))
    if main is None or not intervals:
        return None
    return plots.intervals(intervals, main, f"{main} of rlgf eval. Bars: {'; '.join(sorted(kinds))}.")


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
