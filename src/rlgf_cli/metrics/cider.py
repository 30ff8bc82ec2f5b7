"""CIDEr-D with pycocoevalcap's numbers, 0 to 10; what it is stands in ``rewards.cider``.

The figure is the mean over texts, each against the mean of its references. By default n-grams are weighted by their
rarity in the references of the evaluated set, as pycocoevalcap's ``Cider`` does: a value then depends on the set. With
``references``, a data file, it does not. An empty text scores 0; blank references are dropped and counted; an example
without references is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlgf_cli.errors import UserError
from rlgf_cli.metrics.base import require_some_references, signature, written_references
from rlgf_cli.protocols import Example, MetricResult
from rlgf_cli.rewards import captions
from rlgf_cli.rewards.base import refuse_target
from rlgf_cli.rewards.cider import Cider


class CiderMetric:
    """See the module. ``tokenizer: ptb`` is the package's own, in Java; ``treebank`` is nltk's."""

    name = "cider"

    def __init__(
        self, target: str | None = None, *, references: str | None = None, tokenizer: captions.Tokenizer = "treebank"
    ) -> None:
        refuse_target(self.name, target)
        self._cider = Cider(self.name, tokenizer=tokenizer, references=references)

    def check(self, examples: Sequence[Example]) -> None:
        require_some_references(self.name, examples)
        if not self._cider.fixed and sum(map(bool, written_references(examples)[0])) < 2:
            raise UserError(
                "cider needs references of two examples at least to know what is rare; here is one",
                hint="evaluate more examples, or give params: {references: train.jsonl}",
            )

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        groups, counts = written_references(examples)
        scored = [(group, text) for group, text in zip(groups, texts, strict=True) if group]
        found = iter(self._cider.scores([group for group, _ in scored], [text for _, text in scored]))
        values = [next(found) if group else None for group in groups]
        return MetricResult({"score": values}, signature(self.name, self._cider.settings, examples), counts)
