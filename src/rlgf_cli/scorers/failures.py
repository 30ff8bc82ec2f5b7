"""Failures of texts that are found by rule (``failures.rules``), which a reader can check by eye."""

from __future__ import annotations

from collections.abc import Sequence

from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.failures import rules
from rlgf_cli.failures.rules import RULES, Response
from rlgf_cli.failures.sentences import words
from rlgf_cli.protocols import Example, Metric, MetricResult, Reward, Score
from rlgf_cli.scorers.base import refuse_target, signature

_RULE = (
    f"rules=1,copied={rules.COPIED_WORDS}words+{rules.COPIED_SHARE:g},overlong={rules.LONG_RATIO:g}x,"
    f"loops=3x(1..20words)|4grams>={rules.REPEATED_SHARE:g}"
)


class Failures(Reward, Metric):
    """As a reward: minus the number of rules that flag a text, or minus their ``share``; each rule
    is logged, 1 where it flags the text. As a metric: ``failures.any``, the share of texts that break a rule, and
    ``failures.RULE``, the share that breaks this one.

    ``rules``: those of the reward, all by default. ``unfinished`` goes by the end mark alone: how a model stopped is
    not known here. ``overlong`` compares with the longest reference: without one a reward finds nothing, and a metric
    skips the text there.
    """

    name = "failures"
    reward_only = frozenset({"rules", "share"})

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
        scores = []
        for response in _responses(examples, texts):
            broken = {name: float(rule(response)) for name, rule in self.rules.items()}
            scores.append(Score(-sum(broken.values()) / (len(broken) if self.share else 1), broken))
        return scores

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        responses = _responses(examples, texts)
        broken = [set(rules.flags(response)) for response in responses]
        values: dict[str, list[float | None]] = {"any": [float(bool(names)) for names in broken]}
        for rule in RULES:
            values[rule] = [
                None if rule == "overlong" and response.reference_words is None else float(rule in names)
                for response, names in zip(responses, broken, strict=True)
            ]
        if all(value is None for value in values["overlong"]):
            del values["overlong"]
        return MetricResult(values, signature(self.name, _RULE, examples))


def _responses(examples: Sequence[Example], texts: Sequence[str]) -> list[Response]:
    return [
        Response(e.prompt, text, max((len(words(reference)) for reference in e.references), default=None))
        for e, text in zip(examples, texts, strict=True)
    ]
