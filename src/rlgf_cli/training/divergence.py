"""Detection of a policy whose score rises while its quality falls (reward hacking), from two figures of held-out texts.

The figures are the score, and the watched figure (`--watch`), which is not trained on. A held-out result diverges
where, compared with the one with the best watched figure so far,

- the mean of the watched figure is lower, and so it is for more prompts than chance explains, and
- the mean score is higher, and so it is for more prompts than chance explains.

Chance is a sign test over prompts (Dixon and Mood 1946): where a text of now and one of then are equally good, either
is the better one with probability 1/2; ties are left out. The watched figure is compared with the best of the k - 1
results before the k-th one, a selection, so it is tested at ``RISK / (k - 1)`` (Bonferroni): while the watched quality
does not change, a result diverges with probability ``RISK`` at most, whatever the score does. That several must do so
in a row keeps the risk of a whole run below twice that in simulated ones of thirty results (a test holds it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean

RISK = 0.05
FEWEST = 20
"""Held-out prompts below which a run is warned: a fall on 16 of 20 is no finding any more in the tenth evaluation."""


@dataclass(frozen=True)
class HeldOutResult:
    """Held-out texts: the figures of the row, and by prompt id the scores and the watched values."""

    figures: Mapping[str, float]
    scores: Mapping[str, float]
    watched: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Watched:
    """The held-out results so far: their number, how many in a row diverged up to the last one, and
    step, scores and values (by prompt id) of the one with the best watched figure, of equal ones the first."""

    evaluations: int = 0
    streak: int = 0
    step: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def best(self) -> float | None:
        """The best watched figure; None before the first evaluation."""
        return fmean(self.values.values()) if self.values else None


def compare_watched(
    before: Watched, now: HeldOutResult, *, step: int, patience: int
) -> tuple[Watched, dict[str, float]]:
    """Record the evaluation of ``step``: the new state, and the figures for its row.

    ``eval/diverged`` is 1 where ``patience`` evaluations in a row diverged up to this one. Where the watched figure
    skips texts, two evaluations are compared on the prompts for which both have it.
    """
    assert now.watched
    figures = {"eval/watch": fmean(now.watched.values())}
    if skipped := len(now.scores) - len(now.watched):
        figures["eval/watch_skipped"] = float(skipped)
    count = before.evaluations + 1
    if before.best is None:
        return Watched(count, 0, step, dict(now.scores), dict(now.watched)), figures
    lower = Change.between(before.values, now.watched)
    higher = Change.between(before.scores, now.scores)
    diverges = (
        lower.mean < 0
        and higher.mean > 0
        and sign_test(lower.falls, lower.rises) <= RISK / (count - 1)
        and sign_test(higher.rises, higher.falls) <= RISK
    )
    streak = before.streak + 1 if diverges else 0
    figures |= {
        "eval/watch_best_step": before.step,
        "eval/watch_change": lower.mean,
        "eval/score_change": higher.mean,
        "eval/diverged": float(streak >= patience),
    }
    after = replace(before, evaluations=count, streak=streak)
    if lower.mean > 0:
        after = replace(after, step=step, scores=dict(now.scores), values=dict(now.watched))
    return after, figures


@dataclass(frozen=True)
class Change:
    """Paired differences, of the prompts that both sides have: their mean, and how many rise and fall."""

    mean: float
    rises: int
    falls: int

    @classmethod
    def between(cls, before: Mapping[str, float], now: Mapping[str, float]) -> Change:
        differences = [now[key] - before[key] for key in before if key in now]
        mean = fmean(differences) if differences else 0.0
        return cls(mean, sum(1 for d in differences if d > 0), sum(1 for d in differences if d < 0))


def sign_test(hits: int, misses: int) -> float:
    """The probability of ``hits`` or more heads in ``hits + misses`` throws of a fair coin."""
    count = hits + misses
    ways = total = math.comb(count, hits)
    for k in range(hits, count):
        ways = ways * (count - k) // (k + 1)
        total += ways
    return total / 2**count
