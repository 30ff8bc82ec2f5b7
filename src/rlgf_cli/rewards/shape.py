"""Penalties on a text's shape. Both are at most 0, and 0 where there is nothing to object to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example, Score
from rlgf_cli.rewards.base import refuse_target

Count = Annotated[int, Field(ge=0)]


class LengthPenalty:
    """Minus the number of words (split at whitespace) below ``min_words`` or above ``max_words``.

    ``target`` is both bounds at once. The unit is words: choose the part's weight accordingly.
    """

    name = "length"

    def __init__(
        self,
        argument: str | None = None,
        *,
        min_words: Count | None = None,
        max_words: Count | None = None,
        target: Count | None = None,
    ) -> None:
        refuse_target(self.name, argument)
        if target is not None:
            if min_words is not None or max_words is not None:
                raise UserError("the reward 'length' takes target, or min_words and max_words, not both")
            min_words = max_words = target
        if min_words is None and max_words is None:
            raise UserError(
                "the reward 'length' needs a bound",
                hint="give params: {max_words: 20}, {min_words: 5} or {target: 12}",
            )
        self.low = min_words or 0
        self.high = max_words
        if self.high is not None and self.low > self.high:
            raise UserError(f"the reward 'length': min_words {self.low} is larger than max_words {self.high}")
        self.signature = f"length,rule=1,min_words={self.low},max_words={self.high}"

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        return [Score(-float(self._outside(len(text.split())))) for text in texts]

    def _outside(self, count: int) -> int:
        over = count - self.high if self.high is not None else 0
        return max(self.low - count, over, 0)


class RepetitionPenalty:
    """Minus the share of a text's n-grams of words that repeat an earlier one, in [-1, 0].

    Words are split at whitespace and lower-cased. A text shorter than n words repeats nothing.
    """

    name = "repetition"

    def __init__(self, target: str | None = None, *, n: Annotated[int, Field(ge=1)] = 3) -> None:
        refuse_target(self.name, target)
        self.n = n
        self.signature = f"repetition,rule=1,n={n}"

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        return [Score(-repeated_share(text.lower().split(), self.n)) for text in texts]


def repeated_share(tokens: Sequence[str], n: int) -> float:
    """``1 - distinct n-grams / n-grams``; 0 where there is no n-gram."""
    grams = ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All n-grams in order, repeated ones too."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
