"""Boundaries between two authors' tokens: which cuts keep the text unchanged, and an audit of losses at boundaries.

Training never tokenises joined text again: the second author's text is tokenised on its own, after the first author's
tokens. The audit does the same, decodes the tokens, and attributes every difference. What the tokenizer also loses on
the whole text (unknown characters, whitespace, case) is the tokenizer's loss; all else is a defect of the boundary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlgf_cli.models.text import TextFormat

Loss = Literal["none", "tokenizer", "boundary"]
"""``none``: decoded and original text are equal; ``tokenizer``: the tokenizer does not distinguish them; ``boundary``:
it does."""

_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class TokenBoundary:
    """A text by two authors as tokens, and decoded again.

    ``first`` and ``second``: the authors' ids; ``text``: the intended text; ``decoded``: the text of the ids. The cut
    was drawn at ``drawn`` tokens and is at ``len(first)``, which is later where the text was not stable at ``drawn``.
    """

    first: list[int]
    second: list[int]
    text: str
    decoded: str
    loss: Loss
    drawn: int

    @property
    def moved(self) -> int:
        """By how many tokens the cut moved."""
        return len(self.first) - self.drawn


@dataclass
class BoundaryAudit:
    """Counts over many boundaries. ``examples``: the first boundary with each kind of loss."""

    losses: Counter[str] = field(default_factory=Counter)
    moves: Counter[int] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    examples: dict[str, TokenBoundary] = field(default_factory=dict)

    def add(self, boundary: TokenBoundary) -> None:
        self.losses[boundary.loss] += 1
        self.moves[boundary.moved] += 1
        self.tokens.update(first=len(boundary.first), second=len(boundary.second))
        if boundary.loss != "none":
            self.examples.setdefault(boundary.loss, boundary)

    @property
    def boundaries(self) -> int:
        return self.losses.total()

    @property
    def stable(self) -> float | None:
        """The share of cuts that did not move; None without cuts."""
        return self.moves[0] / self.boundaries if self.boundaries else None

    def to_json(self) -> dict[str, Any]:
        moved = [by for by, count in sorted(self.moves.items()) if by for _ in range(count)]
        return {
            "seams": self.boundaries,
            "exact": self.losses["none"],
            "lost_by_tokenizer": self.losses["tokenizer"],
            "lost_at_seam": self.losses["boundary"],
            "stable": self.stable,
            "moved": len(moved),
            "moved_tokens_mean": sum(moved) / len(moved) if moved else 0.0,
            "moved_tokens_max": max(moved, default=0),
            "tokens_first": self.tokens["first"],
            "tokens_second": self.tokens["second"],
        }


def is_boundary(text: TextFormat, tokenizer: Any, ids: Sequence[int], n: int, *, whole_words: bool) -> bool:
    """Whether the text of ``ids[:n]`` stays unchanged whatever follows, as far as ``ids`` has following tokens.

    Never inside a character (the decoder shows a replacement character, or nothing yet). With ``whole_words`` not
    inside a word either: a following token, which may be EOS, must continue with something else.
    """
    before = _decode(text, tokenizer, ids[:n])
    if before.endswith(_REPLACEMENT) or _begins_a_character(tokenizer, ids[:n]):
        return False
    if not whole_words or not before or not before[-1].isalnum():
        return True
    if n == len(ids):
        return False
    after = _decode(text, tokenizer, ids[: n + 1])[len(before) :]
    if not after:
        return not _begins_a_character(tokenizer, ids[: n + 1])
    return not (after[0].isalnum() or after[0] == _REPLACEMENT)


def cut_in_tokens(text: TextFormat, tokenizer: Any, whole: str, n: int, *, whole_words: bool) -> TokenBoundary:
    """``whole`` cut after ``n`` of its tokens, or at the next boundary after them, and continued by a second author.

    The second author is given the text of the first tokens, and its text is the rest of ``whole``.
    """
    ids = text.encode_response(tokenizer, whole)
    n = min(n, len(ids))
    at = next(
        (k for k in range(n, len(ids)) if is_boundary(text, tokenizer, ids, k, whole_words=whole_words)), len(ids)
    )
    rest = _decode(text, tokenizer, ids)[len(_decode(text, tokenizer, ids[:at])) :]
    return _boundary(text, tokenizer, ids[:at], rest, whole, [], drawn=n)


def cut_in_text(text: TextFormat, tokenizer: Any, prefix: str, continuation: str) -> TokenBoundary:
    """Two texts by two authors: the first tokenised as a response, the second as its continuation."""
    first = text.encode_response(tokenizer, prefix)
    parts = _parts(text, tokenizer, _round_trip_inside(text, tokenizer, prefix), continuation, first)
    return _boundary(text, tokenizer, first, continuation, prefix + continuation, parts)


def append_text(text: TextFormat, tokenizer: Any, first: Sequence[int], continuation: str) -> TokenBoundary:
    """A text after given tokens, as in a roll-out."""
    before = _decode(text, tokenizer, first)
    parts = _parts(text, tokenizer, before, continuation, first)
    return _boundary(text, tokenizer, first, continuation, before + continuation, parts)


def tokenizer_loss(text: TextFormat, tokenizer: Any, whole: str) -> str:
    """The tokenizer's loss on a text: ``nothing``, ``whitespace``, ``unknown characters`` or ``normalisation``."""
    ids = text.encode_response(tokenizer, whole)
    shown = _decode(text, tokenizer, ids)
    if shown == whole:
        return "nothing"
    if shown.split() == whole.split() or "".join(shown.split()) == "".join(whole.split()):
        return "whitespace"
    return "unknown characters" if tokenizer.unk_token_id in ids else "normalisation"


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers have the same vocabulary: a text of one may then be cut inside a word for the other."""
    return one is not None and other is not None and one.get_vocab() == other.get_vocab()


def _boundary(
    text: TextFormat,
    tokenizer: Any,
    first: Sequence[int],
    continuation: str,
    whole: str,
    parts: Sequence[str],
    *,
    drawn: int | None = None,
) -> TokenBoundary:
    """The boundary with its loss. ``parts``: texts besides ``whole`` that count as the tokenizer's loss."""
    encode = text.encode_continuation if first else text.encode_response
    second = encode(tokenizer, continuation) if continuation else []
    decoded = _decode(text, tokenizer, [*first, *second])
    loss: Loss = "none"
    if decoded != whole:
        shown = _round_trip(text, tokenizer, whole)
        seen = _canonical(text, tokenizer, decoded)
        known = (_canonical(text, tokenizer, other) for other in (whole, *parts))
        # where the tokenizer loses nothing on the whole text, the loss is at the boundary
        loss = "tokenizer" if shown != whole and (decoded == shown or seen in known) else "boundary"
    return TokenBoundary(list(first), second, whole, decoded, loss, len(first) if drawn is None else drawn)


