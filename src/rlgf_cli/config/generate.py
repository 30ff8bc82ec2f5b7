"""The config of ``rlgf generate``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from rlgf_cli.config.common import (
    COMMON,
    MODEL,
    RUN,
    TEXT,
    DecodingConfig,
    LengthConfig,
    Limit,
    ModelConfig,
    Seed,
    TextConfig,
)
from rlgf_cli.section import Flag, Strict


class GenerateConfig(Strict):
    """Prompts from ``data`` or one ``prompt``; ``output`` null prints the texts. ``samples`` texts per prompt.

    ``text`` null: the format stored with the checkpoint.
    """

    panels: ClassVar[Mapping[str, str]] = {
        COMMON: "model data prompt output limit --config --set seed",
        "Decoding options": (
            "samples decoding.temperature decoding.top_k decoding.top_p decoding.num_beams lengths.max_new_tokens "
            "lengths.min_new_tokens decoding.batch_size"
        ),
        TEXT: "text.chat lengths.on_overlong",
        MODEL: "model.device model.dtype model.revision model.trust_remote_code",
        RUN: "--overwrite --print-config --json",
    }
    flags: ClassVar[Mapping[str, Flag]] = {
        "lengths.max_new_tokens": Flag("Longest response."),
        "decoding.top_k": Flag("The k likeliest tokens; 0: all."),
        "decoding.top_p": Flag("Nucleus sampling; 1: all."),
        "decoding.num_beams": Flag("Beam search above 1."),
        "lengths.min_new_tokens": Flag("No EOS before."),
        "decoding.batch_size": Flag("Prompts at once."),
    }
    output: Annotated[str | None, Flag("JSONL file; without it the texts are printed.", "--output", "-o")] = None
    seed: Seed = 0
    model: Annotated[ModelConfig, Flag("Checkpoint folder or hub name.", "--model", "--model-name-or-path")]
    data: Annotated[str | None, Flag("JSONL with prompts.")] = None
    prompt: Annotated[str | None, Flag("One prompt, instead of --data.")] = None
    limit: Limit = None
    samples: Annotated[int, Flag("Texts per prompt.", "--samples", "-n")] = Field(1, ge=1)
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
