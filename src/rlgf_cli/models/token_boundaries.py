"""Where two authors' tokens meet: which cuts leave the text as it is, and an audit of what a boundary loses.

Training never tokenises joined text again: the second author's text is tokenised on its own, behind the first
author's tokens. The audit does the same, reads the tokens back, and says of every difference whose it is. What the
tokenizer loses on a text that it is given whole (unknown characters, whitespace, case) is the tokenizer's; all else
would be a defect of the boundary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlgf_cli.models.text import TextFormat

Loss = Literal["none", "tokenizer", "boundary"]
"""``none``: the text is what it was; ``tokenizer``: the tokenizer cannot tell the two apart; ``boundary``: it can."""

_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class TokenBoundary:
    """A text by two authors as tokens, read back.

    ``first`` and ``second`` are the authors' ids; ``text`` is what was to be written and ``decoded`` what the tokens
    say. The cut was drawn at ``drawn`` tokens and is at ``len(first)``: later where the text was not stable.
    """

    first: list[int]
    second: list[int]
    text: str
    decoded: str
    loss: Loss
    drawn: int

    @property
    def moved(self) -> int:
        """By how many tokens the cut went on."""
        return len(self.first) - self.drawn


@dataclass
class BoundaryAudit:
    """What happened at many seams. ``examples`` keeps the first of each kind of loss."""

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
        """The share of cuts that stayed where they were drawn; None where there was none."""
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
    """Whether the text of ``ids[:n]`` stays as it is whatever follows, as far as ``ids`` shows what follows.

    Never inside a character (the decoder shows a replacement character, or nothing yet). With ``whole_words`` not
    inside a word either: its end shows in a following token that goes on with something else, EOS included.
    """
    before = _read(text, tokenizer, ids[:n])
    if before.endswith(_REPLACEMENT) or _begins_a_character(tokenizer, ids[:n]):
        return False
    if not whole_words or not before or not before[-1].isalnum():
        return True
    if n == len(ids):
        return False
    behind = _read(text, tokenizer, ids[: n + 1])[len(before) :]
    if not behind:
        return not _begins_a_character(tokenizer, ids[: n + 1])
    return not (behind[0].isalnum() or behind[0] == _REPLACEMENT)


def cut_in_tokens(text: TextFormat, tokenizer: Any, whole: str, n: int, *, whole_words: bool) -> TokenBoundary:
    """``whole`` cut after ``n`` of its tokens, or at the next boundary behind them, and finished by another author.

    The second author is given the text of the first tokens, and writes what the whole says behind it.
    """
    ids = text.encode_response(tokenizer, whole)
    n = min(n, len(ids))
    at = next(
        (k for k in range(n, len(ids)) if is_boundary(text, tokenizer, ids, k, whole_words=whole_words)), len(ids)
    )
    behind = _read(text, tokenizer, ids)[len(_read(text, tokenizer, ids[:at])) :]
    return _boundary(text, tokenizer, ids[:at], behind, whole, [], drawn=n)


def cut_in_text(text: TextFormat, tokenizer: Any, prefix: str, continuation: str) -> TokenBoundary:
    """Two texts by two authors: the first tokenised as a response, the second as what follows."""
    first = text.encode_response(tokenizer, prefix)
    parts = _parts(text, tokenizer, _lossy(text, tokenizer, prefix), continuation, first)
    return _boundary(text, tokenizer, first, continuation, prefix + continuation, parts)


def append_text(text: TextFormat, tokenizer: Any, first: Sequence[int], continuation: str) -> TokenBoundary:
    """A text behind tokens that are there already, as in a roll-out."""
    before = _read(text, tokenizer, first)
    parts = _parts(text, tokenizer, before, continuation, first)
    return _boundary(text, tokenizer, first, continuation, before + continuation, parts)


def tokenizer_loss(text: TextFormat, tokenizer: Any, whole: str) -> str:
    """What the tokenizer loses on a text: ``nothing``, ``whitespace``, ``unknown characters`` or ``normalisation``."""
    ids = text.encode_response(tokenizer, whole)
    shown = _read(text, tokenizer, ids)
    if shown == whole:
        return "nothing"
    if shown.split() == whole.split() or "".join(shown.split()) == "".join(whole.split()):
        return "whitespace"
    return "unknown characters" if tokenizer.unk_token_id in ids else "normalisation"


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers have the same tokens: a text of one may then be cut inside a word for the other."""
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
    """The boundary with its loss. ``parts``: readings besides ``whole`` whose loss is the tokenizer's."""
    encode = text.encode_continuation if first else text.encode_response
    second = encode(tokenizer, continuation) if continuation else []
    decoded = _read(text, tokenizer, [*first, *second])
    loss: Loss = "none"
    if decoded != whole:
        shown = _round_trip(text, tokenizer, whole)
        seen = _canonical(text, tokenizer, decoded)
        known = (_canonical(text, tokenizer, other) for other in (whole, *parts))
        # a text on which the tokenizer loses nothing can only have lost something at the boundary
        loss = "tokenizer" if shown != whole and (decoded == shown or seen in known) else "boundary"
    return TokenBoundary(list(first), second, whole, decoded, loss, len(first) if drawn is None else drawn)


