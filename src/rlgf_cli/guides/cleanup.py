"""Templates around a guide's prompt, and repairs of its text: thinking, stop texts, chatter, quotes, a prefix."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from rlgf_cli.protocols import FinishReason

_PLACEHOLDER = re.compile(r"\{(prompt|prefix)\}")
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "„": "“"}
_OPENING = set("([{“‘«„")
_JOINS = set("([{-–—/'\"“‘«„_@#$")
_FOREWORD = re.compile(
    r"\A(?:(?:sure|certainly|of course|absolutely|okay|ok|great|here(?:'s|’s| is| are| you go)"
    r"|(?:the )?continu(?:ation|ing)|continued)\b[^\n:]{0,100}:\s*"
    r"|(?:sure|certainly|of course|absolutely)(?: thing)?[!.]?\s*\n+)",
    re.IGNORECASE,
)
"""An announcement that ends with a colon, or stands on a line of its own."""
_AFTERWORD = re.compile(
    r"\n\s*(?:let me know|i hope|hope this|feel free|is there anything|would you like"
    r"|if you(?:'d| would) like)[^\n]*\Z",
    re.IGNORECASE,
)
_THINKING = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))
"""Tags around what a model writes to itself before its answer, where the server leaves it in the text."""
_ELLIPSIS = re.compile(r"\A(?:\.\.\.|…)\s*")


def fill(template: str, prompt: str, prefix: str = "") -> str:
    """The template with both placeholders filled in at once: braces in the texts are left alone."""
    values = {"prompt": prompt, "prefix": prefix}
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def split_thinking(text: str) -> tuple[str, str]:
    """A model's thinking at the beginning of a text, tags included, and the text behind it.

    A block that is not closed was cut off: all of it is thinking. A closing tag without an opening one ends a block
    that the prompt began, as some chat templates do.
    """
    rest = text
    while (after := _after_block(rest)) is not None:
        rest = after
    if rest == text:
        for opening, closing in _THINKING:
            before, tag, after = text.partition(closing)
            if tag and opening not in before:
                rest = after.lstrip("\r\n")
                break
    return text[: len(text) - len(rest)], rest


def _after_block(text: str) -> str | None:
    """The text behind the block of thinking that it begins with; None where it begins with none."""
    start = text.lstrip()
    for opening, closing in _THINKING:
        if start.startswith(opening):
            return start.partition(closing)[2].lstrip("\r\n")
    return None


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the first stop text, and whether there was one. Some servers leave it in."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def clean_text(
    text: str,
    *,
    prefix: str,
    stops: list[str],
    finish: FinishReason,
    chat: bool,
    chatter: bool,
    thinking: bool = True,
    begun: bool = False,
) -> tuple[str, FinishReason, tuple[str, ...]]:
    """The text of an API as the continuation of ``prefix``: ``(text, finish reason, kinds of repairs)``.

    The text is cut at the first stop text, and white space around a whole text is removed. ``chatter``: what chat
    models put around an answer is removed too; ``thinking``: and what they write to themselves before it.
    ``begun``: see :func:`clean_continuation`.
    """
    done: Counter[str] = Counter()
    if thinking:
        thought, text = split_thinking(text)
        if thought:
            done["thinking_removed"] += 1
    text, stopped = cut_at_stop(text, stops)
    if stopped:
        done["cut_at_stop"] += 1
        finish = "stop"
    if not prefix:
        text = without_chatter(text.strip(), done) if chatter else text.strip()
    elif not chat:
        text = text.rstrip()
    elif chatter:
        text = clean_continuation(prefix, text, done, begun=begun)
    else:
        text = text.rstrip()
    return text, finish, tuple(sorted(done))


def without_chatter(text: str, counts: Counter[str]) -> str:
    """``text`` without a chat model's remarks on its answer: an announcement before it, an offer behind it, quotes
    around it. Counted as ``chatter_removed`` and ``quotes_removed``."""
    bare = _AFTERWORD.sub("", _FOREWORD.sub("", text, count=1)).strip()
    if bare and bare != text:
        counts["chatter_removed"] += 1
        text = bare
    bare = _unquoted(text)
    if bare != text:
        counts["quotes_removed"] += 1
    return bare


def clean_continuation(prefix: str, text: str, counts: Counter[str], *, begun: bool = False) -> str:
    """A chat model's continuation of ``prefix``, repaired so that it fits behind the prefix.

    Chat models talk about their answer, quote it, repeat the prefix, and drop the space in front. Each repair is
    counted: ``chatter_removed``, ``quotes_removed``, ``prefix_removed``, ``space_added``.

    ``begun``: the prefix was the beginning of the model's own message. Its tokens go on from there, so white space and
    dots between the two are as the model wrote them: where there is no space, a word is finished.
    """
    led = text[:1].isspace()  # a space of the model's own, where it stands at the very beginning
    own_space = text[: len(text) - len(text.lstrip())]
    bare = without_chatter(text.strip(), counts)
    if not begun and (dotless := _ELLIPSIS.sub("", bare, count=1)) != bare and dotless:
        counts["chatter_removed"] += 1
        bare = dotless
    rest = _after_prefix(prefix, bare)
    if rest is not None:
        counts["prefix_removed"] += 1
        return rest.lstrip() if prefix[-1].isspace() else rest
    if begun:
        return bare if not bare or prefix[-1:].isspace() else own_space + bare
    if _wants_space(prefix, bare):
        if not led:
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
    """The text behind ``prefix`` at the beginning of ``text``; None where ``text`` does not begin with it.

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
