"""One example as a model reads it, token for token, for the user to look at before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlgf_cli.config.common import LengthConfig, ModelConfig, TextConfig
from rlgf_cli.models.formats import text_format
from rlgf_cli.models.gguf import plain_checkpoint
from rlgf_cli.models.load import check_checkpoint_name, load_tokenizer
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.prompts import Encoded, encode_target
from rlgf_cli.models.sizes import model_without_weights

_HEAD, _TAIL = 900, 500
"""Most characters that are shown of a text's beginning and end."""


def example_lines(loaded: Loaded, prompt: Sequence[int], response: Sequence[int] | None) -> list[str]:
    """Prompt and response as they stand in the model's tokens, special ones and ends visible. ``response`` None: the
    data has none, the policy writes it."""
    written = "written by the policy" if response is None else shown(loaded.tokenizer, response)
    return [
        "an example as the model reads it:",
        f"  prompt    {shown(loaded.tokenizer, prompt)}",
        f"  response  {written}",
    ]


def first_example(loaded: Loaded, encoded: Sequence[Encoded], lengths: LengthConfig) -> list[str]:
    """The first prompt with its first reference."""
    item = encoded[0]
    answers = [encode_target(loaded, text, lengths.max_new_tokens)[0] for text in item.example.references[:1]]
    return example_lines(loaded, item.ids, answers[0] if answers else None)


def shown(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids with special tokens, quoted as Python does, so that line breaks and spaces are seen."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if len(text) > _HEAD + _TAIL:
        left_out = len(text) - _HEAD - _TAIL
        return f"{text[:_HEAD]!r} ... {left_out} characters ... {text[-_TAIL:]!r}"
    return repr(text)


def without_weights(config: ModelConfig, text: TextConfig | None) -> Loaded:
    """A checkpoint's tokenizer and text format, with a model of its shape that has no weights.

    Raises UserError as :func:`rlgf_cli.models.load.load` does.
    """
    name, _ = plain_checkpoint(config.name)
    check_checkpoint_name(name)
    tokenizer = load_tokenizer(name, revision=config.revision, trust_remote_code=config.trust_remote_code)
    model, base = model_without_weights(config)
    format_, origin = text_format(text, tokenizer, name)
    return Loaded(model, tokenizer, format_, name, base=base, text_origin=origin)
