"""The words and characters of a text, normalised: without case, spaces and punctuation."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable


class _Table(dict[int, str | None]):
    """A table for ``str.translate``: ``replace(character, category)``, computed when a character is first met."""

    def __init__(self, replace: Callable[[str, str], str | None]) -> None:
        super().__init__()
        self._replace = replace

    def __missing__(self, code: int) -> str | None:
        self[code] = replacement = self._replace(chr(code), unicodedata.category(chr(code)))
        return replacement


def _without_marks(gap: str | None) -> _Table:
    """Punctuation, space and control characters become ``gap``; invisible ones (joiners, marks of direction) go."""
    return _Table(lambda c, kind: None if kind == "Cf" else gap if kind[0] in "PZC" or kind == "Sk" else c)


def _only_garbled(c: str, kind: str) -> str | None:
    """Keep the characters that no text has: control characters but tabs and line ends, halves of surrogate pairs,
    private and unassigned ones, the mark of a decoding error, marks that turn the direction.
    """
    odd = kind in ("Cc", "Cs", "Co", "Cn") and c not in "\t\n\r"
    return c if odd or c == "\ufffd" or "\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069" else None


_WORDS, _ESSENCE, _GARBLED = _without_marks(" "), _without_marks(None), _Table(_only_garbled)


def words(text: str) -> list[str]:
    """The words in lower case, without punctuation: letters, digits, marks and signs of any script."""
    return _folded(text).translate(_WORDS).split()


def essence(text: str) -> str:
    """The text in lower case without spaces and punctuation: equal for texts that differ in nothing else."""
    return _folded(text).translate(_ESSENCE)


def is_garbled(text: str) -> bool:
    """Whether the text has a character that no text has."""
    return bool(text.translate(_GARBLED))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
