"""Helpers of rewards and metrics: signatures, references, counts, texts in messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example, Metric, Reward


def signature_of(reward: Reward) -> str:
    """The reward's signature; its name where it has none."""
    return reward.signature or reward.name


def counted_since(before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    """The increases of a reward's counts from ``before`` to ``now``, without zeros."""
    return {key: n - before.get(key, 0) for key, n in now.items() if n != before.get(key, 0)}


def refuse_target(name: str, target: str | None) -> None:
    """For scorers that take no ``name:TARGET``."""
    if target is not None:
        raise UserError(f"{name!r} takes nothing behind a colon (given: {target!r})", hint=f"write {name}")


def nonblank(references: Sequence[str]) -> list[str]:
    """The references that are not blank: a blank one is no measure of a text."""
    return [reference for reference in references if reference.strip()]


def require_references(name: str, examples: Sequence[Example]) -> None:
    """Every example must have a reference that is not blank: a reward cannot skip one."""
    without = [e.id for e in examples if not nonblank(e.references)]
    if without:
        raise UserError(
            f"the reward {name!r} needs references; {len(without)} of {len(examples)} examples have none "
            f"(first: {without[0]!r})",
            hint="add references to the data, or choose a reward that needs none",
        )


def shorten(text: Any, limit: int = 200) -> str:
    """A text on one line, cut in the middle where it is long."""
    line = " ".join(str(text).split())
    if len(line) <= limit:
        return line
    half = (limit - 5) // 2
    return f"{line[:half]} ... {line[-half:]}"


def signature(metric: str, settings: str, examples: Sequence[Example]) -> str:
    """``metric|settings|n=N``: two values may be compared where their signatures are equal."""
    return "|".join(part for part in (metric, settings, f"n={len(examples)}") if part)


def scored_only(values: Mapping[str, Sequence[float | None]]) -> Mapping[str, Sequence[float | None]]:
    """The figures that some example has a value of; all of them where none has, so that the refusal names one."""
    return {key: column for key, column in values.items() if any(v is not None for v in column)} or values


class ReferenceMetric(Metric):
    """A metric that compares texts with references. Examples without any are skipped; there must be some with."""

    def check_set(self, examples: Sequence[Example]) -> None:
        if not any(nonblank(example.references) for example in examples):
            raise UserError(
                f"the metric {self.name!r} needs references, and no example has any",
                hint='give "references": [...] in the data',
            )


class ReferenceScorer(ReferenceMetric, Reward):
    """A reward and metric that compares texts with references. A reward cannot skip an example without any."""

    def check(self, examples: Sequence[Example]) -> None:
        require_references(self.name, examples)


def nonblank_references(examples: Sequence[Example]) -> tuple[list[list[str]], dict[str, int]]:
    """Each example's references that are not blank, and the count of those that are (empty where none is)."""
    groups = [nonblank(example.references) for example in examples]
    blank = sum(len(example.references) - len(group) for example, group in zip(examples, groups, strict=True))
    return groups, {"blank_references": blank} if blank else {}
