"""Config of ``rlgf generate``."""

from __future__ import annotations

from pydantic import Field, model_validator

from rlgf_cli.config.common import DecodingConfig, LengthConfig, ModelConfig, TextConfig
from rlgf_cli.section import Strict


class GenerateConfig(Strict):
    """Prompts from ``data`` or one ``prompt``; ``output`` null prints the texts. ``samples`` texts per prompt.

    ``text`` null: the format that lies with the checkpoint.
    """

    output: str | None = None
    seed: int = Field(0, ge=0)
    model: ModelConfig
    data: str | None = None
    prompt: str | None = None
    limit: int | None = Field(None, ge=1)
    samples: int = Field(1, ge=1)
    text: TextConfig | None = None
    decoding: DecodingConfig = Field(default_factory=DecodingConfig)
    lengths: LengthConfig = Field(default_factory=LengthConfig)

    @model_validator(mode="after")
    def _check(self) -> GenerateConfig:
        if (self.data is None) == (self.prompt is None):
            raise ValueError("give either data (a JSONL file) or prompt (a text)")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("the prompt is empty")
        if self.samples > 1 and (self.decoding.temperature == 0 or self.decoding.num_beams > 1):
            raise ValueError("greedy and beam search write the same text every time: samples must be 1")
        return self
