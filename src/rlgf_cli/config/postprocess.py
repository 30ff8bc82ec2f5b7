"""The config of ``rlgf postprocess``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from rlgf_cli.config.common import COMMON, OUTPUT, RUN, as_names
from rlgf_cli.section import Argument, Flag, Strict

RepairName = Literal["end_mark", "repetition", "repeats", "unfinished", "trim"]


class PostprocessConfig(Strict):
    """``rules`` repair the texts of ``predictions`` in the order given; ``max_words`` is the limit of ``trim``."""

    usage: ClassVar[Mapping[str, str]] = {"predictions": "rlgf postprocess FILE -o FILE"}
    panels: ClassVar[Mapping[str, str]] = {
        "": "predictions",
        COMMON: "output --config --set",
        "Repair options": "rules max_words",
        RUN: "--overwrite --print-config --json",
    }
    predictions: Annotated[str, Argument("A predictions.jsonl, guide.jsonl, or id and text per line.")]
    output: Annotated[str, OUTPUT]
    rules: Annotated[
        list[RepairName],
        BeforeValidator(as_names),
        Flag("In order: end_mark, repetition, repeats, unfinished, trim. Default: all but trim."),
    ] = Field(default=["end_mark", "repetition", "repeats", "unfinished"], min_length=1)
    max_words: Annotated[int | None, Flag("Trim longer texts to whole sentences.")] = Field(None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> PostprocessConfig:
        if "trim" in self.rules and self.max_words is None:
            raise ValueError("the rule trim needs max_words")
        if self.max_words is not None and "trim" not in self.rules:
            self.rules = [*self.rules, "trim"]
        if twice := sorted({name for name in self.rules if self.rules.count(name) > 1}):
            raise ValueError(f"the rule {twice[0]!r} is named twice")
        return self
