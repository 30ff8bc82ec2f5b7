"""Config of ``rlgf postprocess``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from rlgf_cli.section import Strict

MendName = Literal["end_mark", "repetition", "repeats", "unfinished", "trim"]


def _as_list(value: Any) -> Any:
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


class PostprocessConfig(Strict):
    """``rules`` mend the texts of ``predictions`` in the order given; ``max_words`` is the limit of ``trim``."""

    usage: ClassVar[Mapping[str, str]] = {"predictions": "rlgf postprocess FILE -o FILE"}
    predictions: str
    output: str
    rules: Annotated[list[MendName], BeforeValidator(_as_list)] = Field(
        default=["end_mark", "repetition", "repeats", "unfinished"], min_length=1
    )
    max_words: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> PostprocessConfig:
        if "trim" in self.rules and self.max_words is None:
            raise ValueError("the rule trim needs max_words")
        if self.max_words is not None and "trim" not in self.rules:
            self.rules = [*self.rules, "trim"]
        if twice := sorted({name for name in self.rules if self.rules.count(name) > 1}):
            raise ValueError(f"the rule {twice[0]!r} is named twice")
        return self
