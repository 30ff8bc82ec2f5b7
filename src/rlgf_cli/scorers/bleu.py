"""BLEU (Papineni et al. 2002) of single texts, with sacrebleu's own numbers (Post 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from sacrebleu.metrics.base import Metric as SacreMetric
from sacrebleu.metrics.bleu import BLEU

from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.protocols import CorpusFigure, Example, Metric, MetricResult, Reward, Score
from rlgf_cli.scorers.base import (
    refuse_target,
    require_references,
    require_some_references,
    signature,
    written,
    written_references,
)

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
            f"{scorer}: sacrebleu downloads a model for the tokenizer {tokenize!r}, which rlgf does not do behind you",
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


class BleuReward(Reward):
    """Sentence BLEU against all references, in [0, 1]: a hundredth of sacrebleu's.

    Exponential smoothing and effective order. ``brevity_penalty`` is logged too: a policy that writes ever shorter
    texts shows there.
    """

    name = "bleu"

    def __init__(
        self, target: str | None = None, *, tokenize: str = DEFAULT_TOKENIZER, lowercase: bool = False
    ) -> None:
        refuse_target(self.name, target)
        self._bleu = sentence_bleu(f"the reward {self.name!r}", tokenize=tokenize, lowercase=lowercase)
        self.signature = f"{self.name},{sacrebleu_signature(self._bleu).replace('|', ',')},scale=1"

    def check(self, examples: Sequence[Example]) -> None:
        require_references(self.name, examples)

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        self.check(examples)
        found = [self._bleu.sentence_score(t, written(e.references)) for e, t in zip(examples, texts, strict=True)]
        # sacrebleu's rounding gives 100.00000000000004 for an equal text
        return [Score(min(one.score / 100, 1.0), {"brevity_penalty": one.bp}) for one in found]


class BleuMetric(Metric):
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
