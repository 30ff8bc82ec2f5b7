"""Percentile bootstrap intervals. What is resampled are prompts: the interval speaks of other prompts like
these, not of another training run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rlgf_cli.metrics.aggregates import mean

Aggregate = Callable[[np.ndarray], np.ndarray]
"""See ``metrics.aggregates``."""

_DRAWS_AT_ONCE = 1 << 21  # indices drawn at a time: about 32 MB whatever n and resamples are


class Interval(NamedTuple):
    """A figure and its interval. ``low`` and ``high`` are None for a single row: it has no interval."""

    value: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_interval(
    values: Sequence[float] | np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean of ``values`` [n] and its interval: :func:`interval` of rows ``[value, 1]``."""
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data):
        raise ValueError(f"values of shape [n], n >= 1, are needed, not {data.shape}")
    rows = np.stack([data, np.ones_like(data)], axis=1)
    return interval(rows, mean, level=level, resamples=resamples, seed=seed)


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
    tail = (1 - level) / 2
    low, high = np.quantile(aggregate(resampled_sums(rows, resamples, seed)), [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def paired_interval(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of ``a - b`` and its interval; ``a[i]`` and ``b[i]`` [n] are two systems' values on one prompt."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"pairs are needed: {first.shape} and {second.shape}")
    return mean_interval(first - second, level=level, resamples=resamples, seed=seed)


def resampled_sums(rows: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums of ``resamples`` draws of n rows of [n, k] with replacement, [resamples, k]."""
    rng = np.random.default_rng(seed)
    count, width = rows.shape
    at_once = max(1, _DRAWS_AT_ONCE // count)
    sums = np.empty((resamples, width))
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        drawn = rng.integers(0, count, size=(size, count))
        for k in range(width):  # a column at a time: the memory does not grow with k
            sums[start : start + size, k] = rows[drawn, k].sum(axis=1)
    return sums
