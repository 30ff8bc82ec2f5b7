"""Which plots a report has, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlgf_cli.report import plots, tables, texts
from rlgf_cli.report.draw import Look, Plot
from rlgf_cli.report.plots import Styled
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
        "guide/requests": "texts asked per step",
        "guide/reuse": "uses per distinct text",
        "guide/gated": "episodes gated",
        "guide/failed": "texts refused per step",
        "guide/calls": "calls charged so far",
        "guide/usd": "US dollars charged so far",
    },
}
"""Figures of metrics.jsonl below the main ones, by heading, with the words on their axis."""


@dataclass(frozen=True)
class Drawn:
    """The plots of a page by where they stand; None, or not there, where nothing is to be shown."""

    held_out: Plot | None
    training: Plot | None
    kl: Plot | None
    authors: Plot | None
    evaluation: Plot | None
    scores: Plot | None
    words: Plot | None
    details: dict[str, list[Plot]]

    @property
    def plots(self) -> list[Plot]:
        first = [self.held_out, self.training, self.kl, self.authors, self.evaluation, self.scores, self.words]
        return [p for p in [*first, *(p for group in self.details.values() for p in group)] if p is not None]


def drawn(styled: Sequence[Styled], levels: Sequence[Level], rows: Sequence[tables.Scored], main: str | None) -> Drawn:
    """Draw what there is something for."""
    held_out = plots.learning("held-out", "Held-out score", styled, "eval/score", what="held-out score", levels=levels)
    training = plots.learning("training", "Training score", styled, "score/mean", what="score of the episodes")
    score = ("eval/score", "held-out score") if held_out is not None else ("score/mean", "score of the episodes")
    details = {
        heading: [
            made
            for figure, what in group.items()
            if (
                made := plots.learning(
                    figure.replace("/", "-"), figure, styled, figure, what=what, points=_DETAIL_POINTS
                )
            )
        ]
        for heading, group in DETAILS.items()
    }
    if (time := plots.time_parts(styled)) is not None:
        details["Time"] = [time]
    scores, words = _histograms(styled, rows, main)
    return Drawn(
        held_out,
        training,
        plots.against_kl(styled, figure=score[0], kl="kl/episode", what=score[1]),
        plots.learning("authors", "Who writes", styled, "tokens/policy", what="share of tokens by the policy"),
        _intervals(rows, main),
        scores,
        words,
        {heading: found for heading, found in details.items() if found},
    )


def _intervals(rows: Sequence[tables.Scored], main: str | None) -> Plot | None:
    """The main figure of every row; a row of several seeds has its lowest and highest seed."""
    found: list[tuple[str, Look, float, float | None, float | None]] = []
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
            how = entries[0].get("method")
            kind = f"interval, {how}" if how else "bootstrap interval over prompts"
            kinds.add(f"{100 * level:g} % {kind}" if level else "interval as in scores.json")
        found.append((row.label, row.look, value, low, high))
    if main is None or not found:
        return None
    return plots.intervals(found, main, f"{main} of rlgf eval. Bars: {'; '.join(sorted(kinds))}.")


def _histograms(
    styled: Sequence[Styled], rows: Sequence[tables.Scored], main: str | None
) -> tuple[Plot | None, Plot | None]:
    """Scores and lengths of the evaluated texts, or, where nothing was evaluated, scores of the last rollouts."""
    scores, words = [], []
    for row in rows:
        values = [v for evaluation in row.evaluations for v in (evaluation.values(main) if main else [])]
        if values:
            scores.append((row.label, row.look, values))
        lengths = [float(len(text.split())) for e in row.evaluations for text in e.texts.values()]
        if lengths:
            words.append((row.label, row.look, lengths))
    what, whose = main or "", "evaluated texts, of all seeds together"
    if not scores:
        what, whose = "score", "episodes of the last saved rollouts (a few per run)"
        for s in styled:
            if values := [v for run in s.system.trained for v in texts.rollout_scores(run)]:
                scores.append((s.system.label, s.look, values))
    caption = f"Shares of the {whose}; the triangle is the mean. All rows have the same scale."
    return (
        plots.histograms("scores", f"Scores: {what}", scores, what, caption) if scores else None,
        plots.histograms("words", "Lengths", words, "words per text", caption) if words else None,
    )
