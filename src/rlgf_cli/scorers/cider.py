"""CIDEr-D (Vedantam et al. 2015, section 5) with pycocoevalcap's own scorer.

CIDEr commonly means the D variant: clipped counts and a Gaussian penalty on the difference in length (sigma 6), the
mean over n-grams of 1 to 4 words of the tf-idf cosine, and the mean over the references. The package multiplies by 10.
N-grams are weighted by their rarity among *documents*, a document being all references of one example: those of the
evaluated set, or those of a data file, which makes a value independent of its set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.artifacts.rundir import file_sha256
from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example, MetricResult, Score
from rlgf_cli.scorers import captions
from rlgf_cli.scorers.base import ReferenceScorer, nonblank, nonblank_references, refuse_target, signature


class Cider(ReferenceScorer):
    """As a reward: a tenth of CIDEr-D, in [0, 1]. As a metric: the mean over texts, 0 to 10.

    ``references``: the data file whose references say how rare an n-gram is. A reward needs it: a text's reward must
    not depend on the other texts of its batch. A metric without it counts the references of the evaluated set, as
    pycocoevalcap's ``Cider`` does. ``tokenizer: ptb`` is the package's own, in Java; ``treebank`` is nltk's. An empty
    text scores 0; blank references are dropped and counted.
    """

    name = "cider"

    def __init__(
        self, target: str | None = None, *, references: str | None = None, tokenizer: captions.Tokenizer = "treebank"
    ) -> None:
        refuse_target(self.name, target)
        self._scorer = captions.module(self.name, "cider.cider_scorer").CiderScorer
        self._tokenize, tokenizer_name = captions.tokenizer(self.name, tokenizer)
        self.fixed = references is not None
        frequencies = "references"
        if references is not None:
            counts, documents = self._frequencies(references)
            self._scorer = _with_frequencies(self._scorer, counts, documents)
            frequencies = f"sha256:{file_sha256(Path(references))[:12]},documents={documents}"
        self.settings = (
            f"pycocoevalcap={version('pycocoevalcap')},variant=d,order=4,sigma=6,tokenizer={tokenizer_name}"
            f",references=mean,frequencies={frequencies}"
        )
        self.signature = f"{self.name},{self.settings},scale=1"

    def check(self, examples: Sequence[Example]) -> None:
        if not self.fixed:
            raise UserError(
                "the reward 'cider' needs a file whose references say how rare a word is",
                hint="params: {references: train.jsonl}",
            )
        super().check(examples)

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        self.check(examples)
        values = self.scores([nonblank(example.references) for example in examples], texts)
        return [Score(min(value / 10, 1.0)) for value in values]

    def check_set(self, examples: Sequence[Example]) -> None:
        super().check_set(examples)
        if not self.fixed and sum(map(bool, nonblank_references(examples)[0])) < 2:
            raise UserError(
                "cider needs references of two examples at least to know what is rare; here is one",
                hint="evaluate more examples, or give params: {references: train.jsonl}",
            )

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        groups, counts = nonblank_references(examples)
        scored = [(group, text) for group, text in zip(groups, texts, strict=True) if group]
        scores = iter(self.scores([group for group, _ in scored], [text for _, text in scored]))
        values = [next(scores) if group else None for group in groups]
        return MetricResult({"score": values}, signature(self.name, self.settings, examples), counts)

    def scores(self, references: Sequence[Sequence[str]], texts: Sequence[str]) -> list[float]:
        """One value per text in [0, 10]. ``references[i]`` (one at least) are those of ``texts[i]``."""
        scorer = self._scorer()
        for text, group in zip(self._tokenize(texts), self._groups(references), strict=True):
            scorer += (text, group)
        if not self.fixed:
            scorer.compute_doc_freq()
        return [float(value) for value in scorer.compute_cider()]

    def _groups(self, references: Sequence[Sequence[str]]) -> list[list[str]]:
        """The tokenised references, all in one call."""
        split = iter(self._tokenize([reference for group in references for reference in group]))
        return [[next(split) for _ in group] for group in references]

    def _frequencies(self, path: str) -> tuple[Mapping[tuple[str, ...], float], int]:
        """In how many examples' references each n-gram stands, and how many examples those are."""
        groups = [group for example in read_examples(path) if (group := nonblank(example.references))]
        if len(groups) < 2:
            raise UserError(
                f"cider needs references of two examples at least to know what is rare; here are {len(groups)}",
                where=path,
                hint="name the training data",
            )
        counter = self._scorer()
        for group in self._groups(groups):
            counter += (None, group)
        counter.compute_doc_freq()
        return _Counts(counter.document_frequency), len(groups)


class _Counts(dict[tuple[str, ...], float]):
    """The scorer reads counts of unseen n-grams too; its own dictionary grows by each."""

    def __missing__(self, key: tuple[str, ...]) -> float:
        return 0.0


def _with_frequencies(scorer: Any, counts: Mapping[tuple[str, ...], float], documents: int) -> Any:
    """The package's scorer with fixed frequencies: ``compute_cider`` would set ``ref_len``, the logarithm of the
    number of documents, from the texts at hand.
    """

    class Fixed(scorer):
        ref_len = property(lambda self: math.log(documents), lambda self, value: None)

        def __init__(self) -> None:
            super().__init__()
            self.document_frequency = counts

    return Fixed
