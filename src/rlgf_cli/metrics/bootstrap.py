"""Percentile bootstrap intervals. What is resampled are prompts: the interval speaks of other prompts like
these, not of another training run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_DRAWS_AT_ONCE = 1 << 21  # indices drawn at a time: about 32 MB whatever n and resamples are


class Interval(NamedTuple):
    """A mean and its interval. ``low`` and ``high`` are None for a single value: it has no interval."""

    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_interval(
    values: Sequence[float] | np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean of ``values`` [n] and its percentile bootstrap interval (Efron and Tibshirani 1993, ch. 13).

    Equal n and seed draw equal resamples. The interval is a little narrow for small n: its coverage is that
    of a normal interval with the n-denominator standard deviation. Raises ValueError for no values and for
    values that are not finite.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data):
        raise ValueError(f"values of shape [n], n >= 1, are needed, not {data.shape}")
    if not np.isfinite(data).all():
        raise ValueError("a value is not finite")
    mean = float(data.mean())
    if len(data) < 2:
        return Interval(mean, None, None)
    tail = (1 - level) / 2
    low, high = np.quantile(_resampled_means(data, resamples, seed), [tail, 1 - tail])
    return Interval(mean, float(low), float(high))


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


def _resampled_means(data: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of ``resamples`` draws of n values with replacement, [resamples]."""
    rng = np.random.default_rng(seed)
    count = len(data)
    rows = max(1, _DRAWS_AT_ONCE // count)
    means = np.empty(resamples)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        means[start : start + size] = data[rng.integers(0, count, size=(size, count))].mean(axis=1)
    return means
