"""Coverage of the intervals of `rlgf evolve stats SET SET2`.

    python benchmarks/evolve_coverage.py                    (some ten minutes of a core)
    python benchmarks/evolve_coverage.py --comparisons 100  (rougher)

Texts are bags of words from a model whose sets are known: a seed has a topic, its chain's texts share words, and the
second set's seeds are spread over more topics and change more words per step. The true difference is the mean over many
fresh pairs of sets; the interval comes from one pair at a time.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from rlgf_cli.console import table
from rlgf_cli.evolve.contrast import by_seed, difference, draw
from rlgf_cli.evolve.measure import DIVERSITY, TextMeasures, figures, measure_texts
from rlgf_cli.evolve.novelty import NgramSpace

LEVEL = 0.95
COSINE = 0.3
_TOPIC_WORDS, _COMMON_WORDS, _LENGTH = 60, 200, 12


@dataclass(frozen=True)
class Model:
    """A way of making sets: topics (the k-th has a probability like 1 / k), texts per seed, and the share of words that
    a step changes.
    """

    topics: int
    texts: int
    change: float

    def chain(self, rng: np.random.Generator, topic: float) -> list[str]:
        """A chain's texts; ``topic`` in [0, 1) says which it has."""
        weights = np.cumsum(1 / np.arange(1, self.topics + 1))
        number = int(np.searchsorted(weights, topic * weights[-1], side="right"))
        words = [self._word(rng, number) for _ in range(_LENGTH)]
        made = []
        for _ in range(self.texts):
            words = [self._word(rng, number) if rng.random() < self.change else word for word in words]
            made.append(" ".join(words))
        return made

    def _word(self, rng: np.random.Generator, number: int) -> str:
        if rng.random() < 0.5:
            return f"c{int(_COMMON_WORDS * rng.random() ** 2)}"
        return f"t{number}w{int(_TOPIC_WORDS * rng.random() ** 2)}"


def two_sets(
    models: tuple[Model, Model], seeds: int, paired: bool, rng: np.random.Generator
) -> list[tuple[TextMeasures, list[str]]]:
    """Both sets with the seed of every text; paired ones have the same seeds, with the same topic each."""
    topics = rng.random((2, seeds))
    found = []
    for side, model in enumerate(models):
        chains = [model.chain(rng, topics[0 if paired else side, i]) for i in range(seeds)]
        texts = [text for chain in chains for text in chain]
        names = [f"{'' if paired else side}-{i}" for i, chain in enumerate(chains) for _ in chain]
        found.append((measure_texts(texts, NgramSpace(512).embed(texts)), names))
    return found


def coverage(models: tuple[Model, Model], seeds: int, paired: bool, comparisons: int, draws: int) -> list[list[str]]:
    """A row per figure: true difference, how often it was inside, and the intervals' width relative to 1.96 standard
    deviations of the estimates.
    """
    values, halves = {}, {}
    for k in range(comparisons):
        (a, first), (b, second) = two_sets(models, seeds, paired, np.random.default_rng([11, k]))
        of = draw(by_seed(first), by_seed(second), most=500, count=draws, seed=k)
        assert of.paired == paired
        rows = [(figures(a, i, COSINE), figures(b, j, COSINE)) for i, j in (one.texts for one in of.each)]
        for name in DIVERSITY:
            columns = [np.array([row[side][name] for row in rows]) for side in (0, 1)]
            found = difference(columns[0], columns[1], of, LEVEL)
            values.setdefault(name, []).append(found.value)
            halves.setdefault(name, []).append((found.high or 0) - found.value)
    # the mean over all pairs is the truth, but for its own error, a comparisons-th of one interval's variance
    lines = []
    for name, found in values.items():
        each, half = np.array(found), np.array(halves[name])
        truth = each.mean()
        inside = np.abs(each - truth) <= half
        right = 1.96 * each.std(ddof=1)
        lines.append([name, f"{truth:.4g}", f"{100 * inside.mean():.1f}%", f"{half.mean() / right:.2f}"])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=200)
    parser.add_argument("--draws", type=int, default=60)
    parser.add_argument("--cases", type=int, nargs="*", default=[0, 1, 2])
    arguments = parser.parse_args()
    same = (Model(20, 3, 0.3), Model(40, 3, 0.5))
    longer = (Model(20, 1, 0.3), Model(40, 5, 0.5))
    cases = [(same, 20, True), (same, 20, False), (longer, 40, True)]
    for models, seeds, paired in (cases[i] for i in arguments.cases):
        title = f"{seeds} seeds, {'the same' if paired else 'others'} in both; texts per seed: {models[0].texts} and "
        print(f"\n{title}{models[1].texts}; {arguments.comparisons} pairs of sets\n")
        rows = coverage(models, seeds, paired, arguments.comparisons, arguments.draws)
        print(
            table(["figure", "true difference", f"inside the {LEVEL:.0%} interval", "width by right"], rows), flush=True
        )


if __name__ == "__main__":
    main()
