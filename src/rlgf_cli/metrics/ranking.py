"""How well scores tell good texts from bad ones, and how far probabilities can be believed. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

BINS = 10
"""Bins of equal width between 0 and 1 in which probabilities are compared with what was observed."""


def auc(positive: np.ndarray, negative: np.ndarray) -> float | None:
    """The probability that a positive scores above a negative, both drawn at random; ties count half.

    positive [P], negative [N]; None where either is empty. This is the area under the ROC curve: the Mann-Whitney U
    over P * N (Hanley and McNeil 1982).
    """
    if not len(positive) or not len(negative):
        return None
    negative = np.sort(negative)
    below = np.searchsorted(negative, positive, "left")
    not_above = np.searchsorted(negative, positive, "right")
    return float((below + not_above).sum() / (2 * len(positive) * len(negative)))


def length_matched_auc(
    positive: np.ndarray, positive_words: np.ndarray, negative: np.ndarray, negative_words: np.ndarray
) -> tuple[float | None, int]:
    """``auc`` over the pairs whose word counts differ by at most 10 % of the longer one, and how many they are.

    Scores [P] and [N] with their whole word counts [P] and [N]; None where no pair matches.
    """
    order = np.argsort(negative_words, kind="stable")
    negative, negative_words = negative[order], negative_words[order]
    # in whole numbers: 10 |p - n| <= max(p, n) means 9p <= 10n and 9n <= 10p
    first = np.searchsorted(negative_words, -(-9 * positive_words // 10), "left")
    last = np.searchsorted(negative_words, 10 * positive_words // 9, "right")
    won, pairs = 0.0, 0
    for score, start, end in zip(positive, first, last, strict=True):
        others = negative[start:end]
        won += float((others < score).sum()) + 0.5 * float((others == score).sum())
        pairs += len(others)
    return (won / pairs if pairs else None), pairs


def equal_error_threshold(good: np.ndarray, bad: np.ndarray) -> float | None:
    """The threshold at which as large a share of the good scores [G] lies below as of the bad ones [B] does not.

    Of the midpoints between neighbouring scores it is the one where the two shares are nearest to each other; of two
    such, the one with the smaller sum of both, then the lower one. Where the scores are apart it lies in the middle of
    the gap. None where there is nothing to tell apart: one of the two is empty, or all scores are equal.
    """
    levels = np.unique(np.concatenate([good, bad]))
    if not len(good) or not len(bad) or len(levels) < 2:
        return None
    middle = levels[:-1] + np.diff(levels) / 2
    false_alarms = np.searchsorted(np.sort(good), middle, "left") / len(good)
    missed = 1 - np.searchsorted(np.sort(bad), middle, "left") / len(bad)
    best = np.lexsort((middle, false_alarms + missed, np.abs(false_alarms - missed).round(12)))[0]
    return float(middle[best])


def calibration(probability: np.ndarray, truth: np.ndarray) -> list[dict[str, Any]]:
    """Per bin of probability: ``low``, ``high``, ``n``, the mean ``probability`` and the ``observed`` share.

    probability [N] in [0, 1], truth [N] of 0 and 1. A bin holds its lower edge, the last one both; the two means of
    an empty bin are None.
    """
    place = np.minimum((probability * BINS).astype(int), BINS - 1)
    bins = []
    for i in range(BINS):
        inside = place == i
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
