"""BLEU (Papineni et al. 2002) with sacrebleu's own numbers (Post 2018), 0 to 100.

Smoothing is exponential, sacrebleu's default. Multi-reference rule, sacrebleu's: counts clipped by the largest count in
any reference, and the reference length that is closest to the text's. Examples may have different numbers of
references.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from sacrebleu.metrics.base import Metric as SacreMetric
from sacrebleu.metrics.bleu import BLEU

from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.protocols import CorpusFigure, Example, MetricResult, Score
from rlgf_cli.scorers.base import ReferenceScorer, nonblank, nonblank_references, refuse_target, signature

DEFAULT_TOKENIZER = "13a"
_DOWNLOADED = {"spm", "flores101", "flores200", "spBLEU-1K"}


def sentence_bleu(scorer: str, *, tokenize: str, lowercase: bool) -> BLEU:
    """sacrebleu's BLEU for :meth:`BLEU.sentence_score`: exponential smoothing, n-gram orders up to the text's length
    (effective order). Raises UserError for a tokenizer that is unknown or lacks something.
    """
    if tokenize not in BLEU.TOKENIZERS:
        raise UserError(f"{scorer}: unknown tokenizer {tokenize!r}", hint=did_you_mean(tokenize, BLEU.TOKENIZERS))
    if tokenize in _DOWNLOADED:
        raise UserError(
            f"{scorer}: sacrebleu downloads a model for the tokenizer {tokenize!r}, which rlgf does not do",
            hint="take 13a, intl, zh or char, or split the texts beforehand and give tokenize: none",
        )
    try:
        return BLEU(tokenize=tokenize, lowercase=lowercase, effective_order=True)
    except RuntimeError:  # how sacrebleu says that a package is missing
        extra = tokenize.partition("-")[0]
        raise UserError(
            f"{scorer}: the tokenizer {tokenize!r} needs packages that are not installed",
            hint=f"pip install 'sacrebleu[{extra}]'",
        ) from None


def sacrebleu_signature(metric: SacreMetric, references: Sequence[Sequence[str]] = ()) -> str:
    """The library's version and its own signature of a metric on texts with these references; without any: of any
    number.
    """
    numbers = {len(group) for group in references if group}
    metric.num_refs = numbers.pop() if len(numbers) == 1 else -1  # sacrebleu writes "var" for -1
    return f"sacrebleu={version('sacrebleu')}|{metric.get_signature().format()}"


class Bleu(ReferenceScorer):
    """As a reward: sentence BLEU in [0, 1], a hundredth of sacrebleu's; ``brevity_penalty`` is logged too, where a
    policy shows that writes ever shorter texts. As a metric: ``bleu`` of the set as a whole (no mean over texts: n-gram
    counts and lengths are summed first), and ``bleu.sentence``, the mean of sentence BLEU.

    An empty text counts with its references' length and has sentence BLEU 0; blank references are dropped and counted.
    ``tokenize``: one of sacrebleu's that needs no download (13a, intl, zh, char, none).
    """

    name = "bleu"

    def __init__(
        self, target: str | None = None, *, tokenize: str = DEFAULT_TOKENIZER, lowercase: bool = False
    ) -> None:
        refuse_target(self.name, target)
        self._bleu = sentence_bleu(self.name, tokenize=tokenize, lowercase=lowercase)
        self._corpus = BLEU(tokenize=tokenize, lowercase=lowercase)  # the same counts, for its signature
        self.signature = f"{self.name},{sacrebleu_signature(self._bleu).replace('|', ',')},scale=1"

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        self.check(examples)
        rows = [self._bleu.sentence_score(t, nonblank(e.references)) for e, t in zip(examples, texts, strict=True)]
        # sacrebleu's rounding gives 100.00000000000004 for an equal text
        return [Score(min(row.score / 100, 1.0), {"brevity_penalty": row.bp}) for row in rows]

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        groups, counts = nonblank_references(examples)
        sentences = [self._bleu.sentence_score(t, g) if g else None for g, t in zip(groups, texts, strict=True)]
        rows = [None if s is None else [s.sys_len, s.ref_len, *s.counts, *s.totals] for s in sentences]
        return MetricResult(
            {"sentence": [None if s is None else s.score for s in sentences]},
            signature(self.name, f"{sacrebleu_signature(self._corpus, groups)}|sentence=effective-order", examples),
            counts,
            corpus={"score": CorpusFigure(rows, "bleu")},
        )
