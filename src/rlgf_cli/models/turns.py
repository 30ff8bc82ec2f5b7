"""The token with which a chat template ends the assistant's turn, and so a response."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from rlgf_cli.errors import UserError

_QUESTION, _ANSWER = "turnprobe-user", "turnprobe-assistant"


@dataclass(frozen=True)
class TurnEnd:
    """The token that ends the assistant's turn; None where there is none, and ``problem`` says why."""

    token: str | None = None
    id: int | None = None
    problem: str = ""


def check_template(tokenizer: Any) -> None:
    """Raise UserError for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template",
            hint="leave text.chat out and give text.template, or use a chat model",
        )


def turn_end(tokenizer: Any) -> TurnEnd:
    """Render a question and an answer, and read what follows the answer.

    The end is the first token there, which must be an added token of the tokenizer. The template may have white space
    before it (Llama 2), a line break after it (ChatML) or EOS as well (Phi 3).
    """
    check_template(tokenizer)
    return _turn_end(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=16)
def _turn_end(tokenizer: Any, _template: str) -> TurnEnd:
    """``_template`` is a key of the cache only: a tokenizer's template may be replaced."""
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    except TemplateError as error:
        return TurnEnd(problem=f"the chat template does not take an assistant's message ({error})")
    _, answer, after = rendered.rpartition(_ANSWER)
    if not answer:
        return TurnEnd(problem="the chat template leaves out the assistant's words")
    end = after.lstrip()
    if not end:
        return TurnEnd(problem="the chat template puts nothing behind the assistant's words")
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if end.startswith(token.content)}
    if not added:
        return TurnEnd(problem=f"{end.rstrip()!r}, the chat template's end of a turn, is not one token")
    token = max(added, key=len)
    return TurnEnd(token, added[token])
