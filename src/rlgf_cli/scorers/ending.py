"""A penalty for a text that does not end in an end mark."""

from __future__ import annotations

from collections.abc import Sequence

from rlgf_cli.failures.sentences import is_finished
from rlgf_cli.protocols import Example, Reward, Score
from rlgf_cli.scorers.base import refuse_target


class Ending(Reward):
    """-1 for a text that does not end in an end mark, closing quotes aside, and for an empty one; else 0."""

    name = signature = "ending"

    def __init__(self, target: str | None = None) -> None:
        refuse_target(self.name, target)

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        return [Score(0.0 if is_finished(text) else -1.0) for text in texts]
