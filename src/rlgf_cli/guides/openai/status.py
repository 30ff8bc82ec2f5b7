"""What a status of an endpoint means: for the request that got it, and for all requests that would follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from rlgf_cli.guides.openai.server_errors import is_filtered

Meaning = Literal["limited", "server", "again", "filtered", "refused", "quota", "key", "access", "model"]
"""``limited``: wait and send it again; ``server``: it may pass by itself; ``again``: send it again; ``filtered`` and
``refused``: this request alone has no answer. The others hold for every request: see :data:`UNUSABLE`."""
UNUSABLE: dict[Meaning, tuple[str, str]] = {
    "key": (
        "the endpoint {url} refused the key ({why})",
        "check {key}, and that it is for this endpoint",
    ),
    "quota": ("the account's quota is spent ({why})", "check the plan and its billing"),
    "access": ("the endpoint {url} refuses access ({why})", "ask the provider, or check the account's permissions"),
    "model": (
        "{url} has no model {model!r} for this key ({why})",
        "check the model's name, and that the base URL ends as the server wants (usually /v1)",
    ),
}
"""Message and hint of the meanings that no request could survive."""


def meaning(status: int, body: Any, *, succeeded: bool) -> Meaning:
    """The meaning of a status with the body of its error. ``succeeded``: the endpoint has given a text before."""
    names = [body.get(key) for key in ("code", "type")] if isinstance(body, Mapping) else []
    if status == 402 or (status == 429 and "insufficient_quota" in names):
        return "quota"
    if status == 429:
        return "limited"
    if status >= 500:
        return "server"
    if status in (408, 409):
        return "again"
    if is_filtered(body):
        return "filtered"
    if status == 401:
        return "key"
    if status == 403:
        return "access" if succeeded else "model"
    return "model" if status == 404 and not succeeded else "refused"
