"""Length of the texts."""

from __future__ import annotations

from collections.abc import Sequence

from rlgf_cli.metrics.base import scored_only, signature
from rlgf_cli.protocols import Example, MetricResult
from rlgf_cli.rewards.base import refuse_target


class LengthMetric:
    """``length.words`` (split at white space), ``length.characters`` (without the white space around the text) and
    ``length.ratio``: words by the mean words of the example's references, which must have some. An empty text has 0.
    """

    name = "length"

    def __init__(self, target: str | None = None) -> None:
        refuse_target(self.name, target)

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        words = [float(len(text.split())) for text in texts]
        expected = [_mean_words(example.references) for example in examples]
        values: dict[str, list[float | None]] = {
            "words": list(words),
            "characters": [float(len(text.strip())) for text in texts],
            "ratio": [count / mean if mean else None for count, mean in zip(words, expected, strict=True)],
        }
        return MetricResult(scored_only(values), signature(self.name, "words=whitespace", examples))


def _mean_words(references: Sequence[str]) -> float:
    """0 where there is no reference, or only empty ones."""
    return sum(len(reference.split()) for reference in references) / len(references) if references else 0.0
