"""Importance weights of tokens that another program than the training model sampled."""

from __future__ import annotations

import torch


def importance_ratios(logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """pi / mu of each token of the mask, 1 elsewhere: the training model's probability over the sampler's. [B, T]

    Both log-probabilities (nats) are of the tokens that were sampled, under the distributions that they were sampled
    from. What they hold outside of ``mask`` (bool) does not matter: it is replaced before exp.
    """
    return torch.where(mask, logprobs - sampler_logprobs, torch.zeros_like(logprobs)).exp()


def truncated_weights(ratios: torch.Tensor, cap: float) -> torch.Tensor:
    """min(pi / mu, cap), without a gradient: truncated importance sampling (Ionides 2008, Journal of Computational and
    Graphical Statistics 17(2)), per token as in Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training". Any shape.
    """
    return ratios.detach().clamp_max(cap)
