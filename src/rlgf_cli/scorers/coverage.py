"""Concept coverage: the share of an example's concepts that a text holds, in any regular inflection.

The rule, on lower-cased words (letters, digits, inner apostrophes and hyphens): a word covers a concept when
it equals it, or when the concept is what remains after one of these endings is taken off,

- ``s``, ``es``, ``ed``, ``d``, ``ing``;
- ``ies`` or ``ied`` with ``y`` put back (carries, carried: carry);
- ``ing`` with ``e`` put back (taking: take);
- ``ed`` or ``ing`` with a doubled consonant made single (running, stopped: run, stop);

and at least two letters remain. Irregular forms (ran, took, children) do not count. A concept of several
words is covered when each of its words is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example, Metric, MetricResult, Reward, Score
from rlgf_cli.scorers.base import refuse_target, signature

RULE = "rule=1"
"""Changes with the rule above, so that numbers of two rules are not compared."""

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def words(text: str) -> list[str]:
    """The lower-cased words of a text."""
    return _WORD.findall(text.lower())


def base_forms(word: str) -> set[str]:
    """The word and everything that it may be a regular inflection of (see the module)."""
    forms = {word}
    for ending, restored in (("s", ""), ("es", ""), ("d", ""), ("ies", "y"), ("ied", "y"), ("ing", "e")):
        if word.endswith(ending):
            forms.add(word.removesuffix(ending) + restored)
    for ending in ("ed", "ing"):
        if word.endswith(ending):
            stem = word.removesuffix(ending)
            forms.add(stem)
            if len(stem) > 2 and stem[-1] == stem[-2] and stem[-1] not in "aeiou":
                forms.add(stem[:-1])
    return {form for form in forms if len(form) >= 2 or form == word}


def concepts_of(example: Example) -> list[str]:
    """``meta["concepts"]`` where the example has it, else the words of its raw prompt; each once."""
    given = example.meta.get("concepts")
    if given is None:
        given = words(example.prompt)
    elif isinstance(given, str) or not all(isinstance(concept, str) for concept in given):
        raise UserError(f"meta.concepts of example {example.id!r} is not a list of strings")
    return list(dict.fromkeys(concept.lower() for concept in given if words(concept)))


def coverage(concepts: Sequence[str], text: str) -> float:
    """Share of ``concepts`` (at least one) that ``text`` covers, in [0, 1]."""
    if not concepts:
        raise ValueError("coverage of no concepts")
    held = set().union(*(base_forms(word) for word in words(text)))
    return sum(held.issuperset(words(concept)) for concept in concepts) / len(concepts)


class Coverage(Reward, Metric):
    """:func:`coverage` of each text. A metric skips examples without concepts, a reward refuses them."""

    name = "coverage"
    signature = f"coverage,{RULE}"

    def __init__(self, target: str | None = None) -> None:
        refuse_target(self.name, target)

    def check(self, examples: Sequence[Example]) -> None:
        for example in examples:
            if not concepts_of(example):
                raise UserError(
                    f"example {example.id!r} has no concepts: no meta.concepts, and no word in its prompt",
                    hint='give "meta": {"concepts": [...]} in the data',
                )

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        self.check(examples)
        return [Score(coverage(concepts_of(e), t)) for e, t in zip(examples, texts, strict=True)]

    def check_set(self, examples: Sequence[Example]) -> None:
        if not any(concepts_of(example) for example in examples):
            raise UserError(
                "the metric 'coverage' needs concepts, and no example has any",
                hint='give "meta": {"concepts": [...]} in the data',
            )

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        values = [coverage(c, t) if (c := concepts_of(e)) else None for e, t in zip(examples, texts, strict=True)]
        return MetricResult({"score": values}, signature(self.name, RULE, examples))
