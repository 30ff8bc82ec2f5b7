"""chrF2 and chrF2++ (Popovic 2015, 2017) with sacrebleu's numbers, 0 to 100.

Figures: ``chrf``, of the set of texts as a whole (n-gram counts are summed first), and ``chrf.sentence``, the mean of
the texts' own chrF. Character n-grams of 1 to 6, beta 2; ``word_order: 2`` makes it chrF2++. Multi-reference rule,
sacrebleu's: the reference with the best chrF, for each text. Examples may have different numbers of references. An
empty text scores 0; blank references are dropped and counted; an example without references is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from sacrebleu.metrics.chrf import CHRF

from rlgf_cli.protocols import CorpusFigure, Example, MetricResult
from rlgf_cli.scorers.base import ReferenceMetric, nonblank_references, refuse_target, signature
from rlgf_cli.scorers.bleu import sacrebleu_signature
from rlgf_cli.stats.aggregates import chrf


class ChrfMetric(ReferenceMetric):
    """``chrf`` and ``chrf.sentence``. ``whitespace``: whether spaces count as characters."""

    name = "chrf"

    def __init__(
        self,
        target: str | None = None,
        *,
        word_order: Annotated[int, Field(ge=0, le=4)] = 0,
        lowercase: bool = False,
        whitespace: bool = False,
    ) -> None:
        refuse_target(self.name, target)
        self._chrf = CHRF(word_order=word_order, lowercase=lowercase, whitespace=whitespace)

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        groups, counts = nonblank_references(examples)
        rows = [self._row(group, text) if group else None for group, text in zip(groups, texts, strict=True)]
        return MetricResult(
            {"sentence": [None if row is None else float(chrf(np.array(row))) for row in rows]},
            signature(self.name, sacrebleu_signature(self._chrf, groups), examples),
            counts,
            corpus={"score": CorpusFigure(rows, "chrf")},
        )

    def _row(self, references: Sequence[str], text: str) -> list[int]:
        """The counts against the best reference; sacrebleu has them for its own significance tests only."""
        (row,) = self._chrf._extract_corpus_statistics([text], [[reference] for reference in references])
        return list(row)
