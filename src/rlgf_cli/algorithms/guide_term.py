"""The guide-token term: a weighted likelihood on tokens that the guide wrote, beside the policy gradient.

Its gradient per guide token is coefficient x c x w(p) x grad log pi, where p is the policy's probability of the token
and w has no gradient. The policy gradient itself is taken on the policy's tokens alone.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

GuideWeight = Literal["one", "probability", "phi", "shaped"]
"""w(p): 1; p; p(1 - p); gamma p / (p + gamma)^2, the gradient of p / (p + gamma) by log p."""


class Coefficient(BaseModel):
    """The term's coefficient at an iteration: a linear rise to ``peak``, then a half cosine down to ``valley``.

    ``valley`` null: it stays at ``peak``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    peak: float = Field(1.0, ge=0)
    valley: float | None = Field(None, ge=0)
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int = Field(0, ge=0)

    def at(self, age: int) -> float:
        """The coefficient of iteration ``age``, counted from 0."""
        if age < self.warmup_steps:
            return self.peak * (age + 1) / (self.warmup_steps + 1)
        if self.valley is None:
            return self.peak
        share = min(1.0, (age - self.warmup_steps) / self.decay_steps) if self.decay_steps else 1.0
        return self.valley + (self.peak - self.valley) * (1 + math.cos(math.pi * share)) / 2


class GuideTerm(BaseModel):
    """Which guide tokens learn beside the policy's, and with what weight.

    ``tokens``: ``member``, the guide's whole text is one of the episodes of its group; ``beside``, it is a text
    beside the group, which no baseline counts; ``prefix``, the guide's roll-in of the policy's own episodes.
    ``shaping_gamma``: gamma of the weight ``shaped``. ``credit``: c, 1 or the text's own advantage in its group.
    ``baseline_of`` (of members): the mean and deviation that all advantages of the group are taken from are those of
    all its texts, or of the policy's own. ``gate``: the prompts whose guide text learns: all; those of which no own
    text scored above ``failed_at``; those whose guide text scored above the mean of the own ones. ``alone``: where
    the gate is open the own texts learn nothing. ``entropy_share`` (of prefixes): the share of a prefix's tokens that
    learn, those with the highest entropy. ``complement``: the policy's term has the coefficient 1 - coefficient.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: Literal["member", "beside", "prefix"]
    weight: GuideWeight = "one"
    shaping_gamma: float = Field(0.1, gt=0)
    credit: Literal["one", "advantage"] = "one"
    baseline_of: Literal["group", "own"] = "group"
    gate: Literal["always", "failed", "ahead"] = "always"
    failed_at: float = 0.0
    alone: bool = False
    entropy_share: float = Field(1.0, gt=0, le=1)
    coefficient: Coefficient = Coefficient()
    complement: bool = False

    @property
    def adds_texts(self) -> bool:
        """Whether a step has guide texts besides the policy's own."""
        return self.tokens != "prefix"

    @property
    def scored(self) -> bool:
        """Whether the guide's text needs a score."""
        return self.credit == "advantage" or self.gate == "ahead"

    @model_validator(mode="after")
    def _refuse(self) -> GuideTerm:
        if self.credit == "advantage" and self.tokens != "member":
            raise ValueError("credit: advantage is for tokens: member; a text outside of the group has no advantage")
        if self.baseline_of == "own" and self.tokens != "member":
            raise ValueError("baseline_of: own is for tokens: member; other texts are in no baseline anyway")
        if not self.adds_texts and (self.gate != "always" or self.alone):
            raise ValueError("gate and alone are for whole texts (tokens: member or beside), not for a roll-in")
        if self.alone and self.gate == "always":
            raise ValueError(
                "alone with gate: always would leave the policy's own texts out of every step; use bc-guide"
            )
        if self.entropy_share < 1 and self.tokens != "prefix":
            raise ValueError("entropy_share is for tokens: prefix")
        if self.complement and max(self.coefficient.peak, self.coefficient.valley or 0.0) > 1:
            raise ValueError("complement: true takes coefficients up to 1; the policy's would be negative")
        if self.tokens == "member" and self.complement:
            raise ValueError("complement is for tokens: beside or prefix; members share one average with the own texts")
        return self
