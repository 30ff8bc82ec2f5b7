"""A model in memory with its tokenizer and text format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from rlgf_cli.models.adapter import Base
from rlgf_cli.models.text import Origin, TextFormat, unseen_ids
from rlgf_cli.models.turns import TurnEnd


@dataclass
class Loaded:
    """A model with its tokenizer and text format.

    ``dtype``: the type of its computations. ``base``: where its weights, or those below its adapter, come from (None:
    they are random). ``original_eos_ids``: the EOS ids of its generation_config before rlgf replaced that.
    ``text_origin``: where the text format comes from.
    """

    model: Any
    tokenizer: Any
    text: TextFormat
    name: str
    dtype: torch.dtype = torch.float32
    base: Base | None = None
    original_eos_ids: list[int] = field(default_factory=list)
    text_origin: Origin = "given"

    @property
    def encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    @property
    def turn_end(self) -> TurnEnd | None:
        """The end of a turn in the chat template; None for plain text and for an encoder-decoder, whose response is not
        part of the template.
        """
        return None if self.encoder_decoder else self.text.turn_end(self.tokenizer)

    @property
    def eos_id(self) -> int:
        """The id that ends a response in training data: the chat template's end of a turn if it has one, else EOS."""
        end = self.turn_end
        return int(self.tokenizer.eos_token_id if end is None or end.id is None else end.id)

    @property
    def notes(self) -> list[str]:
        """What a command says first about the weights: the GGUF file that they were converted from."""
        if self.base is None or self.base.gguf is None:
            return []
        source = self.base.gguf.name
        return [f"the weights are those of {source} (GGUF), in float32 in {self.base.name}"]

    @property
    def turn_end_problem(self) -> str:
        """The warning for a chat template without a token that ends a turn; empty where it has one."""
        end = self.turn_end
        if end is None or not end.problem:
            return ""
        return f"{end.problem}: a response ends with tokenizer.eos_token, {self.tokenizer.eos_token!r}"

    @property
    def eos_ids(self) -> frozenset[int]:
        """All ids that end a response: in training data, EOS, and those of the model's generation_config."""
        return frozenset({self.eos_id, int(self.tokenizer.eos_token_id), *self.configured_eos_ids})

    @property
    def configured_eos_ids(self) -> list[int]:
        """The EOS ids of the model's generation_config as it is now (``original_eos_ids``: as it was loaded)."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        return [int(i) for i in ids if i is not None]

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids that a policy can generate and no text shows: special tokens other than those that end a response, and
        rows of the vocabulary without a token."""
        rows = int(self.model.config.get_text_config().vocab_size)
        return unseen_ids(self.tokenizer, rows) - self.eos_ids

    @property
    def pad_id(self) -> int:
        """The padding of batches. It may equal EOS: masks come from lengths, never from ids."""
        return int(self.tokenizer.pad_token_id)

    @property
    def max_positions(self) -> int | None:
        """The most tokens of prompt plus response (decoder) or of either (encoder-decoder); None: no limit."""
        config = self.model.config.get_text_config()  # a model that takes images has it below another one
        if hasattr(config, "relative_attention_num_buckets"):
            return None
        limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        return int(limit) if limit else None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device
