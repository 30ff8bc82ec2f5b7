"""Text around a guide's answer: templates, stop texts, and what chat models put around a continuation."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

_PLACEHOLDER = re.compile(r"\{(prompt|prefix)\}")
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "„": "“"}
_OPENING = set("([{“‘«„")
_JOINS = set("([{-–—/'\"“‘«„_@#$")


def fill(template: str, prompt: str, prefix: str = "") -> str:
    """The template with both placeholders filled in at once: braces in the texts are left alone."""
    values = {"prompt": prompt, "prefix": prefix}
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the first stop text, and whether there was one. Some servers leave it in."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def mend_continuation(prefix: str, text: str, counts: Counter[str]) -> str:
    """What a chat model wrote to go on from ``prefix``, made to fit behind it.

    Chat models quote their answer, repeat the prefix, and drop the space in front. Each repair is counted:
    ``quotes_removed``, ``prefix_removed``, ``space_added``.
    """
    bare = _unquoted(text.strip())
    if bare != text.strip():
        counts["quotes_removed"] += 1
    rest = _after_prefix(prefix, bare)
    if rest is not None:
        counts["prefix_removed"] += 1
        return rest.lstrip() if prefix[-1].isspace() else rest
    if _wants_space(prefix, bare):
        counts["space_added"] += 1
        bare = " " + bare
    return bare


def _unquoted(text: str) -> str:
    """``text`` without quotes that stand around the whole of it."""
    if len(text) >= 2 and _QUOTES.get(text[0]) == text[-1]:
        inner = text[1:-1]
        if text[0] not in inner and text[-1] not in inner:
            return inner.strip()
    return text


def _after_prefix(prefix: str, text: str) -> str | None:
    """What follows ``prefix`` at the beginning of ``text``; None where it is not there.

    Case, and how much whitespace stands between words, may differ. A prefix of one word or less is not
    looked for: a continuation may well begin with it.
    """
    words = prefix.split()
    if len(words) < 2:
        return None
    pattern = r"\s+".join(re.escape(word) for word in words)
    match = re.match(pattern, text, re.IGNORECASE)
    return text[match.end() :] if match else None


def _wants_space(prefix: str, text: str) -> bool:
    """Whether a space belongs between the two: the prefix ends with a word or a mark, and a word follows."""
    if not prefix or not text or prefix[-1].isspace() or prefix[-1] in _JOINS:
        return False
    if any(unicodedata.east_asian_width(char) in "WF" for char in (prefix[-1], text[0])):
        return False  # written without spaces
    return text[0].isalnum() or text[0] in _OPENING
