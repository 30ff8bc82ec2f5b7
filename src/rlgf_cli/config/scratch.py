"""The YAML file that describes a small model from scratch (``--model small.yaml``)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from rlgf_cli.config.loader import resolve
from rlgf_cli.section import Strict

Architecture = Literal["gpt2", "llama", "qwen3", "t5", "bart", "distilbert"]
_BYTES = 256


class TokenizerConfig(Strict):
    """A tokenizer trained on the data (``kind``), or an existing one (``path``).

    ``word``: words and punctuation, for small closed vocabularies; ``bpe``: byte-level BPE; ``unigram``:
    SentencePiece-like. ``path`` is a folder that holds tokenizer.json, or vocab.json and merges.txt.
    ``vocab_size`` is an upper limit, special tokens included (default: 4096; word: no limit).
    """

    scalar_key: ClassVar[str | None] = "kind"
    kind: Literal["word", "bpe", "unigram"] | None = None
    path: str | None = None
    vocab_size: int | None = Field(None, ge=8)

    @model_validator(mode="after")
    def _check(self) -> TokenizerConfig:
        if (self.kind is None) == (self.path is None):
            raise ValueError("give either kind (word, bpe, unigram) or path")
        if self.path is not None and self.vocab_size is not None:
            raise ValueError("vocab_size belongs to a tokenizer that is trained; the one at path has its own")
        if self.kind == "bpe" and self.vocab_size is not None and self.vocab_size < _BYTES + 4:
            raise ValueError(f"a byte-level vocab_size must be at least {_BYTES + 4}: every byte is a token")
        return self


class ScratchConfig(Strict):
    """Architecture and sizes. ``pad: eos`` gives padding no token of its own (as GPT-2 was released)."""

    architecture: Architecture
    layers: int = Field(2, ge=1)
    hidden: int = Field(64, ge=2)
    heads: int = Field(2, ge=1)
    max_positions: int | None = Field(None, ge=2)
    dropout: float = Field(0.0, ge=0, lt=1)
    tokenizer: TokenizerConfig
    pad: Literal["distinct", "eos"] = "distinct"

    @model_validator(mode="after")
    def _check(self) -> ScratchConfig:
        if self.hidden % self.heads:
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of heads ({self.heads})")
        if self.architecture in ("llama", "qwen3") and (self.hidden // self.heads) % 2:
            raise ValueError("hidden / heads must be even: rotary positions turn pairs")
        if self.architecture in ("llama", "qwen3") and self.dropout:
            raise ValueError(f"{self.architecture} has no dropout")
        if self.architecture == "t5" and self.max_positions is not None:
            raise ValueError("t5 has relative positions and no limit: leave max_positions out")
        if self.architecture == "t5" and self.pad == "eos":
            raise ValueError("t5 starts its decoder with the pad token: pad must be distinct")
        return self

    @property
    def positions(self) -> int:
        """``max_positions``, 512 where it is left out."""
        return self.max_positions or 512


def is_scratch(name: str) -> bool:
    """Whether a model's name is a YAML file that describes a model from scratch."""
    return name.endswith((".yaml", ".yml"))


def read_scratch(path: str | Path) -> ScratchConfig:
    """The checked description; errors name the line of the file."""
    return resolve(ScratchConfig, files=[path]).config
