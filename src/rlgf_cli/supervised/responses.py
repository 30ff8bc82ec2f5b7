"""The trainer of ``rlgf sft``: the negative log-likelihood of responses, given their prompts.

TRL's SFTTrainer for a decoder, transformers' Seq2SeqTrainer for an encoder-decoder, both on ids from this package.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reads it when it is imported

import datasets
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from trl import SFTConfig as TrlSftConfig
from trl import SFTTrainer

from rlgf_cli import noise
from rlgf_cli.config.sft import SftConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models.generate import decoder_start_id, pad_rows
from rlgf_cli.models.load import Loaded
from rlgf_cli.models.prompts import Encoded, encode_target
from rlgf_cli.protocols import Example, FinishReason
from rlgf_cli.supervised.trainer import WithoutModelCard, cross_entropy, training_arguments

Target = tuple[str, FinishReason]
"""A text to learn, and whether its author ended it."""


@dataclass(frozen=True)
class Pair:
    """One training pair, each part tokenised by itself: ``response`` ends with EOS unless it was cut."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class EncodedPairs:
    """Training pairs, and counts of their responses.

    ``truncated_responses`` were cut at the limit (no EOS); ``spelled_endings`` spelled EOS or the end of a turn at
    their end, which is left out; ``unfinished`` were not ended by their author and not cut (no EOS). ``texts`` counts
    different responses per prompt.
    """

    pairs: list[Pair]
    truncated_responses: int
    spelled_endings: int
    unfinished: int
    texts: int


def encode_pairs(
    loaded: Loaded, prompts: Sequence[Encoded], targets: Callable[[Example], list[Target]], config: SftConfig
) -> EncodedPairs:
    """Pair every prompt with its targets, as ``config.references`` chooses among them.

    Prompt and response are tokenised separately, so that SFT and RL see the same token boundary.
    """
    pairs: list[Pair] = []
    truncated = spelled = unfinished = 0
    used: set[tuple[str, str]] = set()
    for item in prompts:
        for text, finish_reason in _chosen(targets(item.example), item.example.id, config):
            ids, too_long = encode_target(loaded, text, config.lengths.max_new_tokens, finish_reason)
            spells_ending = loaded.text.without_ending(loaded.tokenizer, text) != text
            truncated += too_long
            spelled += spells_ending
            unfinished += finish_reason == "length" and not too_long and not spells_ending
            used.add((item.example.id, text))
            pairs.append(Pair(item.ids, ids))
    return EncodedPairs(pairs, truncated, spelled, unfinished, len(used))


def _chosen(targets: list[Target], example_id: str, config: SftConfig) -> list[Target]:
    if config.references == "random":
        at = noise.generator(config.seed, "reference", example_id).integers(len(targets))
        return [targets[at]]
    return targets[:1] if config.references == "first" else targets


def refuse_head(loaded: Loaded) -> None:
    """Refuse an adapter on a decoder's output head: TRL computes the loss from the head's plain weights."""
    if not loaded.encoder_decoder and isinstance(loaded.model.get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            "sft cannot train LoRA on the output head of a decoder",
            where=loaded.name,
            hint="leave lm_head out of lora.target_modules (rlgf train can have it, where the embeddings are not tied)",
        )


def make_trainer(
    loaded: Loaded, config: SftConfig, folder: Path, pairs: Sequence[Pair], eval_pairs: Sequence[Pair]
) -> Any:
    """The trainer for ``pairs``; checkpoints go below ``folder``."""
    common: dict[str, Any] = {"device": loaded.device, "dtype": loaded.dtype, "prediction_loss_only": True}
    if loaded.encoder_decoder:
        arguments = training_arguments(Seq2SeqTrainingArguments, config, folder, remove_unused_columns=False, **common)
        return Seq2SeqTrainer(
            model=loaded.model,
            args=arguments,
            train_dataset=_seq2seq_rows(pairs),
            eval_dataset=_seq2seq_rows(eval_pairs) if eval_pairs else None,
            data_collator=_Collator(decoder_start_id(loaded.model), loaded.pad_id),
            compute_loss_func=cross_entropy,
        )
    # max_length: nothing is cut here, the lengths were settled before
    arguments = training_arguments(TrlSftConfig, config, folder, completion_only_loss=True, max_length=None, **common)
    return _SFTTrainer(
        model=loaded.model,
        args=arguments,
        train_dataset=_decoder_rows(pairs),
        eval_dataset=_decoder_rows(eval_pairs) if eval_pairs else None,
        processing_class=loaded.tokenizer,
    )


class _SFTTrainer(WithoutModelCard, SFTTrainer):
    pass


def _decoder_rows(pairs: Sequence[Pair]) -> datasets.Dataset:
    """``input_ids`` = prompt + response; ``completion_mask`` is 1 on the response, from lengths alone."""
    return datasets.Dataset.from_dict(
        {
            "input_ids": [p.prompt + p.response for p in pairs],
            "completion_mask": [[0] * len(p.prompt) + [1] * len(p.response) for p in pairs],
        }
    )


def _seq2seq_rows(pairs: Sequence[Pair]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": [p.prompt for p in pairs], "labels": [p.response for p in pairs]})


@dataclass(frozen=True)
class _Collator:
    """Rows to a batch for an encoder-decoder; masks and -100 come from lengths, never from ids."""

    start_id: int
    pad_id: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids, mask = pad_rows([row["input_ids"] for row in rows], self.pad_id, left=False)
        labels, real = pad_rows([row["labels"] for row in rows], self.pad_id, left=False)
        shifted = [[self.start_id, *row["labels"][:-1]] for row in rows]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": pad_rows(shifted, self.pad_id, left=False)[0],
            "decoder_attention_mask": real,
            "labels": labels.masked_fill(real == 0, -100),
        }
