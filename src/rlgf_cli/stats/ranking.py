"""ROC measures of scores that separate good texts from bad ones, and calibration of probabilities. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

BINS = 10
"""Bins of equal width between 0 and 1, in which probabilities are compared with observed shares."""
_ROUNDING = 1e-9
"""A product that should be a whole number of texts may lie below it: 0.29 * 100 is 28.999999999999996."""


def auc(positive: np.ndarray, negative: np.ndarray) -> float | None:
    """The probability that a positive scores above a negative, both drawn at random; ties count half.

    positive [P], negative [N]; None where either is empty. This is the area under the ROC curve: the Mann-Whitney U
    over P * N (Hanley and McNeil 1982).
    """
    if not len(positive) or not len(negative):
        return None
    return float(_twice_wins(positive, negative).sum() / (2 * len(positive) * len(negative)))


def _twice_wins(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each score [P] twice the number of ``others`` [N] below it, and once that of the ties."""
    others = np.sort(others)
    return np.asarray(np.searchsorted(others, scores, "left") + np.searchsorted(others, scores, "right"))


def auc_interval(positive: np.ndarray, negative: np.ndarray, level: float) -> tuple[float, float]:
    """Bounds of ``auc`` where positive [P] and negative [N] are both samples; P and N are at least 2.

    The variance is that of DeLong et al. (1988): of the placements, which are for a positive the share of negatives
    below it and for a negative the share of positives above it, ties half. A Wald interval with it is far too narrow
    near 1, and has no width at 1. Wilson's (1927) interval has neither fault; its number of trials is the one that
    gives a proportion this variance: AUC (1 - AUC) / variance. That is at most 3PN / (P + N), the number for two
    samples of one distribution (a variance of few placements near 1 is too small by chance), and min(P, N) where the
    placements do not vary at all, which is the largest true variance (Birnbaum and Klose 1957). docs/evaluation.md has
    the measured coverage.
    """
    p, n = len(positive), len(negative)
    if min(p, n) < 2:
        raise ValueError(f"two scores of each side are needed, not {p} and {n}")
    value = auc(positive, negative)
    assert value is not None
    # whole numbers as long as possible: equal placements must have a variance of exactly 0
    variance = float(
        _twice_wins(positive, negative).var(ddof=1) / (4 * p * n**2)
        + _twice_wins(-negative, -positive).var(ddof=1) / (4 * n * p**2)
    )
    trials = min(value * (1 - value) / variance, 3 * p * n / (p + n)) if variance > 0 else min(p, n)
    z2 = stats.norm.ppf((1 + level) / 2) ** 2
    middle = (value + z2 / (2 * trials)) / (1 + z2 / trials)
    half = np.sqrt(z2 * (value * (1 - value) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    return float(max(min(middle - half, value), 0.0)), float(min(max(middle + half, value), 1.0))  # against rounding


def true_positive_rate(positive: np.ndarray, negative: np.ndarray, false_positive_rate: float) -> float:
    """The largest share of positives [P] above a threshold with at most ``false_positive_rate`` of the negatives [N]
    above it: none of them where there are fewer than 1 / ``false_positive_rate``.
    """
    threshold = np.sort(negative)[::-1][int(false_positive_rate * len(negative) + _ROUNDING)]
    return float((positive > threshold).mean())


def true_positive_rate_interval(
    positive: np.ndarray, negative: np.ndarray, false_positive_rate: float, level: float
) -> tuple[float, float]:
    """Bounds of :func:`true_positive_rate` that hold at ``level`` at least, whatever the distributions and sizes.

    The threshold lies with high probability between two order statistics of the negatives (binomial), and the share of
    positives above either has Clopper and Pearson's (1934) bound; each of the four errors has a quarter of
    ``1 - level``. Where no negative is above the threshold with that probability, the lower bound is 0.
    """
    tail, p, n = (1 - level) / 4, len(positive), len(negative)
    ordered = np.sort(negative)[::-1]
    ranks = np.arange(n)
    surely_above = np.flatnonzero(stats.binom.cdf(ranks, n, false_positive_rate) <= tail)
    surely_below = np.flatnonzero(stats.binom.sf(ranks, n, false_positive_rate) <= tail)
    few = int((positive > ordered[surely_above[-1]]).sum()) if len(surely_above) else 0
    many = int((positive > ordered[surely_below[0]]).sum()) if len(surely_below) else p
    low = float(stats.beta.ppf(tail, few, p - few + 1)) if few else 0.0
    high = float(stats.beta.ppf(1 - tail, many + 1, p - many)) if many < p else 1.0
    return low, high


def length_matched_auc(
    positive: np.ndarray, positive_words: np.ndarray, negative: np.ndarray, negative_words: np.ndarray
) -> tuple[float | None, int]:
    """``auc`` over the pairs whose word counts differ by at most 10 % of the longer one, and the number of these pairs.

    Scores [P] and [N] with their whole word counts [P] and [N]; None where no pair matches.
    """
    order = np.argsort(negative_words, kind="stable")
    negative, negative_words = negative[order], negative_words[order]
    # in whole numbers: 10 |p - n| <= max(p, n) means 9p <= 10n and 9n <= 10p
    first = np.searchsorted(negative_words, -(-9 * positive_words // 10), "left")
    last = np.searchsorted(negative_words, 10 * positive_words // 9, "right")
    wins, pairs = 0.0, 0
    for score, start, end in zip(positive, first, last, strict=True):
        others = negative[start:end]
        wins += float((others < score).sum()) + 0.5 * float((others == score).sum())
        pairs += len(others)
    return (wins / pairs if pairs else None), pairs


def equal_error_threshold(good: np.ndarray, bad: np.ndarray) -> float | None:
    """The threshold at which the share of good scores [G] below it equals the share of bad ones [B] above it.

    It is the midpoint between neighbouring scores at which the two shares are nearest to each other; of several, the
    one with the smallest sum of shares, then the lowest. Scores that are separated have it in the middle of the gap.
    None where one of the two is empty, or all scores are equal.
    """
    levels = np.unique(np.concatenate([good, bad]))
    if not len(good) or not len(bad) or len(levels) < 2:
        return None
    middle = levels[:-1] + np.diff(levels) / 2
    false_alarms = np.searchsorted(np.sort(good), middle, "left") / len(good)
    missed = 1 - np.searchsorted(np.sort(bad), middle, "left") / len(bad)
    best = np.lexsort((middle, (false_alarms + missed).round(12), np.abs(false_alarms - missed).round(12)))[0]
    return float(middle[best])


def calibration(probability: np.ndarray, truth: np.ndarray) -> list[dict[str, Any]]:
    """Per bin of probability: ``low``, ``high``, ``n``, the mean ``probability`` and the ``observed`` share of 1.

    probability [N] in [0, 1], truth [N] of 0 and 1. A bin contains its lower edge, the last one both edges; the two
    means of an empty bin are None.
    """
    bin_of = np.minimum((probability * BINS).astype(int), BINS - 1)
    bins = []
    for i in range(BINS):
        inside = bin_of == i
        n = int(inside.sum())
        mean = float(probability[inside].mean()) if n else None
        share = float(truth[inside].mean()) if n else None
        bins.append({"low": i / BINS, "high": (i + 1) / BINS, "n": n, "probability": mean, "observed": share})
    return bins


def expected_calibration_error(bins: Sequence[dict[str, Any]]) -> float:
    """Sum over bins of n / N * |mean probability - observed share| (Naeini et al. 2015; Guo et al. 2017, eq. 3)."""
    total = sum(b["n"] for b in bins)
    return sum(b["n"] * abs(b["probability"] - b["observed"]) for b in bins if b["n"]) / total


def brier_score(probability: np.ndarray, truth: np.ndarray) -> float:
    """The mean of (probability - truth) squared (Brier 1950, for two outcomes). [N], [N] of 0 and 1."""
    return float(((probability - truth) ** 2).mean())


def good_odds(logits: np.ndarray) -> np.ndarray:
    """Log odds [N] of the last label, from logits [N, C]."""
    logits = logits.astype(np.float64)
    return np.asarray(logits[:, -1] - np.logaddexp.reduce(logits[:, :-1], axis=1))


def good_probability(logits: np.ndarray) -> np.ndarray:
    """The probability [N] of the last label, from logits [N, C]."""
    return np.asarray(np.exp(-np.logaddexp(0, -good_odds(logits))))


def predicted_labels(logits: np.ndarray, threshold: float) -> np.ndarray:
    """The predicted labels [N] from logits [N, C]: the last label, which is "good", where its probability reaches the
    threshold; else the most probable of the others.
    """
    return np.where(good_probability(logits) < threshold, logits[:, :-1].argmax(1), logits.shape[1] - 1)
