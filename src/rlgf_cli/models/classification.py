"""Sequence classifiers and reward models: loading, labels, the tokens of a prompt with its text, and logits.

Training and rewards both encode texts here, so that a reward reads the same tokens as its training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as hf_logging

from rlgf_cli.artifacts.jsonl import read_json
from rlgf_cli.config.common import ModelConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models.generate import pad_rows
from rlgf_cli.models.gguf import plain_checkpoint
from rlgf_cli.models.load import check_checkpoint_name

EVALUATION = "evaluation.json"
"""The file beside a reward model that holds its evaluation on held-out texts and its threshold."""
_NO_LIMIT = 1_000_000
"""A tokenizer without a limit has model_max_length 1e30."""
_CHAT = "rlgf_chat"
"""The key in config.json: whether rlgf trained the model on rendered conversations."""


def load_classifier(config: ModelConfig, labels: Sequence[str]) -> tuple[Any, Any]:
    """``(model, tokenizer)`` with one output per label; a head with other outputs is replaced by a new one.

    Raises UserError for a folder without a checkpoint, for an encoder-decoder, and for a tokenizer that cannot pad.
    """
    name, _ = plain_checkpoint(config.name)
    check_checkpoint_name(name)
    common: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # a new head is intended, so no warning
    try:
        architecture = AutoConfig.from_pretrained(name, **common)
        if architecture.is_encoder_decoder:
            raise UserError("an encoder or a decoder is needed, not an encoder-decoder", where=config.name)
        set_labels(architecture, labels)
        model = AutoModelForSequenceClassification.from_pretrained(
            name, config=architecture, dtype=torch.float32, ignore_mismatched_sizes=True, **common
        )
        tokenizer = AutoTokenizer.from_pretrained(name, **common)
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
    """Write into a transformers config the label names, and that rlgf trains the model on plain text."""
    architecture.num_labels = len(labels)
    architecture.id2label = dict(enumerate(labels))
    architecture.label2id = {name: i for i, name in enumerate(labels)}
    architecture.problem_type = "single_label_classification" if len(labels) > 1 else None
    setattr(architecture, _CHAT, False)


def trained_on_plain_text(model: Any, path: str) -> bool:
    """Whether ``rlgf train-reward`` made the checkpoint at ``path``: config.json says it, or, for earlier versions, the
    run's manifest."""
    if getattr(model.config, _CHAT, None) is not None:
        return not getattr(model.config, _CHAT)
    manifest = Path(path, "run.json")
    return manifest.is_file() and read_json(manifest).get("command") == "train-reward"


def token_limit(model: Any, tokenizer: Any, given: int | None = None) -> int | None:
    """The most tokens of a text that are used: ``given``, else as many as the model reads; None: all.

    Raises UserError where ``given`` is more than the model reads.
    """
    limits = [int(tokenizer.model_max_length)] if tokenizer.model_max_length < _NO_LIMIT else []
    if (positions := position_limit(model)) is not None:
        limits.append(positions)
    if given is not None and limits and given > min(limits):
        raise UserError(f"max_tokens is {given}; the model reads at most {min(limits)}", hint="leave max_tokens out")
    return given if given is not None else min(limits, default=None)


def position_limit(model: Any) -> int | None:
    """The number of tokens that have a position in an encoder or a decoder; None: any number (relative positions only).

    RoBERTa and its relatives (Longformer, MPNet, ESM, ...) count positions from the padding's id + 1. Only their tables
    of positions have a row for the padding.
    """
    config = model.config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    tables = (getattr(module, "position_embeddings", None) for module in model.modules())
    padding = next((row for table in tables if (row := getattr(table, "padding_idx", None)) is not None), None)
    if not limit or (padding is None and hasattr(config, "relative_attention_num_buckets")):
        return None
    return int(limit) - (0 if padding is None else padding + 1)


def join(prompt: str, text: str) -> str:
    """Prompt and response as one text, joined by a space where there is no white space between them."""
    space = " " if prompt and text and not prompt[-1].isspace() and not text[0].isspace() else ""
    return prompt + space + text


def encode(tokenizer: Any, text: str, limit: int | None) -> tuple[list[int], bool]:
    """At least one id of a text, and whether the text was cut, on the tokenizer's ``truncation_side``."""
    ids = tokenizer(text)["input_ids"]
    cut = limit is not None and len(ids) > limit
    if cut:
        ids = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
    # an empty text has no tokens where the tokenizer adds no special ones; the model needs at least one
    return ids or [tokenizer.pad_token_id], cut


def encode_chat(tokenizer: Any, prompt: str, text: str, limit: int | None) -> tuple[list[int], bool]:
    """Ids of the prompt (user) and the text (assistant) in the tokenizer's chat template, and whether they were cut.

    The template writes BOS itself, and control tokens that prompt or text spell out are read as text. A conversation
    longer than ``limit`` loses the beginning of the prompt and then of the text, and nothing of the template. Raises
    UserError where the template alone is longer, or refuses such a conversation.
    """
    from jinja2 import TemplateError

    def rendered(cut: int) -> list[int]:
        """Ids of the conversation without the first ``cut`` characters of prompt + text."""
        turns = [
            {"role": "user", "content": prompt[cut:]},
            {"role": "assistant", "content": text[max(0, cut - len(prompt)) :]},
        ]
        # versions of transformers without sanitize_control_tokens ignore it
        return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, sanitize_control_tokens=True)

    try:
        ids = rendered(0)
        if limit is None or len(ids) <= limit:
            return ids, False
        longer, fits = 0, len(prompt) + len(text)
        if len(bare := rendered(fits)) > limit:
            raise UserError(
                f"the chat template alone has {len(bare)} tokens; the model is given at most {limit}",
                where=tokenizer.name_or_path,
                hint="max_tokens sets the limit; chat: false leaves the template out",
            )
        while fits - longer > 1:
            middle = (longer + fits) // 2
            longer, fits = (longer, middle) if len(rendered(middle)) <= limit else (middle, fits)
        return rendered(fits), True
    except TemplateError as error:
        raise UserError(
            f"the chat template refuses a prompt with an answer: {error}",
            where=tokenizer.name_or_path,
            hint="chat: false leaves the template out",
        ) from None


@torch.no_grad()
def logits(
    model: Any,
    rows: Sequence[Sequence[int]],
    batch_size: int,
    on_rows: Callable[[int], object] = lambda n: None,
) -> torch.Tensor:
    """The head's outputs, [N, labels] float32 on the CPU, in batches of similar length; ``on_rows`` is called with the
    size of each batch. The model is in eval mode.

    A decoder's head reads the last token that is not the config's ``pad_token_id``. Where the config has none, rows
    are padded with an id that is no row's last.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    outputs = torch.empty(len(rows), model.config.num_labels)
    configured = model.config.pad_token_id
    last_ids = {row[-1] for row in rows}
    pad_id = configured if configured is not None else next(i for i in count() if i not in last_ids)
    model.config.pad_token_id = pad_id
    try:
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            ids, mask = pad_rows([rows[i] for i in batch], pad_id, left=False)
            out = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
            outputs[batch] = out.logits.float().cpu()
            on_rows(len(batch))
    finally:
        model.config.pad_token_id = configured
    return outputs
