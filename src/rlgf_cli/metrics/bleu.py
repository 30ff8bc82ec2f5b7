"""BLEU with sacrebleu's numbers, 0 to 100.

Figures: ``bleu``, of the set of texts as a whole (it is no mean over texts: n-gram counts and lengths are summed
first), and ``bleu.sentence``, the mean of sentence BLEU with effective order. Smoothing is exponential in both,
sacrebleu's default. Multi-reference rule, sacrebleu's: counts clipped by the largest count in any reference, and the
reference length that is closest to the text's. Examples may have different numbers of references. An empty text
counts with its references' length and has sentence BLEU 0; blank references are dropped and counted; an example
without references is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

from sacrebleu.metrics.bleu import BLEU

from rlgf_cli.metrics.base import require_some_references, signature, written_references
from rlgf_cli.protocols import CorpusFigure, Example, MetricResult
from rlgf_cli.rewards.base import refuse_target
from rlgf_cli.rewards.bleu import DEFAULT_TOKENIZER, sacrebleu_signature, sentence_bleu


class BleuMetric:
    """See the module. ``tokenize``: one of sacrebleu's that needs no download (13a, intl, zh, char, none)."""

    name = "bleu"

    def __init__(
        self, target: str | None = None, *, tokenize: str = DEFAULT_TOKENIZER, lowercase: bool = False
    ) -> None:
        refuse_target(self.name, target)
        self._bleu = sentence_bleu(f"the metric {self.name!r}", tokenize=tokenize, lowercase=lowercase)
        self._corpus = BLEU(tokenize=tokenize, lowercase=lowercase)  # the same counts, for its signature

    def check(self, examples: Sequence[Example]) -> None:
        require_some_references(self.name, examples)

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        groups, counts = written_references(examples)
        found = [self._bleu.sentence_score(t, g) if g else None for g, t in zip(groups, texts, strict=True)]
        rows = [None if one is None else [one.sys_len, one.ref_len, *one.counts, *one.totals] for one in found]
        return MetricResult(
            {"sentence": [None if one is None else one.score for one in found]},
            signature(self.name, f"{sacrebleu_signature(self._corpus, groups)}|sentence=effective-order", examples),
            counts,
            corpus={"score": CorpusFigure(rows, "bleu")},
        )
