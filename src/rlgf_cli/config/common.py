"""What the stages' configs share. Every field is a config key; a test holds that each is read by code."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from rlgf_cli.section import Strict

OnOverlong = Literal["error", "truncate", "skip"]
Dtype = Literal["float32", "bfloat16"]


class ModelConfig(Strict):
    """A model to load: a folder, a hub name, or a YAML file that describes a small model from scratch."""

    scalar_key: ClassVar[str | None] = "name"
    name: str
    revision: str | None = None
    dtype: Dtype = "float32"
    device: str = "auto"
    trust_remote_code: bool = False
    load_in_4bit: bool = False


class LoraConfig(Strict):
    """LoRA through PEFT. ``target_modules`` null lets PEFT choose by architecture.

    Layers that share their weights with another one (tied embeddings and output head) are refused: such an adapter
    could not be merged.
    """

    enabled: bool = False
    r: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | str | None = None


class TextConfig(Strict):
    """How examples become tokens. Given at ``sft``; later stages read it from the checkpoint.

    ``template`` must hold ``{prompt}``; ``chat: true`` uses the model's own chat template instead, and a response ends
    with the token that ends the assistant's turn there (``rlgf doctor`` says which).
    ``response_prefix`` stands before every response (a space, for byte-level BPE), and is cut off again
    from generated text.
    """

    template: str | None = None
    chat: bool | None = None
    response_prefix: str | None = None

    @model_validator(mode="after")
    def _check(self) -> TextConfig:
        if self.template is not None and "{prompt}" not in self.template:
            raise ValueError("the template must hold {prompt}")
        if self.chat and self.template not in (None, "{prompt}"):
            raise ValueError("give a template or chat: true, not both")
        return self


class LengthConfig(Strict):
    """Limits in tokens. ``max_prompt_tokens`` null: as many as the model's positions leave room for.

    ``on_overlong: truncate`` cuts the example's prompt, before the template is put around it: a decoder keeps its end,
    an encoder-decoder its beginning.
    """

    max_prompt_tokens: int | None = Field(None, ge=1)
    max_new_tokens: int = Field(64, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    on_overlong: OnOverlong = "error"

    @model_validator(mode="after")
    def _check(self) -> LengthConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError("min_new_tokens is larger than max_new_tokens")
        return self


class DecodingConfig(Strict):
    """How text is generated. ``temperature`` 0 is greedy; ``num_beams`` above 1 is beam search."""

    temperature: float = Field(1.0, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    num_beams: int = Field(1, ge=1)
    batch_size: int = Field(32, ge=1)

    @model_validator(mode="after")
    def _check(self) -> DecodingConfig:
        if self.num_beams > 1 and (self.top_k or self.top_p < 1):
            raise ValueError("beam search takes no top_k or top_p")
        return self


class OptimConfig(Strict):
    """AdamW. LayerNorm weights and biases are never decayed."""

    learning_rate: float = Field(1e-5, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)


class PartConfig(Strict):
    """One scorer: its name (``rouge``, ``classifier:PATH``, ``file.py:fn``), weight and own parameters.

    A reward's score counts as ``clip((score - shift) / scale, low, high)`` where ``shift``, ``scale`` or ``clip: [low,
    high]`` are given. In training the weight can move from ``weight_start`` to ``weight`` over the first
    ``weight_steps`` iterations.
    """

    scalar_key: ClassVar[str | None] = "name"
    name: str
    weight: float = Field(1.0, allow_inf_nan=False)
    weight_start: float | None = Field(None, allow_inf_nan=False)
    weight_steps: int | None = Field(None, ge=1)
    shift: float = Field(0.0, allow_inf_nan=False)
    scale: float = Field(1.0, gt=0, allow_inf_nan=False)
    clip: list[float] | None = None
    params: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> PartConfig:
        if self.clip is not None and (len(self.clip) != 2 or not all(map(math.isfinite, self.clip))):
            raise ValueError("clip is a list of two numbers, [low, high]")
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError(f"clip: low ({self.clip[0]:g}) must be below high ({self.clip[1]:g})")
        if (self.weight_start is None) != (self.weight_steps is None):
            raise ValueError("weight_start and weight_steps go together")
        return self


def as_parts(value: Any, key: str = "name") -> Any:
    """``rouge`` or ``rouge,length`` or one mapping, where a list of sections is meant."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return [{key: item} if isinstance(item, str) else item for item in value]
    return value


Parts = Annotated[list[PartConfig], BeforeValidator(as_parts)]
"""A weighted sum of scorers; a plain name stands for a list of one."""


class StageConfig(Strict):
    """Keys of every stage. ``output`` is a folder, or a file for stages whose product is one JSONL file."""

    output: str
    seed: int = Field(0, ge=0)
