"""Novel n-grams (See et al. 2017, section 6): how much of a text is not copied from its source.

``novel.n`` is the share of a text's n-grams, n = 1 to 4, that do not occur in its prompt. With ``against: FILE`` the
source is instead all prompts and references of that data file, each by itself: what is novel then was in no
training text. Words are lower-cased letters and digits (``scorers.coverage``). A text without an n-gram is
skipped; a figure for which no text has one is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.artifacts.rundir import file_sha256
from rlgf_cli.protocols import Example, Metric, MetricResult
from rlgf_cli.scorers.base import refuse_target, scored_only, signature
from rlgf_cli.scorers.coverage import words
from rlgf_cli.scorers.repetition import ngrams

ORDERS = (1, 2, 3, 4)
Grams = set[tuple[str, ...]]


class NovelMetric(Metric):
    """``novel.1`` to ``novel.4``. ``against``: the data file that is the source, instead of each text's prompt."""

    name = "novel"

    def __init__(self, target: str | None = None, *, against: str | None = None) -> None:
        refuse_target(self.name, target)
        self._known: Grams | None = None
        self._source = "prompt"
        if against is not None:
            self._known = set()
            for example in read_examples(against):
                for text in (example.prompt, *example.references):
                    self._known |= _grams(text)
            self._source = f"file,sha256={file_sha256(Path(against))[:12]}"

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        values: dict[str, list[float | None]] = {f"{n}": [] for n in ORDERS}
        for example, text in zip(examples, texts, strict=True):
            known = self._known if self._known is not None else _grams(example.prompt)
            tokens = words(text)
            for n in ORDERS:
                grams = ngrams(tokens, n)
                values[f"{n}"].append(sum(gram not in known for gram in grams) / len(grams) if grams else None)
        settings = f"words=letters+digits,rule=1,source={self._source}"
        return MetricResult(scored_only(values), signature(self.name, settings, examples))


def _grams(text: str) -> Grams:
    tokens = words(text)
    return {gram for n in ORDERS for gram in ngrams(tokens, n)}
