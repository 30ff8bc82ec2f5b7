"""The config of ``rlgf make-negatives``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from rlgf_cli.config.common import COMMON, RUN, Limit, StageConfig, as_parts
from rlgf_cli.section import Flag, Strict

RULE_MADE = (
    "random_words", "irrelevant", "shuffled_words", "shuffled_sentences", "repetition", "cut_off", "run_on",
    "copied_input", "swapped_facts",
)  # fmt: skip


def _range(value: Any) -> Any:
    return [value, value] if isinstance(value, int | float) and not isinstance(value, bool) else value


class KindConfig(Strict):
    """A kind of failure: its name (or ``file.py:function``), how often it is drawn relative to the others, and the
    severity: a number, or the range ``[low, high]`` from which one is drawn for each text.
    """

    scalar_key: ClassVar[str | None] = "name"
    name: str
    weight: float = Field(1.0, gt=0)
    severity: Annotated[list[float], BeforeValidator(_range)] = Field(default=[0.3, 1.0])

    @model_validator(mode="after")
    def _check(self) -> KindConfig:
        if len(self.severity) != 2 or not 0 < self.severity[0] <= self.severity[1] <= 1:
            raise ValueError("severity must be a number in (0, 1], or two of them with the lower bound first")
        return self


class MakeNegativesConfig(StageConfig):
    """Every reference of ``data`` becomes a good text, and ``per_reference`` bad ones of different kinds are made from
    it, drawn by their weights (fewer where fewer kinds apply). ``samples`` is a file of ``rlgf generate`` with the
    starting policy's own texts for the same prompts: those that break a rule become failures of the kind
    ``on_policy``, at most ``samples_per_prompt`` for each. ``good``: also write the good texts.
    """

    panels: ClassVar[Mapping[str, str]] = {
        COMMON: "data output limit --config --set seed",
        "Failure options": "kinds per_reference samples",
        RUN: "--overwrite --print-config --json",
    }
    data: Annotated[str, Flag("JSONL with prompts and references.")]
    limit: Limit = None
    kinds: Annotated[list[KindConfig], BeforeValidator(as_parts), Flag("Names with commas between. Default: all.")] = (
        Field(default_factory=lambda: [KindConfig(name=name) for name in RULE_MADE], min_length=1)
    )
    per_reference: Annotated[int, Flag("Bad texts for each good one. Default: {default}.")] = Field(1, ge=1)
    samples: Annotated[
        str | None, Flag("Texts of the starting policy (rlgf generate): those that break a rule are taken.")
    ] = None
    samples_per_prompt: int = Field(1, ge=1)
    good: bool = True

    @model_validator(mode="after")
    def _check(self) -> MakeNegativesConfig:
        names = [kind.name for kind in self.kinds]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the kind {twice[0]!r} is named twice")
        if self.per_reference > len(names):
            raise ValueError(f"per_reference is {self.per_reference}; there are {len(names)} kinds")
        return self
