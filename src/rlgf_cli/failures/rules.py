"""Rules that detect failures in a text. Each is one function ``Response -> bool``; its docstring states the criterion.

The rules look at form alone, not at truth: a flagged text is a failure in almost all cases, but most errors go
undetected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from rlgf_cli.failures.sentences import copied_run, is_finished, loop_start, unfinished_words, words
from rlgf_cli.protocols import FinishReason


@dataclass(frozen=True)
class Response:
    """A text with its prompt, the words of its longest reference (None: no reference), and how it ended."""

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


def empty(response: Response) -> bool:
    """No word at all."""
    return not response.words


def loops(response: Response) -> bool:
    """1 to 20 words come three times in a row (a single word four times), or 2 in 5 of its 4-grams came before.

    The end mark of the text does not count: "on and on and on and." is a loop.
    """
    if loop_start(unfinished_words(response.text)) is not None:
        return True
    grams = [tuple(response.words[i : i + 4]) for i in range(len(response.words) - 3)]
    return len(grams) >= 8 and 1 - len(set(grams)) / len(grams) >= REPEATED_SHARE


def unfinished(response: Response) -> bool:
    """The text was cut at the token limit, or does not end in an end mark."""
    return bool(response.words) and (response.finish_reason == "length" or not is_finished(response.text))


def copied(response: Response) -> bool:
    """12 words or more, and 4 in 5 of all, are one run of words of the prompt."""
    run = copied_run(words(response.prompt), response.words)
    return run >= COPIED_WORDS and run >= COPIED_SHARE * len(response.words)


def overlong(response: Response) -> bool:
    """More than 1.5 times as many words as its longest reference."""
    return response.reference_words is not None and len(response.words) > LONG_RATIO * response.reference_words


RULES: dict[str, Callable[[Response], bool]] = {
    "empty": empty,
    "loops": loops,
    "unfinished": unfinished,
    "copied": copied,
    "overlong": overlong,
}
"""Name -> rule."""


def flags(response: Response) -> list[str]:
    """The names of the rules that flag the text."""
    return [name for name, rule in RULES.items() if rule(response)]
