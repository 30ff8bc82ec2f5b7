"""The places where a prompt that is too long may be cut.

A conversation loses its oldest turns first, a question with its answers at a time, so that it begins with a message of
the user as templates want it. Its system message stays. Where the last message alone is too long, that is cut as a
plain prompt is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rlgf_cli.protocols.messages import Prompt


def without_oldest_turns(prompt: Prompt) -> Iterator[Prompt]:
    """The conversation with more and more of its oldest turns left out, down to system message and last message; at
    least one is yielded: a prompt that has no such turns is yielded as it is."""
    if isinstance(prompt, str):
        yield prompt
        return
    system = sum(message.role == "system" for message in prompt[:1])
    starts = [i for i in range(system + 1, len(prompt)) if prompt[i].role == "user"]
    if not starts:
        yield prompt
    for start in starts:
        yield (*prompt[:system], *prompt[start:])


def cut_places(tokenizer: Any, text: str, limit: int, *, from_start: bool) -> Sequence[int]:
    """Character positions at which a text may be cut, from the longest remainder to an empty one.

    They are between two of the tokenizer's tokens, with at most ``limit`` tokens left; between any two characters for a
    tokenizer without offsets.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return range(len(text), -1, -1) if from_start else range(len(text) + 1)
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if from_start:
        return [*reversed(sorted({end for _, end in spans})[:limit]), 0]
    return [*sorted({start for start, _ in spans})[-limit:], len(text)]


def never_cut(prompt: Prompt, template: str = "the template") -> str:
    """The part of a prompt's rendering that is never cut, in words for messages, with its verb."""
    system = not isinstance(prompt, str) and prompt[0].role == "system"
    return f"{template} and the system message alone have" if system else f"{template} alone has"
