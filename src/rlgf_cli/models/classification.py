"""Sequence classifiers and reward models: loading, labels, the tokens of a prompt with its text, and logits.

Training and rewards both encode texts here, so that a reward reads the same tokens as its training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
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
from rlgf_cli.models.truncation import never_cut, without_oldest_turns
from rlgf_cli.models.turns import NO_KWARGS
from rlgf_cli.protocols import Message, Prompt
from rlgf_cli.protocols.messages import as_messages, last_words, with_last_words

EVALUATION = "evaluation.json"
"""The file beside a reward model that holds its evaluation on held-out texts and its threshold."""
_NO_LIMIT = 1_000_000
"""A tokenizer without a limit has model_max_length 1e30."""
_CHAT = "rlgf_chat"
"""The key in config.json: whether rlgf trained the model on rendered conversations."""
_KWARGS = "rlgf_chat_template_kwargs"


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
    """Write into a transformers config the label names, and that rlgf trains the model, on plain text so far."""
    architecture.num_labels = len(labels)
    architecture.id2label = dict(enumerate(labels))
    architecture.label2id = {name: i for i, name in enumerate(labels)}
    architecture.problem_type = "single_label_classification" if len(labels) > 1 else None
    setattr(architecture, _CHAT, False)


def store_chat(architecture: Any, kwargs: Mapping[str, Any]) -> None:
    """Write into a transformers config that the model reads conversations in the chat template, with its variables."""
    setattr(architecture, _CHAT, True)
    if kwargs:
        setattr(architecture, _KWARGS, dict(kwargs))


def stored_chat(model: Any, path: str) -> bool | None:
    """Whether ``rlgf train-reward`` trained the checkpoint at ``path`` on conversations: config.json says it, or, for
    earlier versions, the run's manifest. None for a model from elsewhere."""
    if (stored := getattr(model.config, _CHAT, None)) is not None:
        return bool(stored)
    manifest = Path(path, "run.json")
    return False if manifest.is_file() and read_json(manifest).get("command") == "train-reward" else None


def stored_kwargs(model: Any) -> dict[str, Any]:
    """The variables of the chat template that the model was trained with."""
    return dict(getattr(model.config, _KWARGS, None) or {})


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


def encode_chat(
    tokenizer: Any, prompt: Prompt, text: str, limit: int | None, kwargs: Mapping[str, Any] = NO_KWARGS
) -> tuple[list[int], bool]:
    """Ids of the prompt and the text (assistant) in the tokenizer's chat template, and whether they were cut.

    The template writes BOS itself, and control tokens that prompt or text spell out are read as text. What is longer
    than ``limit`` loses the oldest turns of a conversation, then the beginning of the last message and then of the
    text, and nothing of the template and the system message. Raises UserError where these alone are longer, or where
    the template refuses the conversation.
    """
    from jinja2 import TemplateError

    def rendered(before: Prompt, answer: str) -> list[int]:
        turns = [asdict(message) for message in (*as_messages(before), Message("assistant", answer))]
        # versions of transformers without sanitize_control_tokens ignore it
        return tokenizer.apply_chat_template(
            turns, tokenize=True, return_dict=False, sanitize_control_tokens=True, **kwargs
        )

    def without(cut: int) -> list[int]:
        """Ids without the first ``cut`` characters of the last message and the text."""
        return rendered(with_last_words(left, words[cut:]), text[max(0, cut - len(words)) :])

    try:
        ids = rendered(prompt, text)
        if limit is None or len(ids) <= limit:
            return ids, False
        for left in without_oldest_turns(prompt):
            if left != prompt and len(ids := rendered(left, text)) <= limit:
                return ids, True
        words = last_words(left)
        longer, fits = 0, len(words) + len(text)
        if len(bare := without(fits)) > limit:
            raise UserError(
                f"{never_cut(left, 'the chat template')} {len(bare)} tokens; the model is given at most {limit}",
                where=tokenizer.name_or_path,
                hint="max_tokens sets the limit; chat: false leaves the template out",
            )
        while fits - longer > 1:
            middle = (longer + fits) // 2
            longer, fits = (longer, middle) if len(without(middle)) <= limit else (middle, fits)
        return without(fits), True
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
