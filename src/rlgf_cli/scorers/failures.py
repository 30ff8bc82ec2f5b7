"""How many texts fail by rule (``failures.rules``): figures that a reader can check by eye."""

from __future__ import annotations

from collections.abc import Sequence

from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.failures import rules
from rlgf_cli.failures.rules import RULES, Written
from rlgf_cli.failures.sentences import words
from rlgf_cli.protocols import Example, Metric, MetricResult, Reward, Score
from rlgf_cli.scorers.base import refuse_target, signature

_RULE = (
    f"rules=1,copied={rules.COPIED_WORDS}words+{rules.COPIED_SHARE:g},overlong={rules.LONG_RATIO:g}x,"
    f"loops=3x(1..20words)|4grams>={rules.REPEATED_SHARE:g}"
)


class FailuresPenalty(Reward):
    """Minus the number of failures that are found in a text by rule (``failures.rules``), or minus their ``share``.

    ``rules``: the ones to look with, all by default. Each is logged, 1 where it found something. ``overlong`` is held
    against the longest reference and finds nothing without one; ``unfinished`` goes by the end mark alone.
    """

    name = "failures"

    def __init__(self, target: str | None = None, *, rules: list[str] | None = None, share: bool = False) -> None:
        refuse_target(self.name, target)
        chosen = list(RULES) if rules is None else rules
        if not chosen:
            raise UserError("the reward 'failures' needs a rule", hint=f"known: {', '.join(RULES)}")
        for name in chosen:
            if name not in RULES:
                raise UserError(f"unknown rule {name!r} of the reward 'failures'", hint=did_you_mean(name, RULES))
        self.rules = {name: RULES[name] for name in RULES if name in chosen}
        self.share = share
        self.signature = f"failures,rules={'+'.join(self.rules)},share={'yes' if share else 'no'}"

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        return [self._score(example, text) for example, text in zip(examples, texts, strict=True)]

    def _score(self, example: Example, text: str) -> Score:
        longest = max((len(words(reference)) for reference in example.references), default=None)
        written = Written(example.prompt, text, longest)
        found = {name: float(rule(written)) for name, rule in self.rules.items()}
        return Score(-sum(found.values()) / (len(found) if self.share else 1), found)


class FailuresMetric(Metric):
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
