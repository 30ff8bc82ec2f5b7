"""Distinct n-grams (Li et al. 2016, "A Diversity-Promoting Objective Function"): the diversity of the words of texts.

``distinct.n`` is the mean over texts of a text's distinct n-grams by its n-grams; ``distinct.set_n`` is the same of
all texts together, n = 1, 2, 3. (The paper divides by words, not by n-grams.) Both fall as texts get longer, the
second also as there are more of them: compare sets of equal size. Words are lower-cased letters and digits
(``scorers.coverage``). A text without an n-gram is skipped; a figure for which no text has one is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlgf_cli.protocols import Example, Metric, MetricResult
from rlgf_cli.scorers.base import refuse_target, scored_only, signature
from rlgf_cli.scorers.coverage import words
from rlgf_cli.scorers.repetition import ngrams

ORDERS = (1, 2, 3)


class DistinctMetric(Metric):
    """``distinct.1`` to ``distinct.3`` and ``distinct.set_1`` to ``distinct.set_3``."""

    name = "distinct"

    def __init__(self, target: str | None = None) -> None:
        refuse_target(self.name, target)

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        tokens = [words(text) for text in texts]
        values: dict[str, list[float | None]] = {}
        whole: dict[str, float] = {}
        for n in ORDERS:
            grams = [ngrams(of_text, n) for of_text in tokens]
            values[f"{n}"] = [len(set(of_text)) / len(of_text) if of_text else None for of_text in grams]
            if (share := set_distinct(grams)) is not None:
                whole[f"set_{n}"] = share
        return MetricResult(
            scored_only(values), signature(self.name, "words=letters+digits,rule=1", examples), whole=whole
        )


def set_distinct(grams: Sequence[Sequence[tuple[str, ...]]]) -> float | None:
    """Distinct n-grams by n-grams of all texts together; ``grams[i]``: those of text i, repeated ones too. None where
    no text has one.
    """
    total = sum(map(len, grams))
    return len(set().union(*grams)) / total if total else None
