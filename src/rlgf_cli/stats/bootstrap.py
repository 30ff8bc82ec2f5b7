"""Percentile bootstrap intervals over prompts: they are valid for other prompts like these, not for other trainings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

Aggregate = Callable[[np.ndarray], np.ndarray]
"""A function of :mod:`.aggregates`: sums of rows [..., k] to figures [...]."""

_NUMBERS_AT_ONCE = 1 << 20  # numbers of a chunk of resamples: some 30 MB whatever n is


class Interval(NamedTuple):
    """A figure and its interval. ``low`` and ``high`` are None for a single row: it has no interval."""

    value: float
    low: float | None
    high: float | None


def interval(
    rows: np.ndarray, aggregate: Aggregate, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """``aggregate(sum of rows)`` for ``rows`` [n, k], and its percentile bootstrap interval (Efron and Tibshirani
    1993, ch. 13).

    Equal n and seed draw equal resamples. The interval is a little narrow for small n: a mean's coverage is that
    of a normal interval with the n-denominator standard deviation. Raises ValueError for rows that are not finite.
    """
    if not np.isfinite(rows).all():
        raise ValueError("a value is not finite")
    value = float(aggregate(rows.sum(axis=0)))
    if len(rows) < 2:
        return Interval(value, None, None)
    return percentile(value, resampled(rows[None], aggregate, resamples=resamples, seed=seed)[0], level)


def percentile(value: float, draws: np.ndarray, level: float) -> Interval:
    """The interval between the quantiles of ``draws`` [resamples] that leave ``1 - level`` outside."""
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def resampled(
    rows: np.ndarray,
    aggregate: Aggregate,
    *,
    resamples: int,
    seed: int,
    progress: Callable[[int], object] = lambda done: None,
) -> np.ndarray:
    """Figures of n prompts drawn with replacement, ``rows`` [v, n, k] to [v, resamples]; the same draws for all v.

    A draw is n counts, and the sums of all systems' rows are one product of matrices with them. ``progress`` is called
    after each chunk with the number of its resamples.
    """
    systems, count, width = rows.shape
    columns = rows.transpose(1, 0, 2).reshape(count, systems * width)
    rng = np.random.default_rng(seed)
    figures = np.empty((systems, resamples))
    for start, size in chunks(resamples, count + systems * width):
        drawn = rng.integers(0, count, size=(size, count))
        drawn += count * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        sums = (counts.astype(np.float64) @ columns).reshape(size, systems, width)
        figures[:, start : start + size] = aggregate(sums).T
        progress(size)
    return figures


def chunks(resamples: int, width: int) -> Iterator[tuple[int, int]]:
    """``(start, size)`` of the resamples of each chunk: the memory does not grow with their number."""
    at_once = max(1, _NUMBERS_AT_ONCE // width)
    for start in range(0, resamples, at_once):
        yield start, min(at_once, resamples - start)
