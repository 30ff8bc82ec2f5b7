"""Differences between two sets in figures that depend on the number of texts, with their intervals.

A bootstrap draws texts twice, and a set with copies is less diverse than the one that it was drawn from. So both sets
are compared at equal numbers of texts, drawn without replacement: a draw has r of the G seeds of a set, and m of the
texts that were made from these. Texts of one chain depend on each other, so that seeds are drawn and not texts.

The figure is the mean over draws: that of m texts made from r seeds. To first order it is a sum of the seeds' effects,
of variance v each. Over draws of r of G seeds such a sum has the variance G v (r / G) (1 - r / G); over other seeds
like these its mean over all draws has G v (r / G)^2, which is r / (G - r) times as much whatever the figure's scale:
the delete-d jackknife (Shao and Wu 1989). benchmarks/evolve_coverage.py measures the coverage of the intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from rlgf_cli import noise
from rlgf_cli.stats.bootstrap import Interval

_SHARED = 0.5
"""Two sets are paired if at least this share of all their seeds is in both."""
BySeed = Mapping[str, Sequence[int]]
"""The indices of the texts that were made from each seed of a set; a seed may have none."""


@dataclass(frozen=True)
class Draw:
    """The texts [m] of the first set and of the second, and the seeds [r] that they were made from."""

    texts: tuple[np.ndarray, np.ndarray]
    seeds: tuple[Sequence[str], Sequence[str]]


@dataclass(frozen=True)
class Draws:
    """Draws of ``seeds`` seeds and ``texts`` texts each. ``seed_counts``: the number of seeds of each set; where
    ``paired``, of both sets together, and a draw has the same seeds of both then.
    """

    each: Sequence[Draw]
    texts: int
    seeds: int
    seed_counts: tuple[int, int]
    paired: bool


def by_seed(seeds: Sequence[str], requested: Iterable[str] = ()) -> dict[str, list[int]]:
    """The texts of each seed, where text i was made from ``seeds[i]``; the ``requested`` seeds may have none."""
    texts: dict[str, list[int]] = {seed: [] for seed in requested}
    for i, seed in enumerate(seeds):
        texts.setdefault(seed, []).append(i)
    return texts


def draw(first: BySeed, second: BySeed, *, most: int, count: int, seed: int) -> Draws:
    """``count`` draws of at most ``most`` texts: of half of the seeds, or fewer where these have more texts, and of
    both sets as many texts as every draw has. Raises ValueError where a set has fewer than two seeds.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError("two seeds are needed in each set")
    union = sorted({*first, *second})
    paired = len({*first} & {*second}) >= _SHARED * len(union)
    names = (union, union) if paired else (sorted(first), sorted(second))
    fewest = min(sum(map(len, of.values())) / len(seeds) for of, seeds in zip((first, second), names, strict=True))
    size = max(1, min(len(names[0]) // 2, len(names[1]) // 2, math.ceil(most / fewest)))

    def drawn_seeds(k: int, side: int) -> list[str]:
        order = noise.generator(seed, "seeds", k, 0 if paired else side).permutation(len(names[side]))
        return [names[side][i] for i in order[:size]]

    seeds = [(drawn_seeds(k, 0), drawn_seeds(k, 1)) for k in range(count)]
    pools = [
        tuple([i for name in side for i in of.get(name, ())] for of, side in zip((first, second), pair, strict=True))
        for pair in seeds
    ]
    texts = min(most, min(len(pool) for pair in pools for pool in pair))

    def drawn_texts(k: int, side: int) -> np.ndarray:
        return np.sort(noise.generator(seed, "texts", k, side).permutation(np.array(pools[k][side], dtype=int))[:texts])

    each = [Draw((drawn_texts(k, 0), drawn_texts(k, 1)), pair) for k, pair in enumerate(seeds)]
    return Draws(each, texts, size, (len(names[0]), len(names[1])), paired)


def difference(first: np.ndarray, second: np.ndarray, of: Draws, level: float) -> Interval:
    """The mean of ``first - second``, each a figure of every draw [draws], and its interval over other seeds: Student's
    t with one degree of freedom less than the smaller set has seeds.

    Where one set has many more texts per seed than the other, the choice of its texts adds to the variance of the
    draws: the interval is then wider than necessary, never narrower.
    """
    share = [of.seeds / (seeds - of.seeds) for seeds in of.seed_counts]
    if of.paired:
        variance = float((first - second).var(ddof=1)) * share[0]
    else:
        variance = float(first.var(ddof=1)) * share[0] + float(second.var(ddof=1)) * share[1]
    value = float(first.mean() - second.mean())
    half = float(stdtrit(min(of.seed_counts) - 1, (1 + level) / 2)) * math.sqrt(variance)
    return Interval(value, value - half, value + half)
