"""Errors that a server reports in a body: their status, also where they come with status 200, and filtered prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlgf_cli.protocols import Failure

_STATUSES: dict[str, int] = {
    "insufficient_quota": 429,
    "rate_limit": 429,
    "too_many_requests": 429,
    "resource_exhausted": 429,
    "invalid_api_key": 401,
    "authentication": 401,
    "unauthenticated": 401,
    "unauthorized": 401,
    "insufficient_credits": 402,
    "payment_required": 402,
    "billing": 402,
    "permission": 403,
    "forbidden": 403,
    "not_found": 404,
    "notfound": 404,
    "context_length": 400,
    "invalid_request": 400,
    "invalid_argument": 400,
    "bad_request": 400,
    "badrequest": 400,
    "overloaded": 503,
    "unavailable": 503,
    "timeout": 504,
}
"""The statuses that go with words in an error's code, type or status, as OpenAI, Anthropic, Google, vLLM and OpenRouter
write them; the first that is found counts."""
_FILTERS = (
    "content_filter", "contentfilter", "content_policy", "moderation", "responsibleaipolicy", "data_inspection",
    "datainspection", "prohibited_content", "safety",
)  # fmt: skip
"""Words in an error's code or type which say that a filter refused the prompt: OpenAI, Azure (also as an inner error),
OpenRouter, Alibaba, Google."""
_UNKNOWN = 500
"""The status of an error that gives none: the server may well answer the next time."""
_DEPTH = 4


@dataclass(frozen=True)
class ServerError:
    """An error in a body: the status that would go with it, its message, and the error itself as the body has it.

    ``begun``: it ended an answer, which has a price.
    """

    status: int
    message: str
    body: Mapping[str, Any]
    begun: bool

    def failure(self) -> Failure:
        """The failure of a request that got this error as its answer."""
        why = f"an error in place of an answer (status {self.status}): {self.message}"
        if is_filtered(self.body):
            return Failure("content_filter", why, final=True)
        kind = "rate_limit" if self.status == 429 else "server" if self.status >= 500 else "refused"
        return Failure(kind, why, final=kind == "refused")


def error_in(content: bytes | Any) -> ServerError | None:
    """The error in a body of status 200, given as bytes or as the value of its JSON; None where it holds none.

    ``{"error": ...}``, a list of these, an error of the first choice, and ``{"object": "error", ...}`` are errors.
    """
    body = content
    if isinstance(content, bytes):
        if b"error" not in content:  # nearly all answers: they are parsed once, by whoever reads them
            return None
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            return None
    value = _error_value(body)
    if value is None:
        return None
    error = value if isinstance(value, Mapping) else {"message": value}
    message = error.get("message") or error.get("detail") or error.get("code") or error.get("type") or "no reason given"
    # half of a surrogate pair, which JSON can hold, no console can print
    text = str(message)[:500].encode("utf-8", "ignore").decode()
    begun = isinstance(body, Mapping) and bool(body.get("choices"))
    return ServerError(_status_of(error, body), text, error, begun)


def is_filtered(error: Any) -> bool:
    """Whether an error says that a filter refused the prompt: this prompt, and not the next one."""
    if isinstance(error, list):
        return any(is_filtered(one) for one in error[:1])
    if not isinstance(error, Mapping):
        return False
    if any(word in name for name in _names(error) for word in _FILTERS):
        return True
    metadata = error.get("metadata")  # OpenRouter's
    return isinstance(metadata, Mapping) and bool(metadata.get("reasons") or metadata.get("flagged_input"))


def _error_value(body: Any) -> Any:
    """The error in a body, of any type; None where there is none."""
    if isinstance(body, list):
        return _error_value(body[0]) if body and isinstance(body[0], Mapping) else None
    if not isinstance(body, Mapping):
        return None
    if body.get("object") == "error" or body.get("type") == "error":
        return body.get("error") or body
    choices = body.get("choices")
    if body.get("error") and not choices:
        return body["error"]
    first = choices[0] if isinstance(choices, list) and choices else None
    return (first.get("error") or None) if isinstance(first, Mapping) else None


def _status_of(error: Mapping[str, Any], body: Any) -> int:
    for holder in (error, body if isinstance(body, Mapping) else {}):
        for key in ("status", "status_code", "code"):
            value = holder.get(key)
            if isinstance(value, str) and value.isascii() and value.isdigit():
                value = int(value[:4])
            if type(value) is int and 400 <= value <= 599:
                return value
    if is_filtered(error):
        return 400
    names = list(_names(error))
    return next((status for word, status in _STATUSES.items() if any(word in name for name in names)), _UNKNOWN)


def _names(error: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """Code, type and status of an error and of the errors within it: ``ContentFilter`` as ``contentfilter``."""
    for key in ("code", "type", "status"):
        if isinstance(name := error.get(key), str):
            yield name.lower().replace("-", "_").replace(" ", "_")
    for key in ("error", "innererror", "inner_error"):
        if isinstance(inner := error.get(key), Mapping) and depth < _DEPTH:
            yield from _names(inner, depth + 1)
