"""Length of the texts."""

from __future__ import annotations

from collections.abc import Sequence

from rlgf_cli.metrics.base import signature
from rlgf_cli.protocols import Example, MetricResult
from rlgf_cli.rewards.base import refuse_target


class LengthMetric:
    """Words per text, split at whitespace. An empty text has 0."""

    name = "length"

    def __init__(self, target: str | None = None) -> None:
        refuse_target(self.name, target)

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        values = [float(len(text.split())) for text in texts]
        return MetricResult({"words": values}, signature(self.name, "words=whitespace,rule=1", examples))
