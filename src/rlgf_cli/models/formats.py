"""The text format that a model is used with: the config's, the one stored with the checkpoint, or the tokenizer's chat
template; and what a user should know of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlgf_cli.config.common import TextConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.text import FILE, Origin, TextFormat
from rlgf_cli.models.turns import check_template


def text_format(
    config: TextConfig | None, tokenizer: Any, folder: str | Path, *, chat_default: bool = True
) -> tuple[TextFormat, Origin]:
    """The format of the checkpoint at ``folder`` (or of a hub name) with the keys that the config sets.

    Where neither says otherwise, a tokenizer with a chat template uses it (``chat_default`` False: plain text). Raises
    UserError for a chat template that the tokenizer lacks, and for its variables without it.
    """
    stored = TextFormat.load(folder) if Path(folder, FILE).is_file() else None
    base = stored or TextFormat(chat=chat_default and bool(tokenizer.chat_template))
    text = TextFormat.from_config(config, base)
    if text.chat:
        check_template(tokenizer)
    elif text.chat_template_kwargs:
        raise UserError(
            "text.chat_template_kwargs is given, and no chat template is used",
            hint="leave it out, or leave text.template and --no-chat out and use a tokenizer with a chat template",
        )
    if stored is not None and (text.chat, text.template) == (stored.chat, stored.template):
        return text, "stored"
    return text, "given" if (text.chat, text.template) != (base.chat, base.template) else "default"


def describe(loaded: Loaded) -> str:
    """One line: how prompts become text, where that was settled, and the token that ends a response."""
    end = loaded.tokenizer.convert_ids_to_tokens(loaded.eos_id)
    return f"text: {describe_format(loaded.text, loaded.text_origin)}; a response ends with {end!r}"


def describe_format(text: TextFormat, origin: Origin) -> str:
    """How prompts become text, and where that was settled."""
    where = {"stored": ", as stored with the checkpoint", "given": ", as the config says", "default": ""}[origin]
    if text.chat:
        own = f" with {dict(text.chat_template_kwargs)}" if text.chat_template_kwargs else ""
        shape = f"the tokenizer's chat template{own}"
    elif text.template == "{prompt}":
        shape = "the prompt as it is, without a template"
    else:
        shape = f"the template {text.template!r}"
    return shape + where


def ignored_template(loaded: Loaded) -> str:
    """The warning for a model whose chat template is not used though it was not trained without; else empty."""
    if loaded.text.chat or loaded.text_origin == "stored" or not loaded.tokenizer.chat_template:
        return ""
    if loaded.text_origin == "default":
        return "this run began before a model's chat template was used by default, and goes on without it"
    return (
        "this model has a chat template, and it is NOT used: prompts reach the model without the turns that it was "
        "trained on, and an instruct model then writes rubbish; leave --no-chat and text.template out, unless this is "
        "what you compare"
    )


def unseen_lead(loaded: Loaded) -> str:
    """The warning for a template that has more than white space between its generation prompt and an answer."""
    end = loaded.turn_end
    if end is None or not end.lead:
        return ""
    return (
        f"the chat template puts {end.lead!r} between its generation prompt and an answer, and a response is taught "
        "and generated without it; text.chat_template_kwargs sets the template's variables "
        "(Qwen3: enable_thinking: false puts it into the generation prompt)"
    )


def warnings(loaded: Loaded) -> list[str]:
    """What a user should know of the text format before anything is trained or generated."""
    return [text for text in (ignored_template(loaded), loaded.turn_end_problem, unseen_lead(loaded)) if text]
