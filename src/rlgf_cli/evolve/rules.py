"""Rules that a rewrite, or the answer to an instruction, has to keep to be part of the set.

Each has a name that it is counted by. They look at form alone and never at what somebody thinks of a text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlgf_cli.evolve.operations import PLACEHOLDER
from rlgf_cli.protocols import FinishReason

_REFUSAL = re.compile(
    r"\A\W*(?:(?:i am|i'm|i’m|we are|we're) (?:very |so |truly |really )?sorry\b"
    r"|(?:sorry|apologies|unfortunately)\b[,.! ]+(?:but )?(?:i|we)\b"
    r"|as an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|(?:i|we) (?:cannot|can't|can’t|can not|could not|won't|won’t|will not|must decline|am unable|am not able"
    r"|'m unable|’m unable|'m not able|’m not able)\b)",
    re.IGNORECASE,
)
"""How a text begins that refuses. An instruction speaks of itself rarely enough in these words."""
_LEAK = 6
"""So many words in a row of what the guide was asked, and not of the instruction, were copied."""


@dataclass(frozen=True)
class Limits:
    """The longest rewrite and the longest answer, in words."""

    max_words: int = 300
    max_answer_words: int = 1000


def broken_by_rewrite(text: str, finish: FinishReason, *, instruction: str, prompt: str, limits: Limits) -> str | None:
    """The rule that a rewrite of ``instruction`` breaks, or None. ``prompt``: the operation's, with its placeholder.

    ``empty``: no word. ``refusal``: it begins as refusals do. ``cut``: the guide ran out of tokens. ``too_long``: more
    than ``limits.max_words`` words. ``unchanged``: the instruction's own words. ``template``: it has six words in a
    row of what the guide was asked.
    """
    if (rule := _broken(text, finish, prompt, instruction, limits.max_words)) is not None:
        return rule
    return "unchanged" if _words(text) == _words(instruction) else None


def broken_by_answer(text: str, finish: FinishReason, *, instruction: str, limits: Limits) -> str | None:
    """The rule that an answer to ``instruction`` breaks, or None: as for rewrites; ``echo``: the instruction itself."""
    if (rule := _broken(text, finish, "", instruction, limits.max_answer_words)) is not None:
        return rule
    return "echo" if _words(text) == _words(instruction) else None


def _broken(text: str, finish: FinishReason, prompt: str, instruction: str, max_words: int) -> str | None:
    if not _words(text):
        return "empty"
    if _REFUSAL.match(text) and not _REFUSAL.match(instruction):
        return "refusal"
    if len(text.split()) > max_words:
        return "too_long"
    if finish == "length":
        return "cut"
    return "template" if leaks(text, prompt, instruction) else None


def leaks(text: str, prompt: str, instruction: str) -> bool:
    """Whether the text has a run of words of the operation's prompt that is not the instruction's own."""
    asked = [run for part in prompt.split(PLACEHOLDER) for run in _runs(part)]
    return not (_runs(text) & set(asked)).issubset(_runs(instruction))


def _runs(text: str) -> set[tuple[str, ...]]:
    words = _words(text)
    return {tuple(words[i : i + _LEAK]) for i in range(len(words) - _LEAK + 1)}


def _words(text: str) -> list[str]:
    """The words in lower case, without punctuation: digits, letters and signs of any script."""
    return re.findall(r"\w+", text.casefold())
