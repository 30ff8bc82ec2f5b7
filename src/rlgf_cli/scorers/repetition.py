"""Repetition within a text, as degenerate samples have it.

Words are split at white space and lower-cased. A text in which nothing repeats has 0, an empty one too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from rlgf_cli.protocols import Example, Metric, MetricResult, Reward, Score
from rlgf_cli.scorers.base import refuse_target, signature

ORDERS = (2, 3, 4)


class Repetition(Reward, Metric):
    """As a reward: minus the share of a text's n-grams that repeat an earlier one, in [-1, 0]. As a metric:
    ``repetition.n``, the same share for n = 2, 3, 4, and ``repetition.loop``, the share of a text's words in its
    longest loop, a stretch that says the same words again at once, twice or more.
    """

    name = "repetition"
    reward_only = frozenset({"n"})

    def __init__(self, target: str | None = None, *, n: Annotated[int, Field(ge=1)] = 3) -> None:
        refuse_target(self.name, target)
        self.n = n
        self.signature = f"repetition,rule=1,n={n}"

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        return [Score(-repeated_share(text.lower().split(), self.n)) for text in texts]

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        tokens = [text.lower().split() for text in texts]
        values: dict[str, list[float | None]] = {f"{n}": [repeated_share(t, n) for t in tokens] for n in ORDERS}
        values["loop"] = [loop_share(t) for t in tokens]
        return MetricResult(values, signature(self.name, "words=whitespace,lower,rule=1", examples))


def repeated_share(tokens: Sequence[str], n: int) -> float:
    """``1 - distinct n-grams / n-grams``; 0 where there is no n-gram."""
    grams = ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All n-grams in order, repeated ones too."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def loop_share(tokens: Sequence[str]) -> float:
    """Length of the longest loop by that of the text, in [0, 1].

    A loop of period p is a stretch of at least 2 p words in which each equals the one p places before it.
    """
    number = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    ids = np.array([number[token] for token in tokens])
    longest = 0
    for period in range(1, len(ids) // 2 + 1):
        differs = np.flatnonzero(ids[period:] != ids[:-period])
        ends = np.concatenate([[-1], differs, [len(ids) - period]])
        run = int(np.diff(ends).max()) - 1  # words that equal the one a period before, at a stretch
        if run >= period:
            longest = max(longest, run + period)
    return longest / len(tokens) if longest else 0.0
