"""From logits to the distribution that samples and is scored: one definition for both.

Shapes: B rows, T response positions, V vocabulary.
"""

from __future__ import annotations

import torch


def process_logits(
    logits: torch.Tensor, temperature: float, eos_banned: torch.Tensor, eos_ids: torch.Tensor
) -> torch.Tensor:
    """The policy's distribution as logits: divided by ``temperature``, EOS forbidden where ``eos_banned``.

    logits [..., V], eos_banned [...] bool, eos_ids [n]. Sampler and scorer both call this, so the ratio of
    new to old probability is taken under the distribution that wrote the tokens.
    """
    scaled = logits / temperature if temperature != 1.0 else logits
    if bool(eos_banned.any()):
        scaled = scaled.clone() if scaled is logits else scaled
        banned = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        banned[eos_ids] = True
        scaled = scaled.masked_fill(eos_banned.unsqueeze(-1) & banned, float("-inf"))
    return scaled


def warp_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Top-k, then top-p (Holtzman et al. 2020): what is outside gets minus infinity. logits [B, V]."""
    if top_k > 0 and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= top_p  # the token that reaches top_p stays in
        logits = logits.masked_fill(outside.gather(-1, order.argsort(-1)), float("-inf"))
    return logits
