"""Teacher-forced forward passes over responses: logits and hidden states at response positions only.

Shapes: B episodes, P prompt columns (left-padded for decoders), T response columns (right-padded), H hidden size,
N selected positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlgf_cli.models.generate import decoder_start_id, pad_rows, positions_of


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


class _HeadInput:
    """A hook that stores the LM head's input and passes on the selected positions only.

    That input is the last hidden state as every architecture finishes it (final norm, scaling). The head is most of a
    small model's computation, so it is not run on positions whose logits are not needed.
    """

    def __init__(self, head: torch.nn.Module, width: int, select: torch.Tensor | None) -> None:
        self.width, self.select = width, select
        self.hidden: torch.Tensor | None = None
        self._handle = head.register_forward_pre_hook(self._before)

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0][:, -self.width :]
        self.hidden = hidden
        if self.select is None:
            return (hidden[:1, :1], *args[1:])  # no logits are needed; the head's shape checks need one position
        return (hidden[self.select].unsqueeze(0), *args[1:])

    def __enter__(self) -> _HeadInput:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def response_forward(
    model: Any, batch: TokenBatch, select: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Logits of the selected response tokens and the hidden states that they were predicted from.

    ``select`` [B, T] bool: positions whose logits are wanted, None for none. Returns ``(logits [N, V] or None,
    hidden [B, T, H])``; row n belongs to the n-th True of ``select``; ``hidden[:, t]`` is the state before token t.
    Position ids come from the attention mask, and an encoder is given its mask.
    """
    width = batch.response_ids.shape[1]
    kwargs: dict[str, torch.Tensor | bool]
    if model.config.is_encoder_decoder:
        start = batch.response_ids.new_full((len(batch.response_ids), 1), decoder_start_id(model))
        kwargs = {
            "input_ids": batch.prompt_ids,
            "attention_mask": batch.prompt_mask,
            "decoder_input_ids": torch.cat([start, batch.response_ids[:, :-1]], dim=1),
        }
    else:
        inputs = torch.cat([batch.prompt_ids, batch.response_ids[:, :-1]], dim=1)
        real = torch.arange(width - 1, device=inputs.device) < (batch.lengths.unsqueeze(-1) - 1)
        mask = torch.cat([batch.prompt_mask, real.to(batch.prompt_mask.dtype)], dim=1)
        kwargs = {"input_ids": inputs, "attention_mask": mask, "position_ids": positions_of(mask)}
    with _HeadInput(model.get_output_embeddings(), width, select) as head_input:
        logits = model(**kwargs, use_cache=False).logits
    assert head_input.hidden is not None
    # squeezed, not indexed: the gradient of an index first fills a tensor with zeros
    return (None if select is None else logits.squeeze(0)), head_input.hidden
