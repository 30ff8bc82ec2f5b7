"""Whether two systems differ: p-values and intervals of paired differences, over prompts and over seeds.

A figure is ``aggregate(sum of rows)`` with one row of k numbers per prompt (see ``metrics.aggregates``). Arrays are
``[v, n, k]``: v evaluations, each of n prompts, the same ones in the same order. docs/significance.md says what the
numbers mean.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from rlgf_cli.stats.bootstrap import Aggregate, Interval, chunks, percentile

_ROUNDING = 1e-12
"""Figures that differ by less than this share of their size differ by rounding."""
_TIES = 1e-9
"""A resample ties with what was observed where it is nearer than this share of the largest: figures of 0/1 scores lie
on a lattice, and rounding must not decide which of its points are counted."""


class Seeds(NamedTuple):
    """A system: the figure of each of its s seeds [s], and of the same with resampled prompts [s, resamples]."""

    figures: np.ndarray
    resampled: np.ndarray


class Estimate(NamedTuple):
    """A figure or a difference, its interval, and the two-sided p-value of its being 0."""

    interval: Interval
    p: float | None


def estimate(system: Seeds, base: Seeds | None = None, *, prompts: int, level: float, paired: bool = False) -> Estimate:
    """The mean over seeds of ``system``, less that of ``base``: other prompts, and other seeds where there are several.

    With one seed each: the percentile interval over prompts and :func:`bootstrap_p`. Else :func:`_over_seeds`, with
    ``paired`` of the differences between the i-th seeds of both, in which what these share is no noise. One prompt
    alone has neither.
    """
    groups = [system] if base is None else [system, base]
    rounding = _ROUNDING * max(float(np.abs(group.figures).max()) for group in groups)
    value = float(system.figures.mean() - (0.0 if base is None else base.figures.mean()))
    if prompts < 2:
        return Estimate(Interval(value, None, None), None)
    draws = system.resampled.mean(axis=0) - (0.0 if base is None else base.resampled.mean(axis=0))
    if all(len(group.figures) == 1 for group in groups):
        return Estimate(percentile(value, draws, level), float(bootstrap_p(draws, np.asarray(value))))
    if paired and base is not None:
        groups = [Seeds(system.figures - base.figures, system.resampled - base.resampled)]
    return _over_seeds(value, draws, groups, prompts, level, rounding)


def bootstrap_p(differences: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Two-sided p-value of the paired bootstrap (Riezler and Maxwell 2005): ``differences`` [..., resamples]
    of resampled prompts, ``observed`` [...].

    The null distribution is the bootstrap's, moved to 0 by its own mean. sacrebleu moves the distribution of the
    absolute differences instead, which makes its p-value that of one side: about half of this one.
    """
    return p_value(differences - differences.mean(axis=-1, keepdims=True), observed)


