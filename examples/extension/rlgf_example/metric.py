"""The metric ``questions``."""

from __future__ import annotations

from collections.abc import Sequence

from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example, Metric, MetricResult


class Questions(Metric):
    """``questions``: the share of texts that are a question, among the examples whose reference is one."""

    name = "questions"

    def __init__(self, target: str | None = None) -> None:
        if target is not None:
            raise UserError(f"'questions' takes nothing behind a colon (given: {target!r})", hint="write questions")

    def check_set(self, examples: Sequence[Example]) -> None:
        if not any(map(_asks, examples)):
            raise UserError("no example has a question as its reference", hint="leave the metric 'questions' out")

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        values = [
            float(text.strip().endswith("?")) if _asks(e) else None for e, text in zip(examples, texts, strict=True)
        ]
        return MetricResult({"score": values}, f"questions|rule=1|n={len(examples)}")


def _asks(example: Example) -> bool:
    return any(reference.strip().endswith("?") for reference in example.references)
