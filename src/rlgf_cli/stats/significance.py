"""p-values and intervals of paired differences between two systems, over prompts and over seeds.

A figure is ``aggregate(sum of rows)`` with one row of k numbers per prompt (see :mod:`.aggregates`). Arrays are
``[v, n, k]``: v evaluations of the same n prompts in the same order. docs/significance.md explains the numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats, which calls these, takes 0.5 s to import

from rlgf_cli.stats.bootstrap import Aggregate, Interval, chunks, percentile

_ROUNDING = 1e-12
"""Figures that differ by less than this share of their size differ by rounding."""
_TIES = 1e-9
"""A resample ties with the observed difference where they are nearer than this share of the largest one: figures of 0/1
values lie on a lattice, and rounding must not decide which of its points are counted."""


class Seeds(NamedTuple):
    """The figures of a system's s seeds [s], and their figures on resampled prompts [s, resamples]."""

    figures: np.ndarray
    resampled: np.ndarray


class Estimate(NamedTuple):
    """A figure or a difference with its interval, and the two-sided p-value of the hypothesis that it is 0."""

    interval: Interval
    p: float | None


def estimate(system: Seeds, base: Seeds | None = None, *, prompts: int, level: float, paired: bool = False) -> Estimate:
    """The mean over seeds of ``system``, minus that of ``base``, with interval and p-value over other prompts and,
    where there are several seeds, other seeds.

    With one seed each: the percentile interval over prompts and :func:`bootstrap_p`. Else :func:`_over_seeds`; with
    ``paired``, of the differences between the i-th seeds of both, from which the part that they share cancels. A single
    prompt has neither interval nor p-value.
    """
    systems = [system] if base is None else [system, base]
    rounding = _ROUNDING * max(float(np.abs(one.figures).max()) for one in systems)
    value = float(system.figures.mean() - (0.0 if base is None else base.figures.mean()))
    if prompts < 2:
        return Estimate(Interval(value, None, None), None)
    draws = system.resampled.mean(axis=0) - (0.0 if base is None else base.resampled.mean(axis=0))
    if all(len(one.figures) == 1 for one in systems):
        return Estimate(percentile(value, draws, level), float(bootstrap_p(draws, np.asarray(value))))
    if paired and base is not None:
        systems = [Seeds(system.figures - base.figures, system.resampled - base.resampled)]
    return _over_seeds(value, draws, systems, prompts, level, rounding)