def _decode(text: TextFormat, tokenizer: Any, ids: Sequence[int]) -> str:
    return text.decode_response(tokenizer, list(ids), strip=False)


def _round_trip(text: TextFormat, tokenizer: Any, whole: str) -> str:
    return _decode(text, tokenizer, text.encode_response(tokenizer, whole))


def _canonical(text: TextFormat, tokenizer: Any, whole: str) -> str:
    """The text after encoding and decoding until it no longer changes: equal for texts that the tokenizer does not
    distinguish.

    One round is not enough: a space beside an unknown character is at the end of the text once that character is gone,
    and spaces at the ends are lost one by one.
    """
    for _ in range(len(whole) + 1):
        shown = _round_trip(text, tokenizer, whole)
        if shown == whole:
            break
        whole = shown
    return whole


def _parts(text: TextFormat, tokenizer: Any, before: str, continuation: str, first: Sequence[int]) -> list[str]:
    """Texts that differ from the whole only by the tokenizer's losses on the second part.

    Where a character beside the boundary is unknown, or the tokenizer has no token of the word around it, a space in
    its place is the tokenizer's loss too.
    """
    second = _round_trip_inside(text, tokenizer, continuation)
    at_boundary = [
        *first[-1:],
        *text.encode_response(tokenizer, continuation.strip())[:2],
    ]  # [:2]: a dummy space is first
    word = "".join([*before.split()[-1:], *continuation.split()[:1]])
    unknown = tokenizer.unk_token_id in at_boundary or not _round_trip(text, tokenizer, word).strip()
    return [before + second, *([f"{before} {second}"] if unknown else [])]


def _round_trip_inside(text: TextFormat, tokenizer: Any, part: str) -> str:
    """A part of a text after encoding and decoding, but with its original whitespace at the ends and no dummy space:
    words that are joined there count as a loss at the boundary."""
    core = part.strip()
    if not core:
        return part
    start = part.index(core)
    dummy = _round_trip(text, tokenizer, "a").partition("a")[0]
    return part[:start] + _round_trip(text, tokenizer, core).removeprefix(dummy) + part[start + len(core) :]


def _begins_a_character(tokenizer: Any, ids: Sequence[int]) -> bool:
    """Whether the last token is a byte of an incomplete character, for a decoder that drops such bytes.

    Slow tokenizers do (ByT5's); fast ones show a replacement character.
    """
    if not ids or getattr(tokenizer, "backend_tokenizer", None) is not None or ids[-1] in tokenizer.all_special_ids:
        return False
    return tokenizer.decode(list(ids)) == tokenizer.decode(list(ids[:-1]))
