"""Sequence classifiers: loading any encoder or decoder with a classification head, labels included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as hf_logging

from rlgf_cli.config.common import ModelConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models.load import check_checkpoint_name

_NO_LIMIT = 1_000_000
"""Tokenizers without a limit of their own say 1e30."""


def load_classifier(config: ModelConfig, labels: Sequence[str]) -> tuple[Any, Any]:
    """``(model, tokenizer)`` with one output per label; a head that does not fit is made anew.

    Raises UserError for what is no checkpoint, for an encoder-decoder, and for a tokenizer that cannot pad.
    """
    check_checkpoint_name(config.name)
    common: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # the new head is the point, not a warning
    try:
        architecture = AutoConfig.from_pretrained(config.name, **common)
        if architecture.is_encoder_decoder:
            raise UserError("an encoder or a decoder is needed, not an encoder-decoder", where=config.name)
        set_labels(architecture, labels)
        model = AutoModelForSequenceClassification.from_pretrained(
            config.name, config=architecture, dtype=torch.float32, ignore_mismatched_sizes=True, **common
        )
        tokenizer = AutoTokenizer.from_pretrained(config.name, **common)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"no classifier can be made of it: {reason}", where=config.name) from None
    finally:
        hf_logging.set_verbosity(verbosity)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has no pad, EOS or unknown token to pad with", where=config.name)
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders find the last token by it
    return model, tokenizer


def set_labels(architecture: Any, labels: Sequence[str]) -> None:
    """Write the label names into a transformers config."""
    architecture.num_labels = len(labels)
    architecture.id2label = dict(enumerate(labels))
    architecture.label2id = {name: i for i, name in enumerate(labels)}
    architecture.problem_type = "single_label_classification"


def token_limit(model: Any, tokenizer: Any) -> int | None:
    """The most tokens that the model reads; None: any number."""
    known = [int(tokenizer.model_max_length)] if tokenizer.model_max_length < _NO_LIMIT else []
    config = model.config
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if positions:
        # the RoBERTa family counts positions from pad + 1
        offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
        known.append(int(positions) - offset)
    return min(known, default=None)
