"""Sequence classifiers and reward models: any encoder or decoder with a head, and the tokens that it reads.

Training and rewards both go through here, so that a reward scores the very tokens that were trained on.
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
from rlgf_cli.models.load import check_checkpoint_name

EVALUATION = "evaluation.json"
"""The file beside a reward model that holds its evaluation on held-out texts and its threshold."""
_NO_LIMIT = 1_000_000
"""Tokenizers without a limit of their own say 1e30."""
_CHAT = "rlgf_chat"
"""The key in config.json that says whether a model was trained here on rendered conversations."""


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
    """Write into a transformers config the label names, and that the model is trained here, on plain text."""
    architecture.num_labels = len(labels)
    architecture.id2label = dict(enumerate(labels))
    architecture.label2id = {name: i for i, name in enumerate(labels)}
    architecture.problem_type = "single_label_classification" if len(labels) > 1 else None
    setattr(architecture, _CHAT, False)


def trained_on_plain_text(model: Any, path: str) -> bool:
    """Whether ``rlgf train-reward`` made the checkpoint at ``path``. Earlier versions did not say so in config.json;
    their folders have the run's manifest."""
    if getattr(model.config, _CHAT, None) is not None:
        return not getattr(model.config, _CHAT)
    manifest = Path(path, "run.json")
    return manifest.is_file() and read_json(manifest).get("command") == "train-reward"


def token_limit(model: Any, tokenizer: Any, given: int | None = None) -> int | None:
    """The most tokens of a text that are used: what the model reads, or less where ``given`` says so; None: all.

    Raises UserError where ``given`` is more than the model reads.
    """
    known = [int(tokenizer.model_max_length)] if tokenizer.model_max_length < _NO_LIMIT else []
    if (positions := position_limit(model)) is not None:
        known.append(positions)
    if given is not None and known and given > min(known):
        raise UserError(f"max_tokens is {given}; the model reads at most {min(known)}", hint="leave max_tokens out")
    return given if given is not None else min(known, default=None)


def position_limit(model: Any) -> int | None:
    """How many tokens have a position in an encoder or a decoder; None: any number (relative positions alone).

    RoBERTa, and what is made like it (Longformer, MPNet, ESM, ...), counts positions from the padding's id + 1. Its
    table of positions has a row for the padding, which no other table of positions has.
    """
    config = model.config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    tables = (getattr(module, "position_embeddings", None) for module in model.modules())
    padding = next((row for table in tables if (row := getattr(table, "padding_idx", None)) is not None), None)
    if not limit or (padding is None and hasattr(config, "relative_attention_num_buckets")):
        return None
    return int(limit) - (0 if padding is None else padding + 1)


def join(prompt: str, text: str) -> str:
    """Prompt and response as one text: a space between them where neither side of the seam has white space."""
    seam = " " if prompt and text and not prompt[-1].isspace() and not text[0].isspace() else ""
    return prompt + seam + text


def encode(tokenizer: Any, text: str, limit: int | None) -> tuple[list[int], bool]:
    """A text's ids, never none, and whether it was cut, on the tokenizer's ``truncation_side``."""
    ids = tokenizer(text)["input_ids"]
    cut = limit is not None and len(ids) > limit
    if cut:
        ids = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
    # an empty text has no tokens where the tokenizer adds none of its own; the model still must see one
    return ids or [tokenizer.pad_token_id], cut


def encode_chat(tokenizer: Any, prompt: str, text: str, limit: int | None) -> tuple[list[int], bool]:
    """Ids of the prompt (user) and the text (assistant) in the tokenizer's chat template, and whether they were cut.

    The template writes BOS itself, and control tokens that the two spell are read as text. What is longer than
    ``limit`` loses the beginning of the prompt and then of the text, and nothing of the template. Raises UserError
    where the template alone is longer, or refuses such a conversation.
    """
    from jinja2 import TemplateError

    def rendered(cut: int) -> list[int]:
        """``cut``: characters that are left out of prompt + text."""
        turns = [
            {"role": "user", "content": prompt[cut:]},
            {"role": "assistant", "content": text[max(0, cut - len(prompt)) :]},
        ]
        # a transformers that does not know sanitize_control_tokens ignores it
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
    """The head's outputs, [N, labels] float32 on the CPU, in batches of similar length, of each of which ``on_rows``
    is told. The model is in eval mode.

    A decoder's head reads the last token that is not the config's ``pad_token_id``. Where the config has none, it reads
    a row's last token, whatever that is: rows are then filled up with an id that ends none of them.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = torch.empty(len(rows), model.config.num_labels)
    own = model.config.pad_token_id
    ends = {row[-1] for row in rows}
    pad_id = own if own is not None else next(i for i in count() if i not in ends)
    model.config.pad_token_id = pad_id
    try:
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            ids, mask = pad_rows([rows[i] for i in batch], pad_id, left=False)
            out = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
            found[batch] = out.logits.float().cpu()
            on_rows(len(batch))
    finally:
        model.config.pad_token_id = own
    return found
