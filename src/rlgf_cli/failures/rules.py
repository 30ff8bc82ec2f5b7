"""Rules that find failures in a text: each is one function ``Written -> bool``, and says what it goes by.

They look at form alone and know nothing of truth: what is flagged is a failure in almost all cases, but most ways to
be wrong are beyond them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from rlgf_cli.failures.sentences import copied_run, is_finished, loop_start, words
from rlgf_cli.protocols import FinishReason


@dataclass(frozen=True)
class Written:
    """A text, the prompt that it answers, its longest reference in words (None: no reference), and how it ended."""

    prompt: str
    text: str
    reference_words: int | None = None
    finish_reason: FinishReason | None = None

    @cached_property
    def words(self) -> list[str]:
        return words(self.text)


COPIED_WORDS = 12
COPIED_SHARE = 0.8
LONG_RATIO = 1.5
REPEATED_SHARE = 0.4


def empty(written: Written) -> bool:
    """No word at all."""
    return not written.words


def loops(written: Written) -> bool:
    """1 to 20 words come three times in a row (a single word four times), or 2 in 5 of its 4-grams came before."""
    if loop_start(written.words) is not None:
        return True
    grams = [tuple(written.words[i : i + 4]) for i in range(len(written.words) - 3)]
    return len(grams) >= 8 and 1 - len(set(grams)) / len(grams) >= REPEATED_SHARE


def unfinished(written: Written) -> bool:
    """It was cut at the token limit, or does not end in an end mark."""
    return bool(written.words) and (written.finish_reason == "length" or not is_finished(written.text))


def copied(written: Written) -> bool:
    """12 words or more, and 4 in 5 of all, are one run of words of the prompt."""
    run = copied_run(words(written.prompt), written.words)
    return run >= COPIED_WORDS and run >= COPIED_SHARE * len(written.words)


def overlong(written: Written) -> bool:
    """More than 1.5 times as many words as its longest reference."""
    return written.reference_words is not None and len(written.words) > LONG_RATIO * written.reference_words


RULES: dict[str, Callable[[Written], bool]] = {
    "empty": empty,
    "loops": loops,
    "unfinished": unfinished,
    "copied": copied,
    "overlong": overlong,
}
"""Name -> rule."""


def flags(written: Written) -> list[str]:
    """The names of the rules that the text falls under."""
    return [name for name, rule in RULES.items() if rule(written)]
