"""Reads the responses of an OpenAI-compatible server, and checks every field that it uses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rlgf_cli.config.guide import Api
from rlgf_cli.protocols import Completion, Failure, FinishReason

_NO_COUNT = 10**10
"""Larger numbers are no counts of tokens."""
_FINISH: dict[Any, FinishReason] = {"stop": "stop", "length": "length"}


def read_response(content: bytes | Mapping[str, Any], api: Api) -> Completion | Failure:
    """The completion in a body, given as bytes or as the value of its JSON; a failure where there is no usable text.

    Both have the model that the server reported and the token counts that it gave.
    """
    body: Any = content
    if isinstance(content, bytes):
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            return Failure("malformed", f"the answer is not JSON ({str(error)[:80]})")
    if not isinstance(body, Mapping):
        return Failure("malformed", "the answer is not a JSON object")
    model = body.get("model")
    # half of a surrogate pair, which JSON can hold, no file can
    name = model.encode("utf-8", "ignore").decode() if isinstance(model, str) else ""
    return replace(_choice(body, api), model=name, usage=_usage(body.get("usage")))


def _choice(body: Mapping[str, Any], api: Api) -> Completion | Failure:
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
    return Completion(text, _FINISH[reason], model="")


def _usage(usage: Any) -> dict[str, int]:
    given = usage if isinstance(usage, dict) else {}
    counts = {name: given.get(name) for name in ("prompt_tokens", "completion_tokens")}
    return {name: count for name, count in counts.items() if type(count) is int and 0 <= count < _NO_COUNT}
