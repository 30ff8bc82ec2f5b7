"""What an OpenAI-compatible server sent: nothing in it is taken for granted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlgf_cli.config.guide import Api
from rlgf_cli.protocols import Failure, FinishReason

_NO_COUNT = 10**10
"""From here on a number of tokens is none."""
_FINISH: dict[Any, FinishReason] = {"stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Reply:
    """A body that was read: ``found`` is the text with the reason why it ended, or what is wrong with the body.

    ``usage`` has the token counts that the server gave, ``model`` the name that it reported.
    """

    found: tuple[str, FinishReason] | Failure
    model: str | None = None
    usage: dict[str, int] = field(default_factory=dict)


def read_reply(content: bytes | Mapping[str, Any], api: Api) -> Reply:
    """The reply in a body, given as bytes or as what its JSON holds."""
    body: Any = content
    if isinstance(content, bytes):
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            return Reply(Failure("malformed", f"the answer is not JSON ({str(error)[:80]})"))
    if not isinstance(body, Mapping):
        return Reply(Failure("malformed", "the answer is not a JSON object"))
    model = body.get("model")
    # half of a surrogate pair, which JSON can hold, no file can
    name = model.encode("utf-8", "ignore").decode() if isinstance(model, str) else ""
    return Reply(_choice(body, api), name or None, _usage(body.get("usage")))


def _choice(body: Mapping[str, Any], api: Api) -> tuple[str, FinishReason] | Failure:
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return Failure("malformed", "the answer holds no choice")
    choice = choices[0]
    if api == "chat":
        message = choice.get("message")
        message = message if isinstance(message, dict) else {}
        if message.get("refusal"):
            return Failure("refusal", "the model refused to answer", final=True)
        text = message.get("content")
    else:
        text = choice.get("text")
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        filtered = reason == "content_filter"
        why = f"the answer ended with the reason {reason!r}, neither stop nor length"
        return Failure("content_filter" if filtered else "finish_reason", why, final=filtered)
    if not isinstance(text, str):
        return Failure("malformed", "the answer holds no text")
    return text, _FINISH[reason]


def _usage(usage: Any) -> dict[str, int]:
    counts = usage if isinstance(usage, dict) else {}
    found = {name: counts.get(name) for name in ("prompt_tokens", "completion_tokens")}
    return {name: count for name, count in found.items() if type(count) is int and 0 <= count < _NO_COUNT}
