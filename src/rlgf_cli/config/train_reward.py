"""Config of ``rlgf train-reward``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from rlgf_cli.config.supervised import SupervisedConfig


def _as_list(value: object) -> object:
    return [key.strip() for key in value.split(",")] if isinstance(value, str) else value


class TrainRewardConfig(SupervisedConfig):
    """A text classifier from labelled JSONL.

    ``text_key`` and ``label_key`` are dotted paths into each record (``meta.label``, ``references.0``). Several
    text keys are joined as the ``classifier`` reward joins prompt and response: by a space where neither side
    has white space. ``label_names`` renames labels (``{"1": positive}``). Without ``eval_data``, the share
    ``eval_fraction`` of every class is held out. ``max_tokens`` null: as many as the model reads.
    """

    objective: Literal["classification"] = "classification"
    text_key: Annotated[list[str], BeforeValidator(_as_list)] = Field(default=["text"], min_length=1)
    label_key: str = "label"
    label_names: dict[str, str] = Field(default_factory=dict)
    eval_fraction: float = Field(0.1, gt=0, lt=1)
    max_tokens: int | None = Field(None, ge=1)
