"""The config of ``rlgf eval``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from rlgf_cli.artifacts.predictions import OnMissing
from rlgf_cli.config.common import (
    COMMON,
    MODEL,
    OUTPUT,
    RUN,
    SPEND,
    DecodingConfig,
    Device,
    LengthConfig,
    Limit,
    ModelConfig,
    PartConfig,
    Parts,
    StageConfig,
    TextConfig,
)
from rlgf_cli.config.guide import BudgetConfig
from rlgf_cli.section import Flag, Strict

FREE_ON_RESUME = (
    "metrics",
    "interval.level",
    "interval.resamples",
    "on_missing",
    "budget.max_cost_usd",
    "budget.max_calls",
)
"""Keys that may differ when an evaluation is resumed: they do not change the texts."""


class EvalDecodingConfig(DecodingConfig):
    """As ``decoding`` elsewhere, but greedy unless a temperature is given."""

    temperature: Annotated[float, Flag("0 (the default) is greedy.")] = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _check_greedy(self) -> EvalDecodingConfig:
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError("top_k and top_p need a temperature above 0: without one, decoding is greedy")
        return self


class IntervalConfig(Strict):
    """The percentile bootstrap over prompts: its level and how many resamples."""

    level: Annotated[float, Flag("Of the intervals. Default: {default}.")] = Field(0.95, gt=0, lt=1)
    resamples: Annotated[int, Flag("Bootstrap resamples. Default: {default}.")] = Field(10_000, ge=100)


class EvalConfig(StageConfig):
    """``model`` writes the texts, or ``predictions`` holds them. ``output`` is MODEL/eval by default.

    ``device`` is for the model and the scorers alike, unless ``model.device`` says otherwise. ``budget`` holds for all
    judges together.
    """

    panels: ClassVar[Mapping[str, str]] = {
        "Evaluation options": "model data predictions metrics on_missing",
        COMMON: "output limit --config --set seed",
        SPEND: "budget.max_cost_usd budget.max_calls",
        "Generation options": (
            "decoding.temperature decoding.top_k decoding.top_p decoding.num_beams lengths.max_new_tokens "
            "lengths.min_new_tokens decoding.batch_size lengths.on_overlong text.chat"
        ),
        MODEL: "device model.dtype model.trust_remote_code",
        RUN: "--resume --overwrite --print-config --json",
    }
    flags: ClassVar[Mapping[str, Flag]] = {
        "lengths.max_new_tokens": Flag("Default: {default}.", "--max-new-tokens", "--max-tokens"),
        "lengths.on_overlong": Flag("Prompts too long: error, truncate or skip."),
    }
    output: Annotated[str, OUTPUT] = ""
    model: Annotated[ModelConfig | None, Flag("The checkpoint that writes the texts.")] = None
    predictions: Annotated[
        str | None, Flag("Score texts made elsewhere: a predictions.jsonl, a guide.jsonl, or id and text per line.")
    ] = None
    data: Annotated[str | None, Flag("JSONL with prompts and references.")] = None
    limit: Limit = None
    on_missing: Annotated[OnMissing, Flag("Examples without a prediction: error or skip.")] = "error"
    metrics: Annotated[
        Parts, Flag("Names with commas between; reward:NAME scores with a reward. Default: {default}.")
    ] = Field(default_factory=lambda: [PartConfig(name="rouge")])
    device: Device = "auto"
    text: TextConfig = Field(default_factory=TextConfig)
    decoding: EvalDecodingConfig = Field(default_factory=EvalDecodingConfig)
    lengths: LengthConfig = Field(default_factory=LengthConfig)
    interval: IntervalConfig = Field(default_factory=IntervalConfig)
    budget: BudgetConfig = Field(default_factory=BudgetConfig)

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if (self.model is None) == (self.predictions is None):
            raise ValueError("give a model (--model) or texts made elsewhere (--predictions), one of the two")
        if self.model is not None:
            if self.data is None:
                raise ValueError("--model needs --data: the prompts to answer")
            if "device" not in self.model.model_fields_set:
                self.model.device = self.device
        if not self.output:
            if self.model is None or not Path(self.model.name).is_dir():
                raise ValueError("give an output folder (-o): only with --model FOLDER it is FOLDER/eval by default")
            self.output = str(Path(self.model.name) / "eval")
        return self
