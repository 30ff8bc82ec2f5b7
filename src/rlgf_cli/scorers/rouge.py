"""ROUGE F1 against the best reference, with the ``rouge-score`` package's own numbers.

The package tokenises and matches. What is done here instead: words' stems and texts' words are remembered (in
training the same references come again and again), a text's n-grams are counted once for all its pairs, and the
length of a longest common subsequence is found a row of the table at a time.
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

from rlgf_cli.protocols import Example, Metric, MetricResult, Reward, Score
from rlgf_cli.scorers.base import refuse_target, require_references, require_some_references, signature


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


class BestRouge:
    """F1 of each ROUGE type; with several references the best one, chosen for each type by itself.

    ``types``: ``rouge1`` to ``rouge9``, ``rougeL``, ``rougeLsum``.
    """

    def __init__(self, types: Sequence[str], *, stemmer: bool) -> None:
        self.types = tuple(types)
        self._orders = sorted(int(kind[5:]) for kind in types if kind[5:].isdigit())
        self._stemmer = _CachedStemmer() if stemmer else None
        self.lines = lru_cache(maxsize=50_000)(self._lines)
        self.settings = f"rouge-score={version('rouge-score')},stemmer={'yes' if stemmer else 'no'},references=max"

    def f1(self, references: Sequence[str], text: str) -> dict[str, float]:
        """``{type: F1}``. An empty text has F1 0; no references are a ValueError."""
        if not references:
            raise ValueError("ROUGE needs a reference")
        prediction = self._prepared(text)
        found = [self._scores(self._prepared(reference), prediction) for reference in references]
        return {kind: max(scores[kind] for scores in found) for kind in self.types}

    def _lines(self, text: str) -> list[list[str]]:
        """The words of each line that has any: lower-cased runs of a-z and 0-9, those of over 3 letters stemmed."""
        return [words for line in text.split("\n") if (words := tokenize.tokenize(line, self._stemmer))]

    def _prepared(self, text: str) -> Prepared:
        lines = self.lines(text)
        words = [word for line in lines for word in line]
        grams = {n: Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in self._orders}
        places: dict[str, int] = {}
        for i, word in enumerate(words):
            places[word] = places.get(word, 0) | 1 << i
        return Prepared(words, grams, places, lines)

    def _scores(self, reference: Prepared, prediction: Prepared) -> dict[str, float]:
        scores = {f"rouge{n}": _ngrams_f1(reference.grams[n], prediction.grams[n]) for n in self._orders}
        one_line = len(reference.lines) <= 1 and len(prediction.lines) <= 1
        if "rougeL" in self.types or ("rougeLsum" in self.types and one_line):
            scores["rougeL"] = _lcs_f1(reference, prediction)
        if "rougeLsum" in self.types:
            scores["rougeLsum"] = (
                scores["rougeL"]  # the union of one subsequence
                if one_line
                else float(rouge_scorer._summary_level_lcs(reference.lines, prediction.lines).fmeasure)
            )
        return scores


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


class RougeReward(Reward):
    """The mean of ROUGE-1, -2 and -L F1, each logged."""

    name = "rouge"
    types: ClassVar[tuple[str, ...]] = ("rouge1", "rouge2", "rougeL")

    def __init__(self, target: str | None = None, *, stemmer: bool = True) -> None:
        refuse_target(self.name, target)
        self._rouge = BestRouge(self.types, stemmer=stemmer)
        self.signature = f"{self.name},{self._rouge.settings}"

    def check(self, examples: Sequence[Example]) -> None:
        require_references(self.name, examples)

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        self.check(examples)
        scores = []
        for example, text in zip(examples, texts, strict=True):
            found = self._rouge.f1(example.references, text)
            scores.append(Score(sum(found.values()) / len(found), found if len(found) > 1 else {}))
        return scores


class Rouge1Reward(RougeReward):
    """ROUGE-1 F1."""

    name = "rouge1"
    types = ("rouge1",)


class Rouge2Reward(RougeReward):
    """ROUGE-2 F1."""

    name = "rouge2"
    types = ("rouge2",)


class RougeLReward(RougeReward):
    """ROUGE-L F1, on the text as one sequence."""

    name = "rougeL"
    types = ("rougeL",)


TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class RougeMetric(Metric):
    """See the module."""

    name = "rouge"

    def __init__(self, target: str | None = None, *, stemmer: bool = True) -> None:
        refuse_target(self.name, target)
        self._rouge = BestRouge(TYPES, stemmer=stemmer)

    def check(self, examples: Sequence[Example]) -> None:
        require_some_references(self.name, examples)

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        rows = [
            self._rouge.f1(example.references, text) if example.references else None
            for example, text in zip(examples, texts, strict=True)
        ]
        wordless = sum(bool(e.references) and not any(map(self._rouge.lines, e.references)) for e in examples)
        return MetricResult(
            {kind: [row[kind] if row is not None else None for row in rows] for kind in TYPES},
            signature(self.name, f"{self._rouge.settings},lsum=newline", examples),
            {"references_without_words": wordless} if wordless else {},
        )


ADJUSTED_TYPES = ("rouge1", "rouge2", "rougeL")


def length_factor(words: int, reference_words: int) -> float:
    """``exp(1 - max(n/m, m/n))`` in [0, 1]; 0 where one of the two is empty."""
    if not words or not reference_words:
        return 0.0
    return math.exp(1 - max(words / reference_words, reference_words / words))


class AdjustedRougeMetric(Metric):
    """See the module."""

    name = "rouge_adjusted"

    def __init__(self, target: str | None = None, *, stemmer: bool = True) -> None:
        refuse_target(self.name, target)
        self._rouge = BestRouge(ADJUSTED_TYPES, stemmer=stemmer)

    def check(self, examples: Sequence[Example]) -> None:
        require_some_references(self.name, examples)

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        rows = [
            self._best(e.references, text) if e.references else None for e, text in zip(examples, texts, strict=True)
        ]
        return MetricResult(
            {kind: [row[kind] if row is not None else None for row in rows] for kind in ADJUSTED_TYPES},
            signature(self.name, f"{self._rouge.settings},length=exp(1-max(n/m,m/n))", examples),
        )

    def _best(self, references: Sequence[str], text: str) -> dict[str, float]:
        found = []
        for reference in references:
            factor = length_factor(len(text.split()), len(reference.split()))
            found.append({kind: f1 * factor for kind, f1 in self._rouge.f1([reference], text).items()})
        return {kind: max(row[kind] for row in found) for kind in ADJUSTED_TYPES}
