"""ROUGE that a text cannot raise by its length.

For one reference, with ``n`` words in the text and ``m`` in the reference (split at white space)::

    adjusted = F1 * exp(1 - max(n / m, m / n))

Equal length leaves F1 as it is; a text twice as long, or half as long, keeps exp(-1) = .368 of it; an empty one scores
0. F1 charges length once already, by precision and recall; this charges it again, on both sides alike, as BLEU's
brevity penalty does on one. Multi-reference rule: the best reference, for each figure by itself. Solway
(arXiv 2408.16753) reports a length-adjusted ROUGE whose definition could not be read; this one is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlgf_cli.metrics.base import require_some_references, signature
from rlgf_cli.protocols import Example, MetricResult
from rlgf_cli.rewards.base import refuse_target
from rlgf_cli.rewards.rouge import BestRouge

TYPES = ("rouge1", "rouge2", "rougeL")


def length_factor(words: int, reference_words: int) -> float:
    """``exp(1 - max(n/m, m/n))`` in [0, 1]; 0 where one of the two is empty."""
    if not words or not reference_words:
        return 0.0
    return math.exp(1 - max(words / reference_words, reference_words / words))


class AdjustedRougeMetric:
    """See the module."""

    name = "rouge_adjusted"

    def __init__(self, target: str | None = None, *, stemmer: bool = True) -> None:
        refuse_target(self.name, target)
        self._rouge = BestRouge(TYPES, stemmer=stemmer)

    def check(self, examples: Sequence[Example]) -> None:
        require_some_references(self.name, examples)

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        rows = [
            self._best(e.references, text) if e.references else None for e, text in zip(examples, texts, strict=True)
        ]
        return MetricResult(
            {kind: [row[kind] if row is not None else None for row in rows] for kind in TYPES},
            signature(self.name, f"{self._rouge.settings},length=exp(1-max(n/m,m/n))", examples),
        )

    def _best(self, references: Sequence[str], text: str) -> dict[str, float]:
        found = []
        for reference in references:
            factor = length_factor(len(text.split()), len(reference.split()))
            found.append({kind: f1 * factor for kind, f1 in self._rouge.f1([reference], text).items()})
        return {kind: max(row[kind] for row in found) for kind in TYPES}