def _read(text: TextFormat, tokenizer: Any, ids: Sequence[int]) -> str:
    return text.decode_response(tokenizer, list(ids), strip=False)


def _round_trip(text: TextFormat, tokenizer: Any, whole: str) -> str:
    return _read(text, tokenizer, text.encode_response(tokenizer, whole))


def _canonical(text: TextFormat, tokenizer: Any, whole: str) -> str:
    """The text as the tokenizer has it: equal for texts that it cannot tell apart.

    Until nothing changes, because a space beside an unknown character is at the end of the text once that is gone,
    and spaces at the ends are lost one by one.
    """
    for _ in range(len(whole) + 1):
        shown = _round_trip(text, tokenizer, whole)
        if shown == whole:
            break
        whole = shown
    return whole


def _parts(text: TextFormat, tokenizer: Any, before: str, continuation: str, first: Sequence[int]) -> list[str]:
    """What a text reads like that lost in its second part what the tokenizer loses there.

    Where a character beside the boundary is unknown, or the tokenizer has nothing of the word around it, whether a
    space stands in its place is the tokenizer's too.
    """
    behind = _lossy(text, tokenizer, continuation)
    at_boundary = [
        *first[-1:],
        *text.encode_response(tokenizer, continuation.strip())[:2],
    ]  # [:2]: a dummy space is first
    word = "".join([*before.split()[-1:], *continuation.split()[:1]])
    unknown = tokenizer.unk_token_id in at_boundary or not _round_trip(text, tokenizer, word).strip()
    return [before + behind, *([f"{before} {behind}"] if unknown else [])]


def _lossy(text: TextFormat, tokenizer: Any, part: str) -> str:
    """A part of a text with what the tokenizer loses on it, but with the whitespace at its ends and no dummy space:
    whether words are joined there is the boundary's to keep."""
    core = part.strip()
    if not core:
        return part
    start = part.index(core)
    dummy = _round_trip(text, tokenizer, "a").partition("a")[0]
    return part[:start] + _round_trip(text, tokenizer, core).removeprefix(dummy) + part[start + len(core) :]


def _begins_a_character(tokenizer: Any, ids: Sequence[int]) -> bool:
    """Whether the last token is a byte of a character that is not whole yet, for a decoder that leaves such bytes out.

    Those that are no fast tokenizers do (ByT5's); the others show a replacement character.
    """
    if not ids or getattr(tokenizer, "backend_tokenizer", None) is not None or ids[-1] in tokenizer.all_special_ids:
        return False
    return tokenizer.decode(list(ids)) == tokenizer.decode(list(ids[:-1]))
