"""The difference of two sets in figures that depend on the number of texts, with an interval.

A bootstrap draws texts twice, and a set with copies is less diverse than the one that it stands for. So both sets are
compared at one number of texts, drawn without replacement: a draw has r of a set's G seeds, and m of all the texts that
were made from these. Texts of one chain depend on each other, and so seeds are what is drawn.

The figure is the mean over draws: that of m texts made from r seeds. To first order it is a sum of the seeds' effects,
of variance v each. Over draws of r of G seeds such a sum has the variance G v (r / G) (1 - r / G); its mean over all
draws has G v (r / G)^2 over other seeds like these, which is r / (G - r) as much whatever the figure's scale: the
delete-d jackknife (Shao and Wu 1989). benchmarks/evolve_coverage.py holds the intervals against a known truth.
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
"""Two sets are paired where so many of all their seeds are in both."""


BySeed = Mapping[str, Sequence[int]]
"""The texts that were made from each seed of a set, by their numbers; a seed may have none."""


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


def by_seed(seeds: Sequence[str], tried: Iterable[str] = ()) -> dict[str, list[int]]:
    """Text i was made from ``seeds[i]``; from ``tried`` ones too, which may have given none."""
    found: dict[str, list[int]] = {seed: [] for seed in tried}
    for i, seed in enumerate(seeds):
        found.setdefault(seed, []).append(i)
    return found


def draw(first: BySeed, second: BySeed, *, most: int, count: int, seed: int) -> Draws:
    """``count`` draws of at most ``most`` texts: of half of the seeds, or fewer where these have more texts, and of
    both sets as many texts as every draw has. Raises ValueError where a set has fewer than two seeds.
    """
    of = (first, second)
    if min(map(len, of)) < 2:
        raise ValueError("two seeds are needed in each set")
    union = sorted({*first, *second})
    paired = len({*first} & {*second}) >= _SHARED * len(union)
    groups = (union, union) if paired else (sorted(first), sorted(second))
    fewest = min(sum(map(len, of[side].values())) / len(groups[side]) for side in (0, 1))
    size = max(1, min(len(groups[0]) // 2, len(groups[1]) // 2, math.ceil(most / fewest)))

    def some_seeds(k: int, side: int) -> list[str]:
        order = noise.generator(seed, "seeds", k, 0 if paired else side).permutation(len(groups[side]))
        return [groups[side][i] for i in order[:size]]

    chosen = [(some_seeds(k, 0), some_seeds(k, 1)) for k in range(count)]
    pools = [[[i for name in pair[side] for i in of[side].get(name, ())] for side in (0, 1)] for pair in chosen]
    texts = min(most, min(len(pool) for pair in pools for pool in pair))

    def some_texts(k: int, side: int) -> np.ndarray:
        return np.sort(noise.generator(seed, "texts", k, side).permutation(np.array(pools[k][side], dtype=int))[:texts])

    each = [Draw((some_texts(k, 0), some_texts(k, 1)), pair) for k, pair in enumerate(chosen)]
    return Draws(each, texts, size, (len(groups[0]), len(groups[1])), paired)


def difference(first: np.ndarray, second: np.ndarray, of: Draws, level: float) -> Interval:
    """The mean of ``first - second``, each a figure of every draw [draws], and its interval over other seeds: Student's
    t with one degree of freedom less than the smaller set has seeds.

    Where one set has many more texts per seed than the other, the choice of its texts adds to the spread of the draws:
    the interval is wider than it had to be then, never narrower.
    """
    share = [of.seeds / (groups - of.seeds) for groups in of.seed_counts]
    if of.paired:
        variance = float((first - second).var(ddof=1)) * share[0]
    else:
        variance = float(first.var(ddof=1)) * share[0] + float(second.var(ddof=1)) * share[1]
    value = float(first.mean() - second.mean())
    half = float(stdtrit(min(of.seed_counts) - 1, (1 + level) / 2)) * math.sqrt(variance)
    return Interval(value, value - half, value + half)