def p_value(null: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """``(1 + #{|null| >= |observed|}) / (1 + resamples)`` (Davison and Hinkley 1997, chapter 4): never 0, and 1 for
    equal systems. ``null`` [..., resamples], ``observed`` [...]; ties count as exceeding.
    """
    return np.asarray((1 + _reaches(null, observed).sum(axis=-1)) / (1 + null.shape[-1]))


def _reaches(null: np.ndarray, observed: np.ndarray) -> np.ndarray:
    size, seen = np.abs(null), np.abs(observed)[..., None]
    return np.asarray(size >= seen - _TIES * np.maximum(size.max(axis=-1, keepdims=True), seen))


def randomised(
    rows: np.ndarray,
    base: np.ndarray,
    aggregate: Aggregate,
    *,
    resamples: int,
    seed: int,
    progress: Callable[[int], object] = lambda done: None,
) -> np.ndarray:
    """Approximate randomisation (Noreen 1989): differences where the two systems' rows of each prompt change sides
    with probability 1/2. ``rows`` [v, n, k], ``base`` [n, k] or [v, n, k]; returns [v, resamples].

    With :func:`p_value` an exact test, for any n and any figure, of the hypothesis that it makes no difference which
    of the two wrote which text. Here too sums are products of matrices, and ``progress`` hears of each chunk.
    """
    systems, count, width = rows.shape
    gain = (base - rows).transpose(1, 0, 2).reshape(count, systems * width)
    own = rows.sum(axis=1)
    others = np.broadcast_to(base, rows.shape).sum(axis=1)
    rng = np.random.default_rng(seed)
    found = np.empty((systems, resamples))
    for start, size in chunks(resamples, count + 2 * systems * width):
        swap = rng.integers(0, 2, size=(size, count), dtype=bool).astype(np.float64)
        moved = (swap @ gain).reshape(size, systems, width)
        found[:, start : start + size] = (aggregate(own + moved) - aggregate(others - moved)).T
        progress(size)
    return found


def seed_permutation_p(first: np.ndarray, second: np.ndarray, *, resamples: int, seed: int) -> float | None:
    """Two-sided p-value of the difference of means where the seeds' figures [s] are dealt anew to the two systems.

    Exact for the hypothesis that both systems are one way of training: all ways of dealing are counted where there are
    at most ``resamples``. None for a system with one seed: a single model is no sample of trainings.
    """
    if min(len(first), len(second)) < 2:
        return None
    pooled, size = np.concatenate([first, second]), len(first)
    observed = np.asarray(first.mean() - second.mean())
    every = math.comb(len(pooled), size) <= resamples
    if every:
        dealt = pooled[np.array(list(itertools.combinations(range(len(pooled)), size)))].sum(axis=1)
    else:
        orders = np.random.default_rng(seed).permuted(np.tile(pooled, (resamples, 1)), axis=1)
        dealt = orders[:, :size].sum(axis=1)
    null = dealt / size - (pooled.sum() - dealt) / len(second)
    return _counted(null, observed, every=every)


def pair_flip_p(differences: np.ndarray, *, resamples: int, seed: int) -> float | None:
    """Two-sided p-value of the mean of the differences [s] between paired seeds, where the two of a pair change sides.

    Exact for the hypothesis that within a pair it makes no difference which of the two is which: all 2^s ways are
    counted where there are at most ``resamples`` (Fisher 1935, section 21). None for one pair.
    """
    if len(differences) < 2:
        return None
    every = 2 ** len(differences) <= resamples
    sides = (
        np.array(list(itertools.product([1.0, -1.0], repeat=len(differences))))
        if every
        else np.random.default_rng(seed).choice([1.0, -1.0], size=(resamples, len(differences)))
    )
    return _counted((sides * differences).mean(axis=1), np.asarray(differences.mean()), every=every)


def _counted(null: np.ndarray, observed: np.ndarray, *, every: bool) -> float:
    """``p_value`` of drawn ways; of ``every`` way their share: there what was observed is one of them already."""
    return float(_reaches(null, observed).mean() if every else p_value(null, observed))


def smallest_flip_p(pairs: int) -> float:
    """The smallest p-value that so many pairs can give: both signs of all of them."""
    return float(2 / 2**pairs)


def smallest_seed_p(first: int, second: int) -> float:
    """The smallest p-value that dealing so many seeds anew can give; of equal halves, both ways round count."""
    return (2 if first == second else 1) / math.comb(first + second, first)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down adjustment: all tests whose adjusted value is below alpha may be called significant
    together, with probability at most alpha of one false call, however the tests depend on each other.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    steps = values[order] * (len(values) - np.arange(len(values)))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in adjusted]


def _over_seeds(
    value: float, draws: np.ndarray, groups: Sequence[Seeds], prompts: int, level: float, rounding: float
) -> Estimate:
    """Student's interval and p-value from components of variance: prompts and, per system, seeds.

    Resampling few seeds gives too narrow intervals (with s seeds their variance is (s - 1) / s of what it should be,
    and that of a few numbers is itself uncertain), so that seeds are not resampled. With F the seeds' figures:

    - prompts: the variance of ``draws`` under resampled prompts, times n / (n - 1); n - 1 degrees of freedom;
    - seeds: V = Var(F) with s - 1 in the denominator holds a share of the prompts' noise, that by which one seed's
      figure moves apart from another's when prompts change (the interaction; variances less covariances of the
      resampled figures). It is in the first part already, and is taken off: max(V - interaction, 0) / s.

    The degrees of freedom of the sum are Satterthwaite's (1946), with V / s as the seeds' part, and not fewer than
    those of the part that has the fewest, which his formula never goes below where nothing is taken off. A system with
    one seed adds no part of its own: it is that model. Of paired seeds the one group are the differences of the pairs.
    What is not above ``rounding`` is 0.
    """
    unbiased = prompts / (prompts - 1)
    by_prompts = float(draws.var()) * unbiased
    variance, weight, fewest = by_prompts, by_prompts**2 / (prompts - 1), prompts - 1
    for figures, resampled in groups:
        seeds = len(figures)
        if seeds == 1:
            continue
        between = float(figures.var(ddof=1))
        shared = np.cov(resampled, bias=True) * unbiased  # [s, s]
        alone = float(np.trace(shared) / seeds)
        together = float((shared.sum() - np.trace(shared)) / (seeds * (seeds - 1)))
        variance += max(between - (alone - together), 0.0) / seeds
        weight += (between / seeds) ** 2 / (seeds - 1)
        fewest = min(fewest, seeds - 1)
    if math.sqrt(variance) <= rounding:
        p = 1.0 if abs(value) <= rounding else 1 / (1 + draws.shape[-1])
        return Estimate(Interval(value, value, value), p)
    error, freedom = math.sqrt(variance), max(variance**2 / weight, fewest)
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * error
    return Estimate(Interval(value, value - half, value + half), float(2 * stats.t.sf(abs(value) / error, freedom)))