def bootstrap_p(differences: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Two-sided p-value of the paired bootstrap (Riezler and Maxwell 2005): ``differences`` [..., resamples]
    of resampled prompts, ``observed`` [...].

    The null distribution is the bootstrap distribution minus its mean. sacrebleu centres the absolute differences
    instead, which makes its p-value one-sided: about half of this one.
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
    """Approximate randomisation (Noreen 1989): differences where the two systems' rows of each prompt are swapped with
    probability 1/2. ``rows`` [v, n, k], ``base`` [n, k] or [v, n, k]; returns [v, resamples].

    With :func:`p_value` an exact test, for any n and any figure, of the hypothesis that the texts of the two systems
    are exchangeable. Here too sums are products of matrices, and ``progress`` is called after each chunk.
    """
    systems, count, width = rows.shape
    gain = (base - rows).transpose(1, 0, 2).reshape(count, systems * width)
    own = rows.sum(axis=1)
    others = np.broadcast_to(base, rows.shape).sum(axis=1)
    rng = np.random.default_rng(seed)
    differences = np.empty((systems, resamples))
    for start, size in chunks(resamples, count + 2 * systems * width):
        swap = rng.integers(0, 2, size=(size, count), dtype=bool).astype(np.float64)
        moved = (swap @ gain).reshape(size, systems, width)
        differences[:, start : start + size] = (aggregate(own + moved) - aggregate(others - moved)).T
        progress(size)
    return differences


def seed_permutation_p(first: np.ndarray, second: np.ndarray, *, resamples: int, seed: int) -> float | None:
    """Two-sided p-value of the difference of means by permutation of the seeds' figures [s] between the two systems.

    Exact for the hypothesis that both systems are one way of training: all permutations are counted where there are at
    most ``resamples``. None for a system with one seed: a single model is no sample of trainings.
    """
    if min(len(first), len(second)) < 2:
        return None
    pooled, size = np.concatenate([first, second]), len(first)
    observed = np.asarray(first.mean() - second.mean())
    complete = math.comb(len(pooled), size) <= resamples
    if complete:
        sums = pooled[np.array(list(itertools.combinations(range(len(pooled)), size)))].sum(axis=1)
    else:
        orders = np.random.default_rng(seed).permuted(np.tile(pooled, (resamples, 1)), axis=1)
        sums = orders[:, :size].sum(axis=1)
    null = sums / size - (pooled.sum() - sums) / len(second)
    return _counted(null, observed, complete=complete)


def pair_flip_p(differences: np.ndarray, *, resamples: int, seed: int) -> float | None:
    """Two-sided p-value of the mean of the differences [s] between paired seeds by changes of their signs.

    Exact for the hypothesis that the two of a pair are exchangeable: all 2^s combinations of signs are counted where
    there are at most ``resamples`` (Fisher 1935, section 21). None for one pair.
    """
    if len(differences) < 2:
        return None
    complete = 2 ** len(differences) <= resamples
    signs = (
        np.array(list(itertools.product([1.0, -1.0], repeat=len(differences))))
        if complete
        else np.random.default_rng(seed).choice([1.0, -1.0], size=(resamples, len(differences)))
    )
    return _counted((signs * differences).mean(axis=1), np.asarray(differences.mean()), complete=complete)


def _counted(null: np.ndarray, observed: np.ndarray, *, complete: bool) -> float:
    """:func:`p_value` of a sampled null distribution; of a ``complete`` one, which contains ``observed``, the share."""
    return float(_reaches(null, observed).mean() if complete else p_value(null, observed))


def smallest_flip_p(pairs: int) -> float:
    """The smallest p-value of :func:`pair_flip_p`: all signs as observed, or all reversed."""
    return float(2 / 2**pairs)


def smallest_seed_p(first: int, second: int) -> float:
    """The smallest p-value of :func:`seed_permutation_p`; of equal numbers, the exchanged systems count too."""
    return (2 if first == second else 1) / math.comb(first + second, first)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down adjustment: calling every test significant whose adjusted value is below alpha has a
    probability of at most alpha of any false positive, however the tests depend on each other.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    steps = values[order] * (len(values) - np.arange(len(values)))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in adjusted]


def _over_seeds(
    value: float, draws: np.ndarray, systems: Sequence[Seeds], prompts: int, level: float, rounding: float
) -> Estimate:
    """Student's interval and p-value from components of variance: prompts and, per system, seeds.

    Seeds are not resampled: resampling few of them gives too narrow intervals (with s seeds their variance is
    (s - 1) / s of what it should be, and a variance of few numbers is itself uncertain). With F the seeds' figures:

    - prompts: the variance of ``draws`` under resampled prompts, times n / (n - 1); n - 1 degrees of freedom;
    - seeds: V = Var(F), with s - 1 in the denominator, contains the interaction of seeds and prompts (the mean variance
      minus the mean covariance of the resampled figures). The first part has it already: max(V - interaction, 0) / s.

    The degrees of freedom of the sum are Satterthwaite's (1946), with V / s as the seeds' part, and at least those of
    the part that has the fewest, below which his formula never goes where nothing is subtracted. A system with one seed
    adds no part: it stands for that model. Paired seeds are one system of differences. A standard error of at most
    ``rounding`` is 0.
    """
    unbiased = prompts / (prompts - 1)
    by_prompts = float(draws.var()) * unbiased
    variance, weight, fewest = by_prompts, by_prompts**2 / (prompts - 1), prompts - 1
    for figures, resampled in systems:
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
    half = float(stdtrit(freedom, (1 + level) / 2)) * error
    return Estimate(Interval(value, value - half, value + half), float(2 * stdtr(freedom, -abs(value) / error)))
