"""Teacher-forced forward passes over responses: the hidden states from which response tokens are predicted.

Shapes: B episodes, P prompt columns (left-padded for decoders), T response columns (right-padded), H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from rlgf_cli.models.generate import decoder_start_id, pad_rows, positions_of
from rlgf_cli.models.head import HeadInput
from rlgf_cli.models.packing import Packed, PromptGroup, attention_masks, groups_of, pack, saves


@dataclass(frozen=True)
class TokenBatch:
    """Prompts and responses as tensors. ``prompt_ids``, ``prompt_mask`` [B, P]; ``response_ids`` [B, T];
    ``lengths`` [B] real response tokens, EOS included."""

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    response_ids: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def build(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        pad_id: int,
        encoder_decoder: bool,
        device: torch.device,
    ) -> TokenBatch:
        prompt_ids, prompt_mask = pad_rows(prompts, pad_id, left=not encoder_decoder)
        response_ids, mask = pad_rows(responses, pad_id, left=False)
        return cls(prompt_ids.to(device), prompt_mask.to(device), response_ids.to(device), mask.sum(-1).to(device))

    @cached_property
    def groups(self) -> list[PromptGroup]:
        """The rows by their prompts."""
        return groups_of(self.prompt_ids, self.prompt_mask, self.response_ids, self.lengths)

    @cached_property
    def packed(self) -> Packed:
        """The packed rows of ``groups``, made once for all networks that the batch is given to."""
        return pack(self.groups, self.prompt_ids, self.prompt_mask, self.response_ids, self.lengths)

    def rows(self, index: torch.Tensor) -> TokenBatch:
        """The rows at ``index`` without the columns that are padding in all of them (so T may shrink)."""
        lengths = self.lengths[index]
        width = int(lengths.max()) if len(index) else 0
        mask = self.prompt_mask[index]
        used = mask.any(0).nonzero()[:, 0]
        columns = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)
        return TokenBatch(
            self.prompt_ids[index][:, columns], mask[:, columns], self.response_ids[index][:, :width], lengths
        )


@dataclass(frozen=True)
class States:
    """Hidden states before response tokens: [B, T, H] in ``rows``, or at ``index`` [B, T] of ``rows`` [M, H]."""

    rows: torch.Tensor
    index: torch.Tensor | None = None

    def every(self) -> torch.Tensor:
        """Those of all response positions. [B, T, H]"""
        return self.rows if self.index is None else self.rows[self.index]

    def at(self, select: torch.Tensor) -> torch.Tensor:
        """Those of the selected positions, in their order. select [B, T] bool -> [N, H]"""
        return self.rows[select if self.index is None else self.index[select]]


def response_states(model: Any, batch: TokenBatch, *, share_prompts: bool) -> States:
    """The LM head's inputs, from which the response tokens of a batch are predicted.

    ``share_prompts``: compute once what rows with the same prompt have in common, where that costs less. Position ids
    come from the attention mask, and an encoder is given its mask.
    """
    if model.config.is_encoder_decoder:
        inputs = _encoder_decoder_inputs(model, batch, share_prompts)
    elif share_prompts and (packed := _packed_states(model, batch)) is not None:
        return packed
    else:
        inputs = _decoder_inputs(batch)
    with HeadInput(model) as head:
        model(**inputs, use_cache=False)
    return States(head.hidden[:, -batch.response_ids.shape[1] :])


def _decoder_inputs(batch: TokenBatch) -> dict[str, torch.Tensor]:
    inputs = torch.cat([batch.prompt_ids, batch.response_ids[:, :-1]], dim=1)
    width = batch.response_ids.shape[1]
    real = torch.arange(width - 1, device=inputs.device) < (batch.lengths.unsqueeze(-1) - 1)
    mask = torch.cat([batch.prompt_mask, real.to(batch.prompt_mask.dtype)], dim=1)
    return {"input_ids": inputs, "attention_mask": mask, "position_ids": positions_of(mask)}


def _packed_states(model: Any, batch: TokenBatch) -> States | None:
    """States from packed rows; None where they would not cost less than separate ones."""
    config = model.config.get_text_config()
    if not saves(batch.groups, batch.lengths.tolist(), config.hidden_size):
        return None
    packed = batch.packed
    masks = attention_masks(config, packed)
    with HeadInput(model) as head:
        model(input_ids=packed.ids, position_ids=packed.positions, attention_mask=masks, use_cache=False)
    return States(head.hidden.flatten(0, 1), packed.index)


def _encoder_decoder_inputs(model: Any, batch: TokenBatch, share_prompts: bool) -> dict[str, Any]:
    start = batch.response_ids.new_full((len(batch.response_ids), 1), decoder_start_id(model))
    inputs: dict[str, Any] = {
        "attention_mask": batch.prompt_mask,
        "decoder_input_ids": torch.cat([start, batch.response_ids[:, :-1]], dim=1),
    }
    if share_prompts:
        groups = batch.groups
        if len(groups) < len(batch.lengths):
            owners = torch.empty_like(batch.lengths)
            for number, group in enumerate(groups):
                owners[group.rows] = number
            first = [group.rows[0] for group in groups]
            encoded = model.get_encoder()(input_ids=batch.prompt_ids[first], attention_mask=batch.prompt_mask[first])
            states = encoded.last_hidden_state[owners]
            return {**inputs, "encoder_outputs": BaseModelOutput(last_hidden_state=states)}
    return {**inputs, "input_ids": batch.prompt_ids}


@torch.no_grad()
def sharing_problem(model: Any) -> str:
    """Why rows of this model cannot share their prompts; empty where they can.

    Two responses to one prompt are run in both ways: an attention that takes no such mask gives an error, or other
    states.
    """
    if model.config.is_encoder_decoder:
        return ""
    config, device = model.config.get_text_config(), model.device
    ids = torch.arange(8, device=device).expand(2, -1) % config.vocab_size
    responses = (ids[:, :4] + torch.tensor([[5], [9]], device=device)) % config.vocab_size
    batch = TokenBatch(ids, torch.ones_like(ids), responses, torch.tensor([4, 4], device=device))
    packed = batch.packed
    masks = attention_masks(config, packed)
    if masks is None:
        return (
            f"the attention {config._attn_implementation!r} of a {config.model_type!r} takes no custom attention mask"
        )
    with HeadInput(model) as head:
        try:
            model(input_ids=packed.ids, position_ids=packed.positions, attention_mask=masks, use_cache=False)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            return f"a {config.model_type!r} takes no attention mask of four dimensions ({str(error).splitlines()[0]})"
        states = States(head.hidden.flatten(0, 1), packed.index).every().float()
        model(**_decoder_inputs(batch), use_cache=False)
        expected = head.hidden[:, -4:].float()
    rounded = torch.is_autocast_enabled(device.type) or model.dtype != torch.float32
    tolerance = 5e-2 if rounded else 1e-3
    if float((states - expected).abs().max()) > tolerance * float(expected.abs().max()):
        return f"a {config.model_type!r} gives other hidden states with an attention mask of four dimensions"
    return ""
