"""ROUGE F1 (Lin 2004) against the best reference, with the ``rouge-score`` package's own numbers.

With several references the best one counts, for each figure by itself. Only a-z and 0-9 count as letters, so a
reference in another script scores 0. The package tokenises and matches. This module adds: the stems of words and the
words of texts are cached (in training the same references come again and again), a text's n-grams are counted once for
all its pairs, and the length of a longest common subsequence is found a row of the table at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import ClassVar

from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer, scoring, tokenize

from rlgf_cli.protocols import Example, MetricResult, Score
from rlgf_cli.scorers.base import ReferenceScorer, refuse_target, signature

TYPES = ("rouge1", "rouge2", "rougeL")
FIGURES = (*TYPES, "rougeLsum")


@dataclass(frozen=True)
class Prepared:
    """A text as ROUGE reads it: its words, their n-grams by n, the bit mask of each word's places, and the words of
    each line that has any (ROUGE-Lsum's sentences).
    """

    words: Sequence[str]
    grams: Mapping[int, Counter[tuple[str, ...]]]
    places: Mapping[str, int]
    lines: Sequence[Sequence[str]]


class _CachedStemmer:
    def __init__(self) -> None:
        self.stem = lru_cache(maxsize=200_000)(PorterStemmer().stem)


class Rouge(ReferenceScorer):
    """As a reward: the mean F1 of ``types``, each logged. As a metric: F1 of ROUGE-1, -2, -L and -Lsum.

    ROUGE-Lsum takes each line of a text for a sentence, as the package does: on texts of one line it equals ROUGE-L.
    An empty text scores 0. References without a-z and 0-9 are counted (``references_without_words``).
    """

    name = "rouge"
    types: ClassVar[tuple[str, ...]] = TYPES

    def __init__(self, target: str | None = None, *, stemmer: bool = True) -> None:
        refuse_target(self.name, target)
        self._stemmer = _CachedStemmer() if stemmer else None
        self.lines = lru_cache(maxsize=50_000)(self._lines)
        self.settings = f"rouge-score={version('rouge-score')},stemmer={'yes' if stemmer else 'no'},references=max"
        self.signature = f"{self.name},{self.settings}"

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        self.check(examples)
        rows = [self.f1(e.references, text, self.types) for e, text in zip(examples, texts, strict=True)]
        return [Score(sum(row.values()) / len(row), row if len(row) > 1 else {}) for row in rows]

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        rows = [
            self.f1(e.references, text, FIGURES) if e.references else None
            for e, text in zip(examples, texts, strict=True)
        ]
        wordless = sum(bool(e.references) and not any(map(self.lines, e.references)) for e in examples)
        return MetricResult(
            {kind: [row[kind] if row is not None else None for row in rows] for kind in FIGURES},
            signature(self.name, f"{self.settings},lsum=newline", examples),
            {"references_without_words": wordless} if wordless else {},
        )

    def f1(self, references: Sequence[str], text: str, types: Sequence[str]) -> dict[str, float]:
        """``{type: best F1}`` for ``types`` among ``rouge1`` to ``rouge9``, ``rougeL``, ``rougeLsum``.

        An empty text has F1 0; no references are a ValueError.
        """
        if not references:
            raise ValueError("ROUGE needs a reference")
        orders = [int(kind[5:]) for kind in types if kind[5:].isdigit()]
        prediction = self._prepared(text, orders)
        rows = [self._scores(self._prepared(reference, orders), prediction, types) for reference in references]
        return {kind: max(row[kind] for row in rows) for kind in types}

    def _lines(self, text: str) -> list[list[str]]:
        """The words of each line that has any: lower-cased runs of a-z and 0-9, those of over 3 letters stemmed."""
        return [words for line in text.split("\n") if (words := tokenize.tokenize(line, self._stemmer))]

    def _prepared(self, text: str, orders: Sequence[int]) -> Prepared:
        lines = self.lines(text)
        words = [word for line in lines for word in line]
        grams = {n: Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in orders}
        places: dict[str, int] = {}
        for i, word in enumerate(words):
            places[word] = places.get(word, 0) | 1 << i
        return Prepared(words, grams, places, lines)

    def _scores(self, reference: Prepared, prediction: Prepared, types: Sequence[str]) -> dict[str, float]:
        scores = {f"rouge{n}": _ngrams_f1(reference.grams[n], prediction.grams[n]) for n in reference.grams}
        one_line = len(reference.lines) <= 1 and len(prediction.lines) <= 1
        if "rougeL" in types or ("rougeLsum" in types and one_line):
            scores["rougeL"] = _lcs_f1(reference, prediction)
        if "rougeLsum" in types:
            scores["rougeLsum"] = (
                scores["rougeL"]  # the union of one subsequence
                if one_line
                else float(rouge_scorer._summary_level_lcs(reference.lines, prediction.lines).fmeasure)
            )
        return scores


class Rouge1(Rouge):
    """ROUGE-1 F1."""

    name = "rouge1"
    types = ("rouge1",)


class Rouge2(Rouge):
    """ROUGE-2 F1."""

    name = "rouge2"
    types = ("rouge2",)


class RougeL(Rouge):
    """ROUGE-L F1, on the text as one sequence."""

    name = "rougeL"
    types = ("rougeL",)


class AdjustedRouge(Rouge):
    """ROUGE that a text cannot raise by its length; a metric.

    For one reference, with ``n`` words in the text and ``m`` in the reference (split at white space)::

        adjusted = F1 * exp(1 - max(n / m, m / n))

    Equal length leaves F1 as it is; a text twice as long, or half as long, keeps exp(-1) = .368 of it. F1 charges
    length once already, by precision and recall; this charges it again, on both sides alike, as BLEU's brevity penalty
    does on one. Solway (arXiv 2408.16753) reports a length-adjusted ROUGE whose definition could not be read; this one
    is ours.
    """

    name = "rouge_adjusted"

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        rows = [
            self._best(e.references, text) if e.references else None for e, text in zip(examples, texts, strict=True)
        ]
        return MetricResult(
            {kind: [row[kind] if row is not None else None for row in rows] for kind in TYPES},
            signature(self.name, f"{self.settings},length=exp(1-max(n/m,m/n))", examples),
        )

    def _best(self, references: Sequence[str], text: str) -> dict[str, float]:
        rows = []
        for reference in references:
            factor = length_factor(len(text.split()), len(reference.split()))
            rows.append({kind: f1 * factor for kind, f1 in self.f1([reference], text, TYPES).items()})
        return {kind: max(row[kind] for row in rows) for kind in TYPES}


def length_factor(words: int, reference_words: int) -> float:
    """``exp(1 - max(n/m, m/n))`` in [0, 1]; 0 where one of the two is empty."""
    if not words or not reference_words:
        return 0.0
    return math.exp(1 - max(words / reference_words, reference_words / words))


def _ngrams_f1(reference: Counter[tuple[str, ...]], prediction: Counter[tuple[str, ...]]) -> float:
    return float(rouge_scorer._score_ngrams(reference, prediction).fmeasure)


def _lcs_f1(reference: Prepared, prediction: Prepared) -> float:
    if not reference.words or not prediction.words:
        return 0.0
    length = lcs_length(prediction.words, reference.places, len(reference.words))
    return float(scoring.fmeasure(length / len(prediction.words), length / len(reference.words)))


def lcs_length(words: Sequence[str], places: Mapping[str, int], size: int) -> int:
    """Length of the longest common subsequence of ``words`` and a text of ``size`` words.

    Bit i of ``places[word]`` says that the text's word i is ``word``. A row of the usual table grows by at most 1 from
    cell to cell, so it is held as bits, cleared where it grows, and a whole row is one addition (Hyyro 2004,
    "Bit-parallel LCS-length computation revisited").
    """
    row = (1 << size) - 1
    for word in words:
        if (here := row & places.get(word, 0)) != 0:
            row = (row + here) | (row - here)
    return size - (row & (1 << size) - 1).bit_count()
