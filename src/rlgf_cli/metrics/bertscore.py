"""BERTScore as a metric; what is scored how is stated in ``rewards.bertscore``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from rlgf_cli.metrics.base import require_some_references, signature
from rlgf_cli.protocols import Example, MetricResult
from rlgf_cli.rewards.bertscore import BestBertScore

_FIGURES = ("precision", "recall", "f1")


class BertScoreMetric:
    """``bertscore`` or ``bertscore:MODEL``, a hub name or a folder with an encoder.

    ``idf`` weights tokens by their rarity in the references of the set; the other parameters are those of
    :class:`BestBertScore`. A text without tokens is counted (``empty_texts``), an example without references
    skipped.
    """

    name = "bertscore"

    def __init__(
        self,
        model: str | None = None,
        *,
        num_layers: Annotated[int, Field(ge=0)] | None = None,
        idf: bool = False,
        rescale: bool = False,
        lang: str | None = None,
        batch_size: Annotated[int, Field(ge=1)] = 64,
        device: str = "auto",
    ) -> None:
        self.idf = idf
        self._scorer = BestBertScore(
            model, num_layers=num_layers, rescale=rescale, lang=lang, batch_size=batch_size, device=device
        )

    def check(self, examples: Sequence[Example]) -> None:
        require_some_references(self.name, examples)

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        scorer = self._scorer
        references = [example.references for example in examples]
        idf = scorer.idf([r for group in references for r in group if scorer.has_tokens(r)]) if self.idf else None
        rows = scorer.rows(texts, references, idf)
        empty = sum(not scorer.has_tokens(text) for text in texts)
        return MetricResult(
            {key: [None if row is None else row[k] for row in rows] for k, key in enumerate(_FIGURES)},
            signature(self.name, f"{scorer.settings},idf={'references' if self.idf else 'no'}", examples),
            {"empty_texts": empty} if empty else {},
        )
