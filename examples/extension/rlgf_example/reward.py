"""The reward ``alliteration``, or ``alliteration:LETTER``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from rlgf_cli.protocols import Example, Reward, Score


class Alliteration(Reward):
    """The share of a text's words that begin with a letter, in [0, 1]; at most ``cap``."""

    name = "alliteration"

    def __init__(self, target: str | None = None, *, cap: Annotated[float, Field(gt=0, le=1)] = 1.0) -> None:
        self.letter, self.cap = (target or "a").lower(), cap
        self.signature = f"alliteration,rule=1,letter={self.letter},cap={cap:g}"

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        return [self._score(text.lower().split()) for text in texts]

    def _score(self, words: Sequence[str]) -> Score:
        hits = sum(word.startswith(self.letter) for word in words)
        return Score(min(hits / len(words), self.cap) if words else 0.0, {"words": float(len(words))})
