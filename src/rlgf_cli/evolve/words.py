"""What a text is made of, whatever its spaces, case and punctuation."""

from __future__ import annotations

import unicodedata

_BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
"""Characters that turn the direction of what is shown."""


class _Table(dict[int, str | None]):
    """What ``str.translate`` makes of a character, found out when it is first met: punctuation, space and control
    characters become ``gap``, and those that are not seen (joiners, marks of direction) nothing.
    """

    def __init__(self, gap: str | None) -> None:
        super().__init__()
        self._gap = gap

    def __missing__(self, code: int) -> str | None:
        kind = unicodedata.category(chr(code))
        self[code] = found = None if kind == "Cf" else self._gap if kind[0] in "PZC" or kind == "Sk" else chr(code)
        return found


class _Garbled(dict[int, str | None]):
    """Keeps the characters that no text has: control characters but for tabs and line ends, half of a surrogate pair,
    private and unassigned ones, the mark of a decoding error, marks that turn the direction.
    """

    def __missing__(self, code: int) -> str | None:
        kind = unicodedata.category(chr(code))
        odd = kind in ("Cc", "Cs", "Co", "Cn") and chr(code) not in "\t\n\r"
        self[code] = found = chr(code) if odd or code == 0xFFFD or code in _BIDI else None
        return found


_WORDS, _ESSENCE, _GARBLED = _Table(" "), _Table(None), _Garbled()


def words(text: str) -> list[str]:
    """The words in lower case, without punctuation: letters, digits, marks and signs of any script."""
    return _folded(text).translate(_WORDS).split()


def essence(text: str) -> str:
    """The text in lower case without space and punctuation: equal for texts that differ in nothing else."""
    return _folded(text).translate(_ESSENCE)


def is_garbled(text: str) -> bool:
    """Whether the text has a character that no text has."""
    return bool(text.translate(_GARBLED))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
