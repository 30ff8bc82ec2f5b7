"""Sections and field types that several configs share. Every field is a config key that code reads (tested)."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rlgf_cli.section import Flag, Strict

OnOverlong = Literal["error", "truncate", "skip"]
Dtype = Annotated[Literal["float32", "bfloat16"], Flag("float32 or bfloat16.", "--dtype", "--torch-dtype")]
ReportTo = Annotated[Literal["none", "tensorboard", "wandb", "trackio"], Flag("none, tensorboard, wandb or trackio.")]
Device = Annotated[str, Flag("auto, cpu, cuda, cuda:1, mps.")]
Limit = Annotated[int | None, Field(ge=1), Flag("Use only the first N records.", "--limit", "-L")]
Seed = Annotated[int, Field(ge=0), Flag("Seed of everything random.")]
OUTPUT = Flag("Folder or file to write.", "--output-dir", "-o", "--output")

COMMON, RUN, MODEL, TEXT = "Common options", "Run options", "Model options", "Text options"
SPEND, GUIDE = "Budget and limits", "Guide options"
"""Panels of the help that several commands have."""
PRICE = "guide.usd_per_million_input guide.usd_per_million_output"


class ModelConfig(Strict):
    """A model to load: a folder, a hub name, a GGUF file, ``smollm2``, or a YAML file that describes a small model from
    scratch."""

    scalar_key: ClassVar[str | None] = "name"
    name: str
    revision: Annotated[str | None, Flag("Branch, tag or commit of a hub model.")] = None
    dtype: Dtype = "float32"
    device: Device = "auto"
    trust_remote_code: Annotated[bool, Flag("Run code that comes with a hub model.")] = False
    load_in_4bit: Annotated[bool, Flag("bitsandbytes NF4.", "--load-in-4bit/--no-load-in-4bit")] = False


def _module_names(value: Any) -> Any:
    """``q_proj,v_proj`` as the list of names that it is; a regular expression and ``all-linear`` as they are."""
    names = value.split(",") if isinstance(value, str) else []
    return [name.strip() for name in names] if names and all(re.fullmatch(r"\s*\w+\s*", n) for n in names) else value


class LoraConfig(Strict):
    """LoRA through PEFT. ``target_modules``: the last names of layers, a regular expression on whole names, or
    ``all-linear`` for every linear layer but the output head; null lets PEFT choose by architecture.

    Layers that share their weights with another one (tied embeddings and output head) are refused: such an adapter
    could not be merged.
    """

    enabled: Annotated[bool, Flag("Train a LoRA.", "--use-peft/--no-use-peft")] = False
    r: Annotated[int, Flag("Rank.", "--lora-r")] = Field(8, ge=1)
    alpha: Annotated[int, Flag("Scale.", "--lora-alpha")] = Field(16, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Annotated[
        list[str] | str | None,
        BeforeValidator(_module_names),
        Flag("Layers: all-linear, or names with commas.", "--lora-target-modules"),
    ] = None


class ChatConfig(Strict):
    """Whether prompts are rendered with the tokenizer's chat template, and with which variables.

    ``chat`` null: where the tokenizer has a template. ``chat_template_kwargs`` are variables of the template itself,
    such as ``enable_thinking: false``.
    """

    chat: Annotated[
        bool | None, Flag("The model's chat template. Default: where there is one.", "--chat/--no-chat")
    ] = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_kwargs(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return checked_kwargs(value)


def checked_kwargs(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """Refuse variables of a chat template that rlgf sets itself, or that are no JSON."""
    if wrong := sorted(set(value or ()) & _OWN_KWARGS):
        raise ValueError(f"{wrong[0]!r} is no variable of the template; rlgf sets it")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("the values must be texts, numbers, true, false, null, lists or mappings of them") from None
    return value


_OWN_KWARGS = {
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
    "continue_final_message", "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation",
    "max_length", "tokenizer_kwargs", "sanitize_control_tokens",
}  # fmt: skip


class TextConfig(ChatConfig):
    """The text format: how examples become tokens. Given at ``sft``; later stages read it from the checkpoint.

    ``template`` must hold ``{prompt}``; ``chat: true`` uses the model's own chat template instead, and a response ends
    with the token that ends the assistant's turn there (``rlgf doctor`` says which). Without either, a tokenizer with a
    chat template uses it. ``response_prefix`` stands before every response (a space, for byte-level BPE), and is cut
    off again from generated text.
    """

    template: Annotated[str | None, Flag("Prompt template; holds {prompt}.")] = None
    response_prefix: Annotated[str | None, Flag("Stands before every response, e.g. a space.")] = None

    @model_validator(mode="after")
    def _check(self) -> TextConfig:
        if self.template is not None and "{prompt}" not in self.template:
            raise ValueError("the template must hold {prompt}")
        if self.chat and self.template not in (None, "{prompt}"):
            raise ValueError("give a template or chat: true, not both")
        return self


class LengthConfig(Strict):
    """Limits in tokens. ``max_prompt_tokens`` null: as many as the model's positions leave room for.

    ``on_overlong: truncate`` cuts the example's prompt, before the template is put around it: a conversation loses its
    oldest turns first and never its system message; then a decoder keeps the end of the prompt or of the last message,
    an encoder-decoder its beginning.
    """

    max_prompt_tokens: Annotated[int | None, Flag("Longest prompt.")] = Field(None, ge=1)
    max_new_tokens: Annotated[int, Flag("Longest response, EOS counted.")] = Field(64, ge=1)
    min_new_tokens: Annotated[int, Flag("No ending before.")] = Field(0, ge=0)
    on_overlong: Annotated[OnOverlong, Flag("error, truncate or skip a prompt that does not fit.")] = "error"

    @model_validator(mode="after")
    def _check(self) -> LengthConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError("min_new_tokens is larger than max_new_tokens")
        return self


class DecodingConfig(Strict):
    """The settings of generation. ``temperature`` 0 is greedy; ``num_beams`` above 1 is beam search."""

    temperature: Annotated[float, Flag("0 is greedy.")] = Field(1.0, ge=0)
    top_k: Annotated[int, Flag("0 (the default): all tokens.")] = Field(0, ge=0)
    top_p: Annotated[float, Flag("1 (the default): all tokens.")] = Field(1.0, gt=0, le=1)
    num_beams: Annotated[int, Flag("Above 1: beam search.")] = Field(1, ge=1)
    batch_size: Annotated[int, Flag("Rows generated at a time.")] = Field(32, ge=1)

    @model_validator(mode="after")
    def _check(self) -> DecodingConfig:
        if self.num_beams > 1 and (self.top_k or self.top_p < 1):
            raise ValueError("beam search takes no top_k or top_p")
        return self


class OptimConfig(Strict):
    """AdamW. LayerNorm weights and biases are never decayed."""

    learning_rate: Annotated[float, Flag("AdamW's peak.", "--learning-rate", "--lr")] = Field(1e-5, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: Annotated[int, Flag("Steps up to the peak.")] = Field(0, ge=0)
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


def as_names(value: Any) -> Any:
    """``rouge,length`` where a list of names is meant."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def as_parts(value: Any, key: str = "name") -> Any:
    """``rouge`` or ``rouge,length`` or one mapping, where a list of sections is meant."""
    value = as_names(value)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return [{key: item} if isinstance(item, str) else item for item in value]
    return value


Parts = Annotated[list[PartConfig], BeforeValidator(as_parts)]
"""A weighted sum of scorers; a plain name stands for a list of one."""


class StageConfig(Strict):
    """Keys of every stage. ``output`` is a folder, or a file for stages whose product is one JSONL file."""

    output: Annotated[str, OUTPUT]
    seed: Seed = 0
