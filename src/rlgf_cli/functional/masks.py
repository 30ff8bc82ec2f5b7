"""Masks of tokens, made from lengths and authors, never from ``token != pad``.

Shapes: B episodes, T response positions. ``authors`` [B, T] int64 holds POLICY or GUIDE on real tokens (what
it holds on padding does not matter). ``cuts`` [B] int64: the roll-in's length, 0 where there is none.
"""

from __future__ import annotations

import torch

POLICY, GUIDE = 0, 1


def response_mask(lengths: torch.Tensor, width: int) -> torch.Tensor:
    """True on real response tokens, EOS included. lengths [B] -> [B, width] bool."""
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(-1)


def author_mask(authors: torch.Tensor, real: torch.Tensor, author: int) -> torch.Tensor:
    """Real tokens that ``author`` wrote. authors [B, T], real [B, T] bool -> [B, T] bool."""
    return real & (authors == author)


def rollout_mask(cuts: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Real tokens from the cut on: the roll-out's. cuts [B], real [B, T] -> [B, T] bool."""
    return real & (torch.arange(real.shape[-1], device=real.device) >= cuts.unsqueeze(-1))


def action_mask(starts: torch.Tensor, cuts: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The action at the cut: tokens ``starts <= t < cuts`` (one token, or the whole word where the cut moved).

    starts [B], cuts [B], real [B, T] -> [B, T] bool. An empty range (start = cut) selects nothing.
    """
    at = torch.arange(real.shape[-1], device=real.device)
    return real & (at >= starts.unsqueeze(-1)) & (at < cuts.unsqueeze(-1))


def last_token(lengths: torch.Tensor, width: int) -> torch.Tensor:
    """True on each episode's last real token; nowhere in an episode without tokens. lengths [B] -> [B, width]."""
    return torch.arange(width, device=lengths.device) == (lengths - 1).unsqueeze(-1)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the mask, a scalar; zero (with a gradient of zero) where the mask is empty."""
    # where, not multiplication: an infinity or NaN outside the mask would survive a product with 0
    return torch.where(mask, values, values.new_zeros(())).sum() / mask.sum().clamp_min(1)
