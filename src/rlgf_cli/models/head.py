"""The LM head apart from the body of a model: its input, and its logits as the architecture finishes them.

The head is most of a small model's computation and its logits are the largest tensor of any model, so it is run on the
positions that are scored and on no other, some rows at a time (:mod:`rlgf_cli.functional.logprobs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from rlgf_cli.errors import UserError

Finish = Callable[[torch.Tensor], torch.Tensor]
"""From the head's output [..., V] to the model's logits."""


class HeadInput:
    """Within it, a forward pass stores the LM head's input (``hidden``) and computes the logits of one position only.

    That input is the last hidden state as every architecture finishes it (final norm, scaling).
    """

    def __init__(self, model: Any) -> None:
        self.hidden: torch.Tensor
        self._handle = model.get_output_embeddings().register_forward_pre_hook(self._before)

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.hidden = args[0]
        return (args[0][:1, :1], *args[1:])  # the head's shape checks need one position

    def __enter__(self) -> HeadInput:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


@torch.no_grad()
def find_finish(model: Any) -> Finish:
    """What the architecture does with its head's output, found by comparing with the logits of one token.

    Raises UserError where none of the known ways gives the model's own logits.
    """
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)  # its embedding is zero in many models
    ids = torch.full((1, 1), int(padding == 0), device=model.device)
    names = ["decoder_input_ids", "input_ids"] if model.config.is_encoder_decoder else ["input_ids"]
    with HeadInput(model) as head:
        logits = model(**dict.fromkeys(names, ids), use_cache=False).logits[0, 0]
    own = model.get_output_embeddings()(head.hidden[:1, :1])[0, 0]
    for finish in _known(model):
        if torch.allclose(finish(own).float(), logits.float(), rtol=1e-3, atol=1e-3, equal_nan=True):
            return finish
    raise UserError(
        f"a model of type {model.config.model_type!r} changes the output of its LM head, and rlgf does not know how",
        hint="use another architecture, such as GPT-2, Llama, Qwen 3, Gemma 3 or T5",
    )


def _known(model: Any) -> Iterator[Finish]:
    """The ways that this model's config or buffers allow, and last none at all."""
    config = model.config.get_text_config()
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2 and 3
        yield lambda logits: torch.tanh(logits / cap) * cap
    if scale := getattr(config, "logits_scaling", None):  # Granite divides
        yield lambda logits: logits / scale
        yield lambda logits: logits * scale
    if factor := getattr(config, "logit_scale", None):  # Cohere
        yield lambda logits: logits * factor
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    if (bias := getattr(base, "final_logits_bias", None)) is not None:  # BART
        yield lambda logits: logits + bias[0]
    yield lambda logits: logits
