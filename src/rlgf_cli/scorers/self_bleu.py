"""Self-BLEU (Zhu et al. 2018, "Texygen"): how alike the texts of a set are, 0 to 100; lower is more diverse.

The mean over texts of the sentence BLEU of each with all others as its references, in sacrebleu's numbers (tokeniser
13a, exponential smoothing, effective order, case kept). It grows with the number of texts. A text without tokens is
skipped, counted (``empty_texts``), and no reference for the others.

A text's value depends on the other texts. The interval draws the values as they are: it does not say how the
figure would move with another set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from sacrebleu.metrics import BLEU
from sacrebleu.metrics.helpers import extract_all_word_ngrams

from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example, Metric, MetricResult
from rlgf_cli.scorers.base import refuse_target, signature

ORDER = 4


class SelfBleuMetric(Metric):
    """``self_bleu``: the mean BLEU of each text against all others."""

    name = "self_bleu"

    def __init__(self, target: str | None = None) -> None:
        refuse_target(self.name, target)

    def check_set(self, examples: Sequence[Example]) -> None:
        if len(examples) < 2:
            raise UserError("the metric 'self_bleu' compares texts, and there is one", hint="leave it out")

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        grams = counted(texts)
        nonempty = [i for i, (_, length) in enumerate(grams) if length]
        values: list[float | None] = [None] * len(texts)
        if len(nonempty) > 1:
            for i, value in zip(nonempty, self_bleu([grams[i] for i in nonempty]), strict=True):
                values[i] = value
        settings = f"sacrebleu={version('sacrebleu')},tok=13a,case=mixed,smooth=exp,eff=yes,references=all others"
        empty = len(texts) - len(nonempty)
        return MetricResult(
            {"score": values}, signature(self.name, settings, examples), {"empty_texts": empty} if empty else {}
        )


def counted(texts: Sequence[str]) -> list[tuple[Counter[tuple[str, ...]], int]]:
    """Each text's n-grams up to ``ORDER`` and its length in words."""
    tokenise = BLEU().tokenizer
    return [extract_all_word_ngrams(tokenise(text.rstrip()), 1, ORDER) for text in texts]


def self_bleu(texts: Sequence[tuple[Counter[tuple[str, ...]], int]]) -> list[float]:
    """Sentence BLEU of each text (as :func:`counted`) with all others as references.

    BLEU clips an n-gram's count at the most that a reference has of it. The most among all texts but one follows
    from the two largest counts, so that the set is counted once and not once per text.
    """
    most: dict[tuple[str, ...], tuple[int, int]] = {}
    for grams, _ in texts:
        for gram, count in grams.items():
            first, second = most.get(gram, (0, 0))
            most[gram] = (count, first) if count > first else (first, max(second, count))
    lengths = Counter(length for _, length in texts)
    return [_bleu(grams, length, most, _closest(length, lengths)) for grams, length in texts]


def _bleu(
    grams: Counter[tuple[str, ...]], length: int, most: Mapping[tuple[str, ...], tuple[int, int]], closest: int
) -> float:
    correct, total = [0] * ORDER, [0] * ORDER
    for gram, count in grams.items():
        first, second = most[gram]
        total[len(gram) - 1] += count
        correct[len(gram) - 1] += min(count, second if count == first else first)
    return float(BLEU.compute_bleu(correct, total, length, closest, smooth_method="exp", effective_order=True).score)


def _closest(length: int, lengths: Counter[int]) -> int:
    """The length among the others that is nearest, the shorter of two; ``lengths`` counts the text's own too."""
    if lengths[length] > 1:
        return length
    return min((other for other in lengths if other != length), key=lambda other: (abs(other - length), other))
