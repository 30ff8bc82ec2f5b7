"""ROUGE with the ``rouge-score`` package's numbers.

Figures: F1 of ROUGE-1, -2, -L and -Lsum. Multi-reference rule: the best reference, for each figure by
itself. The stemmer is on by default. ROUGE-Lsum takes each line of a text for a sentence, as the package
does: on texts of one line it equals ROUGE-L. The mean over examples is the plain mean. An empty text
scores 0; an example without references is skipped. Only a-z and 0-9 count as letters, so references in
other scripts score 0: those are counted (``references_without_words``).
"""

from __future__ import annotations

from collections.abc import Sequence

from rlgf_cli.metrics.base import require_some_references, signature
from rlgf_cli.protocols import Example, MetricResult
from rlgf_cli.rewards.base import refuse_target
from rlgf_cli.rewards.rouge import BestRouge

TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class RougeMetric:
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
