"""ROUGE F1 against the best reference, with the ``rouge-score`` package's own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import ClassVar

from nltk.stem.porter import PorterStemmer
from rouge_score import tokenize
from rouge_score.rouge_scorer import RougeScorer

from rlgf_cli.protocols import Example, Score
from rlgf_cli.rewards.base import refuse_target, require_references


class CachedTokenizer:
    """rouge-score's tokenizer (lower case, a-z and 0-9 only, Porter stems of words over 3 letters).

    It remembers stems and texts: in training the same references come again and again, and the stemmer is
    most of ROUGE's time.
    """

    def __init__(self, stemmer: bool) -> None:
        self._stemmer = _CachedStemmer() if stemmer else None
        self.tokenize = lru_cache(maxsize=50_000)(self._tokenize)

    def _tokenize(self, text: str) -> list[str]:
        return tokenize.tokenize(text, self._stemmer)


class _CachedStemmer:
    def __init__(self) -> None:
        self.stem = lru_cache(maxsize=200_000)(PorterStemmer().stem)


class BestRouge:
    """F1 of each ROUGE type; with several references the best one, chosen for each type by itself."""

    def __init__(self, types: Sequence[str], *, stemmer: bool) -> None:
        self.types = tuple(types)
        self.tokenizer = CachedTokenizer(stemmer)
        self._scorer = RougeScorer(list(types), tokenizer=self.tokenizer)
        self.settings = f"rouge-score={version('rouge-score')},stemmer={'yes' if stemmer else 'no'},references=max"

    def f1(self, references: Sequence[str], text: str) -> dict[str, float]:
        """``{type: F1}``. An empty text has F1 0; no references are a ValueError."""
        if not references:
            raise ValueError("ROUGE needs a reference")
        scores = self._scorer.score_multi(list(references), text)
        return {kind: float(scores[kind].fmeasure) for kind in self.types}


class RougeReward:
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
