"""Concept coverage as a metric; the rule is stated in ``rewards.coverage``."""

from __future__ import annotations

from collections.abc import Sequence

from rlgf_cli.errors import UserError
from rlgf_cli.metrics.base import signature
from rlgf_cli.protocols import Example, MetricResult
from rlgf_cli.rewards.base import refuse_target
from rlgf_cli.rewards.coverage import RULE, concepts_of, coverage


class CoverageMetric:
    """Share of an example's concepts that its text holds; examples without concepts are skipped."""

    name = "coverage"

    def __init__(self, target: str | None = None) -> None:
        refuse_target(self.name, target)

    def check(self, examples: Sequence[Example]) -> None:
        if not any(concepts_of(example) for example in examples):
            raise UserError(
                "the metric 'coverage' needs concepts, and no example has any",
                hint='give "meta": {"concepts": [...]} in the data',
            )

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        values = []
        for example, text in zip(examples, texts, strict=True):
            concepts = concepts_of(example)
            values.append(coverage(concepts, text) if concepts else None)
        return MetricResult({"score": values}, signature(self.name, RULE, examples))
