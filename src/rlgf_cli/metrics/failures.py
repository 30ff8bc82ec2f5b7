"""How many texts fail by rule (``failures.rules``): figures that a reader can check by eye."""

from __future__ import annotations

from collections.abc import Sequence

from rlgf_cli.failures import rules
from rlgf_cli.failures.pieces import words
from rlgf_cli.metrics.base import signature
from rlgf_cli.protocols import Example, MetricResult
from rlgf_cli.rewards.base import refuse_target

_RULE = (
    f"rules=1,copied={rules.COPIED_WORDS}words+{rules.COPIED_SHARE:g},overlong={rules.LONG_RATIO:g}x,"
    f"loops=3x(1..20words)|4grams>={rules.REPEATED_SHARE:g}"
)


class FailuresMetric:
    """``failures.any``: share of texts that break a rule; ``failures.RULE``: share that breaks this one.

    ``unfinished`` goes by the text alone (no end mark at its end): how a model stopped is not known here. A text
    without references cannot be ``overlong``: it is skipped there.
    """

    name = "failures"

    def __init__(self, target: str | None = None) -> None:
        refuse_target(self.name, target)

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        written = [
            rules.Written(e.prompt, text, max((len(words(r)) for r in e.references), default=None))
            for e, text in zip(examples, texts, strict=True)
        ]
        broken = [set(rules.flags(one)) for one in written]
        values: dict[str, list[float | None]] = {"any": [float(bool(names)) for names in broken]}
        for rule in rules.RULES:
            values[rule] = [
                None if rule == "overlong" and one.reference_words is None else float(rule in names)
                for one, names in zip(written, broken, strict=True)
            ]
        if all(value is None for value in values["overlong"]):
            del values["overlong"]
        return MetricResult(values, signature(self.name, _RULE, examples))
