"""Words, sentences and endings of a plain text, as all rules about failures split it."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CLOSING = "\"')]}»”’"
_ENDS = ".!?。！？…"
_BREAK = re.compile(rf"(?<=[{_ENDS}])[{re.escape(_CLOSING)}]*\s+|\n+\s*|(?<=[。！？])")
_SHORT = {
    "mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "vs", "e.g", "i.e", "etc", "al", "fig", "eq", "no", "inc", "ltd",
    "u.s", "a.m", "p.m", "dept", "approx", "gen", "rep", "sen", "gov", "cf",
}  # fmt: skip
"""Abbreviations, whose full stop ends no sentence (lower case, without it)."""


def words(text: str) -> list[str]:
    """The words, split at white space."""
    return text.split()


def sentences(text: str) -> list[str]:
    """The sentences with the white space behind them: joined, they are the text.

    One ends behind ``.``, ``!``, ``?`` or an ellipsis (and closing quotes) before white space, at a line break, and
    behind the full stop of Chinese and Japanese; not behind an abbreviation or a single initial.
    """
    parts: list[str] = []
    start = 0
    for match in _BREAK.finditer(text):
        if match.end() == start or not text[start : match.start()].strip():
            continue
        if "\n" not in match.group() and _is_short(text[start : match.start()]):
            continue
        parts.append(text[start : match.end()])
        start = match.end()
    if text[start:].strip():
        parts.append(text[start:])
    elif parts:
        parts[-1] += text[start:]
    return parts


def _is_short(sentence: str) -> bool:
    """Whether the text before a break ends in an abbreviation or an initial."""
    if not sentence.endswith("."):
        return False
    last = sentence.split()[-1].strip(_CLOSING + "(").removesuffix(".").lower()
    return last in _SHORT or (len(last) == 1 and last.isalpha() and last != "i")


def is_finished(text: str) -> bool:
    """Whether the text ends as a sentence does: in an end mark, with or without closing quotes behind it."""
    stripped = text.rstrip().rstrip(_CLOSING)
    return bool(stripped) and stripped[-1] in _ENDS


def unfinished_words(text: str) -> list[str]:
    """The words, without the end mark and the closing quotes of the text where a word stands before them."""
    plain = text.rstrip().rstrip(_CLOSING).rstrip(_ENDS).rstrip(_CLOSING)
    return words(plain if plain and not plain[-1].isspace() else text)


def loop_start(tokens: Sequence[str], *, times: int = 3, longest: int = 20) -> tuple[int, int] | None:
    """The first place where a run of 1 to ``longest`` words comes ``times`` times in a row: its index and length.

    A single word must come once more than that: "very very very" is emphasis.
    """
    count = len(tokens)
    for start in range(count):
        for size in range(1, min(longest, (count - start) // times) + 1):
            need = times + (size == 1)
            if start + size * need > count:
                continue
            unit = tokens[start : start + size]
            if all(tokens[start + k * size : start + (k + 1) * size] == unit for k in range(1, need)):
                return start, size
    return None


def copied_run(prompt: Sequence[str], text: Sequence[str]) -> int:
    """Words of the longest run of ``text`` that stands in ``prompt`` as it is."""
    where: dict[str, list[int]] = {}
    for i, word in enumerate(prompt):
        where.setdefault(word, []).append(i)
    best = 0
    before: dict[int, int] = {}
    for word in text:
        here = {i: before.get(i - 1, 0) + 1 for i in where.get(word, ())}
        best = max(best, max(here.values(), default=0))
        before = here
    return best
