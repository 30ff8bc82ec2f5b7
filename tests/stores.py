"""Texts and keys of a store of guide texts."""

from __future__ import annotations

from rlgf_cli.ledger.store import StoredText


def text(words: str = "hello", guide: str = "g", **changes: object) -> StoredText:
    fields = {"request": "{}", "finish_reason": "stop", "model": "m", "prompt_bytes": 3, **changes}
    return StoredText(guide=guide, text=words, **fields)  # type: ignore[arg-type]


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")
