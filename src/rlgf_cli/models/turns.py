"""A tokenizer's chat template: conversations as text, and the token that ends the assistant's turn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError

from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Message

_QUESTION, _ANSWER = "turnprobe-user", "turnprobe-assistant"
NO_KWARGS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class TurnEnd:
    """The token that ends the assistant's turn; None where there is none, and ``problem`` says why.

    ``lead`` is what the template has between its generation prompt and the assistant's words, without white space
    around it: a response is generated and taught directly behind the generation prompt, without it.
    """

    token: str | None = None
    id: int | None = None
    problem: str = ""
    lead: str = ""


def check_template(tokenizer: Any) -> None:
    """Raise UserError for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template",
            hint="leave text.chat out and give text.template, or use a chat model",
        )


def render(tokenizer: Any, messages: Sequence[Message], kwargs: Mapping[str, Any]) -> str:
    """The conversation in the chat template, with its generation prompt. ``kwargs`` are the template's own variables.

    Raises UserError for a conversation that the template refuses.
    """
    check_template(tokenizer)
    turns = [asdict(message) for message in messages]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **kwargs)
    except TemplateError as error:
        raise refused(error, messages) from None


def refused(error: TemplateError, messages: Sequence[Message]) -> UserError:
    """The error of a chat template that refuses a conversation, with the roles that it was given."""
    return UserError(
        f"the chat template refuses a conversation of {', '.join(message.role for message in messages)}: {error}",
        hint="some templates take no system message (put it into the first message of the user), or want user and "
        "assistant in turn",
    )


def turn_end(tokenizer: Any, kwargs: Mapping[str, Any] = NO_KWARGS) -> TurnEnd:
    """Render a question and an answer, and read what follows the answer.

    The end is the first token there, which must be an added token of the tokenizer. The template may have white space
    before it (Llama 2), a line break after it (ChatML) or EOS as well (Phi 3).
    """
    check_template(tokenizer)
    return _turn_end(tokenizer, str(tokenizer.chat_template), json.dumps(dict(kwargs), sort_keys=True))


@lru_cache(maxsize=16)
def _turn_end(tokenizer: Any, _template: str, kwargs: str) -> TurnEnd:
    """``_template`` is a key of the cache only: a tokenizer's template may be replaced."""
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    own = json.loads(kwargs)
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False, **own)
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True, **own)
    except TemplateError as error:
        return TurnEnd(problem=f"the chat template does not take an assistant's message ({error})")
    before, answer, after = rendered.rpartition(_ANSWER)
    if not answer:
        return TurnEnd(problem="the chat template leaves out the assistant's words")
    lead = before.removeprefix(prompt).strip() if before.startswith(prompt) else ""
    end = after.lstrip()
    if not end:
        return TurnEnd(problem="the chat template puts nothing behind the assistant's words")
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if end.startswith(token.content)}
    if not added:
        return TurnEnd(problem=f"{end.rstrip()!r}, the chat template's end of a turn, is not one token")
    token = max(added, key=len)
    return TurnEnd(token, added[token], lead=lead)
