"""``rlgf eval``: the config."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from rlgf_cli.artifacts.predictions import OnMissing
from rlgf_cli.config.common import DecodingConfig, LengthConfig, ModelConfig, PartConfig, Parts, StageConfig, TextConfig
from rlgf_cli.config.guide import BudgetConfig
from rlgf_cli.section import Strict

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

    temperature: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _check_greedy(self) -> EvalDecodingConfig:
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError("top_k and top_p need a temperature above 0: without one, decoding is greedy")
        return self


class IntervalConfig(Strict):
    """The percentile bootstrap over prompts: its level and how many resamples."""

    level: float = Field(0.95, gt=0, lt=1)
    resamples: int = Field(10_000, ge=100)


class EvalConfig(StageConfig):
    """``model`` writes the texts, or ``predictions`` holds them. ``output`` is MODEL/eval by default.

    ``device`` is for the model and the scorers alike, unless ``model.device`` says otherwise. ``budget`` holds for all
    judges together.
    """

    output: str = ""
    model: ModelConfig | None = None
    predictions: str | None = None
    data: str | None = None
    limit: int | None = Field(None, ge=1)
    on_missing: OnMissing = "error"
    metrics: Parts = Field(default_factory=lambda: [PartConfig(name="rouge")])
    device: str = "auto"
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
