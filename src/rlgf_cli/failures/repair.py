"""Rules that repair a text, for ``rlgf postprocess``. Each is one function ``(text, limit) -> text``.

A rule with nothing to repair returns the text unchanged. No rule returns an empty text for one with words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from rlgf_cli.failures.sentences import is_finished, loop_start, sentences

_END_MARKS = re.compile(r"<\|?(?:end\w*|eos|im_end|eot_id|pad)\|?>|</s>|\[EOS\]|\n\s*#{2,}|\n(?:User|Human|Q):")
_WORD = re.compile(r"\S+")


def end_mark(text: str, limit: int) -> str:
    """Cut at the first written-out end mark (``</s>``, ``<|endoftext|>``, ``<|im_end|>``, a heading, a new turn)."""
    match = _END_MARKS.search(text)
    return _unless_empty(text[: match.start()].rstrip(), text) if match else text


def repetition(text: str, limit: int) -> str:
    """Cut where 1 to 20 words begin to repeat themselves: the first of them stays."""
    spans = [match.span() for match in _WORD.finditer(text)]
    loop = loop_start([text[a:b] for a, b in spans])
    if loop is None:
        return text
    start, size = loop
    return text[: spans[start + size - 1][1]]


def repeats(text: str, limit: int) -> str:
    """Leave out sentences that came before, word for word, whatever their case."""
    first: dict[str, str] = {}
    for sentence in sentences(text):
        first.setdefault(" ".join(sentence.lower().split()), sentence)
    repaired = "".join(first.values())
    return text if repaired == text else repaired.rstrip()


def unfinished(text: str, limit: int) -> str:
    """Leave out a last sentence without an end mark, where another one is before it."""
    parts = sentences(text)
    if len(parts) < 2 or is_finished(text):
        return text
    return "".join(parts[:-1]).rstrip()


def trim(text: str, limit: int) -> str:
    """Keep whole sentences up to ``limit`` words (0: any number); the first one is cut where it alone is longer."""
    spans = [match.span() for match in _WORD.finditer(text)]
    if not limit or len(spans) <= limit:
        return text
    end, count = 0, 0
    for part in sentences(text):
        count += len(part.split())
        if count > limit:
            break
        end += len(part)
    return text[:end].rstrip() or text[: spans[limit - 1][1]]


def _unless_empty(repaired: str, text: str) -> str:
    return repaired if repaired.strip() else text


REPAIRS: dict[str, Callable[[str, int], str]] = {
    "end_mark": end_mark,
    "repetition": repetition,
    "repeats": repeats,
    "unfinished": unfinished,
    "trim": trim,
}
"""Name -> rule, in the order in which they are applied unless another one is given."""


def repair(text: str, rules: Sequence[str], limit: int = 0) -> tuple[str, list[str]]:
    """Apply the named rules in order; returns the text and the names of those that changed it."""
    changed = []
    for name in rules:
        repaired = REPAIRS[name](text, limit)
        if repaired != text:
            changed.append(name)
            text = repaired
    return text, changed
