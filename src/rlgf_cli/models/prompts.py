"""Tokens of prompts and of responses in training data, within the model's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rlgf_cli.config.common import LengthConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.protocols import Example, FinishReason


@dataclass(frozen=True)
class Encoded:
    """An example and the ids of its rendered prompt."""

    example: Example
    ids: list[int]


def prompt_limit(loaded: Loaded, lengths: LengthConfig) -> int | None:
    """The most tokens of a prompt; None: any number.

    Raises UserError where even the response alone does not fit the model's positions.
    """
    positions = loaded.max_positions
    room = None
    if positions is not None:
        room = positions if loaded.encoder_decoder else positions - lengths.max_new_tokens
        if room < 1 or (loaded.encoder_decoder and lengths.max_new_tokens > positions):
            raise UserError(
                f"lengths.max_new_tokens is {lengths.max_new_tokens}, the model has {positions} positions in all",
                hint="set lengths.max_new_tokens lower",
            )
    limits = [n for n in (room, lengths.max_prompt_tokens) if n is not None]
    return min(limits) if limits else None


def encode_prompts(
    loaded: Loaded, examples: Sequence[Example], lengths: LengthConfig
) -> tuple[list[Encoded], dict[str, int]]:
    """Tokenise all prompts; overlong ones follow ``lengths.on_overlong``. Also returns how many were truncated and
    skipped.

    ``truncate`` cuts the example's prompt, never the template around it, see :meth:`TextFormat.cut_prompt`.
    """
    limit = prompt_limit(loaded, lengths)
    encoded: list[Encoded] = []
    counts = {"truncated": 0, "skipped": 0}
    for example in examples:
        ids = _rendered(loaded, example)
        if limit is not None and len(ids) > limit:
            if lengths.on_overlong == "error":
                raise UserError(
                    f"the prompt of example {example.id!r} has {len(ids)} tokens; there is room for {limit}",
                    hint="--on-overlong truncate or skip, or a smaller max_new_tokens",
                )
            if lengths.on_overlong == "skip":
                counts["skipped"] += 1
                continue
            counts["truncated"] += 1
            ids = loaded.text.cut_prompt(loaded.tokenizer, example.given, loaded.encoder_decoder, limit)
        encoded.append(Encoded(example, ids))
    if not encoded:
        raise UserError("no prompt is short enough", hint="raise max_prompt_tokens or truncate")
    return encoded, counts


def _rendered(loaded: Loaded, example: Example) -> list[int]:
    try:
        return loaded.text.encode_prompt(loaded.tokenizer, example.given, loaded.encoder_decoder)
    except UserError as error:
        if not example.messages:
            raise
        raise UserError(error.message, where=f"example {example.id!r}", hint=error.hint) from None


def encode_target(
    loaded: Loaded, text: str, limit: int, finish_reason: FinishReason = "stop"
) -> tuple[list[int], bool]:
    """The ids of a response in supervised training: with EOS where its author ended it, at most ``limit``.

    A longer response is cut and has no EOS; the second value says whether it was cut. An ending that the text spells
    out counts as EOS.
    """
    bare = loaded.text.without_ending(loaded.tokenizer, text)
    ids = loaded.text.encode_response(loaded.tokenizer, bare)
    if finish_reason == "stop" or bare != text:
        ids = [*ids, loaded.eos_id]
    return ids[:limit], len(ids) > limit


def reference_length(loaded: Loaded, prompts: Sequence[Encoded], limit: int) -> float:
    """Mean length in tokens of the prompts' first references, EOS included; ``limit`` where there are none."""
    references = [text for p in prompts[:500] for text in p.example.references[:1]]
    if not references:
        return float(limit)
    return fmean(len(encode_target(loaded, text, limit)[0]) for text in references)
