"""Reads ratings and verdicts from the last line of a judge's answer.

The line may be dressed up (Markdown, quotes, brackets, a full stop, ``7/10``), but it must be a rating or a verdict and
nothing else: of a sentence that happens to hold a number, or of several numbers, nothing is read.
"""

from __future__ import annotations

import re

_EMPHASIS = re.compile(r"(?<!\d)[*_`$]+|[*_`$]+(?!\d)")
"""Marks of emphasis, but not what stands between digits: ``1*0`` is not 10."""
_BULLET = re.compile(r"\A(?:[#>|•]+|[-–—](?=\s))\s*")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">", "'": "'", "“": "”", "‘": "’", "«": "»"}
_SCALE = r"1\s*(?:-|–|to)\s*10"
_QUALIFIERS = r"(?:(?:so|thus|therefore|overall|hence),?\s+)?(?:(?:my|the|final|overall|total)\s+)*"
_LABEL = rf"{_QUALIFIERS}(?:rating|score|grade|mark)(?:\s*\(?\s*(?:from\s+)?{_SCALE}\s*\)?)?(?:\s+is|\s+of)?"
_SENTENCE = (
    rf"(?:on a scale (?:of|from) {_SCALE},?\s+)?{_QUALIFIERS}(?:i|we)(?:\s+would|['’]d|\s+will|['’]ll)?\s+"
    r"(?:give|rate|score|grade|assign)(?:\s+(?:it|this|that|the|answer|response|text|an?|rating|score|grade|of|as|at))*"
)
_RATING = re.compile(
    rf"(?:{_LABEL}\s*(?:[:=]|\s[-–—]\s|\s)\s*|{_SENTENCE}\s+)?[\[(]*([0-9]+)(?:\.0)?[\])]*"
    r"(?:\s*(?:/\s*10|\(?(?:out\s+)?of\s+(?:10|ten)\)?))?(?:\s+(?:points?|stars?))?\s*[.!]?",
    re.IGNORECASE,
)


def last_line(answer: str) -> str:
    """The last line with a letter or a digit in it, without marks of emphasis, bullets, quotes and brackets around."""
    for line in reversed(answer.strip().splitlines()):
        plain = _plain(line)
        if any(map(str.isalnum, plain)):
            return plain
    return ""


def _plain(line: str) -> str:
    plain = _EMPHASIS.sub("", _BOXED.sub(r"\1", line)).replace('"', "").strip()
    while (bare := _BULLET.sub("", plain)) != plain or (
        len(plain) > 1 and _PAIRS.get(plain[0]) == plain[-1] and (bare := plain[1:-1].strip()) != plain
    ):
        plain = bare
    return plain


def read_rating(answer: str) -> int | None:
    """The rating in the last line, a whole number from 1 to 10; None for any other last line."""
    match = _RATING.fullmatch(last_line(answer))
    rating = int(match[1][:4]) if match else 0
    return rating if 1 <= rating <= 10 else None


def read_choice(answer: str, choices: str) -> str | None:
    """The one of the ``choices`` (alternatives of a regular expression) in a last line ``Verdict: CHOICE``, as it is
    written there; None for any other last line."""
    pattern = rf"{_QUALIFIERS}verdict(?:\s+is)?\s*[:=]?\s*(?:answer\s+)?[\[(]*({choices})[\])]*\s*[.!]?"
    match = re.fullmatch(pattern, last_line(answer), re.IGNORECASE)
    return match[1] if match else None
