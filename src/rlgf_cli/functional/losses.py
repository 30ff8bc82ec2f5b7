"""The losses. Each is a sum over a mask divided by a count that the caller gives.

The count is that of the whole minibatch, so that accumulating over parts of it gives the same gradient; an empty
selection gives zero, never NaN. Shapes: B episodes, T response positions.
"""

from __future__ import annotations

import torch


def _mean(values: torch.Tensor, mask: torch.Tensor, count: torch.Tensor | float) -> torch.Tensor:
    total = torch.where(mask, values, values.new_zeros(())).sum()
    return total / torch.as_tensor(count, dtype=total.dtype, device=total.device).clamp_min(1)


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
    count: torch.Tensor | float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated: -mean min(rho A, clip(rho, 1-c, 1+c) A).

    rho = exp(log pi - log pi_old). The log-ratio is masked *before* exp: on the guide's tokens it may overflow, and
    infinity times 0 is NaN. All [B, T], mask bool. Returns the loss and sums over the mask: ``ratio``,
    ``clipped`` (tokens where the clip binds), ``approx_kl`` (k3 estimate of KL(pi_old || pi)).
    """
    difference = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = difference.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    loss = _mean(-torch.minimum(unclipped, clipped), mask, count)
    with torch.no_grad():
        # both estimators of KL(pi_old || pi) sample from pi_old, where r = log pi_old - log pi = -difference
        stats = {
            "ratio": torch.where(mask, ratio, torch.zeros_like(ratio)).sum(),
            "clipped": (mask & (clipped < unclipped)).sum(),
            "approx_kl": torch.where(mask, torch.expm1(difference) - difference, torch.zeros_like(ratio)).sum(),
        }
    return loss, stats


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
    count: torch.Tensor | float,
) -> torch.Tensor:
    """0.5 * mean max((V - R)^2, (clip(V, V_old +- c) - R)^2). All [B, T]; ``clip_range`` infinite: no clipping."""
    # masked first: behind a square, the gradient of a NaN outside the mask would be 0 x NaN
    values, old_values, returns = (torch.where(mask, x, x.new_zeros(())) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * _mean(torch.maximum((values - returns).square(), (clipped - returns).square()), mask, count)


def likelihood_loss(logprobs: torch.Tensor, mask: torch.Tensor, count: torch.Tensor | float) -> torch.Tensor:
    """Negative log-likelihood, mean over the mask (nats per token). logprobs [B, T], mask [B, T] bool."""
    return _mean(-logprobs, mask, count)


def entropy_bonus(entropies: torch.Tensor, mask: torch.Tensor, count: torch.Tensor | float) -> torch.Tensor:
    """Mean entropy over the mask (nats per token), to be subtracted with a coefficient. [B, T]"""
    return _mean(entropies, mask, count)
