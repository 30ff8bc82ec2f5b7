"""The losses. Each is a sum over a mask divided by a count that the caller gives.

The count is that of the whole minibatch, so that accumulating over parts of it gives the same gradient; an empty
selection gives zero, never NaN. It is one number, or one per episode [B, 1] (:func:`loss_counts`). Shapes: B episodes,
T response positions.
"""

from __future__ import annotations

from typing import Literal

import torch

from rlgf_cli.functional import kl

LossAverage = Literal["tokens", "sequences", "constant"]
GuideWeight = Literal["one", "probability", "phi", "shaped"]


def _mean(values: torch.Tensor, mask: torch.Tensor, count: torch.Tensor | float) -> torch.Tensor:
    totals = torch.where(mask, values, values.new_zeros(())).sum(-1, keepdim=True)
    return (totals / torch.as_tensor(count, dtype=totals.dtype, device=totals.device).clamp_min(1)).sum()


def loss_counts(mask: torch.Tensor, average: LossAverage, constant: int) -> torch.Tensor:
    """Divisors of each episode's sum over ``mask`` [B, T], with which the sum over episodes is the average. [B, 1]

    ``tokens``: the mask's tokens (DAPO, arXiv 2503.14476, eq. 8). ``sequences``: an episode's own tokens, times the
    number of episodes with any (GRPO, Shao et al. 2024, eq. 3). ``constant``: ``constant`` tokens per episode, whatever
    its length (Dr. GRPO, arXiv 2503.20783).
    """
    lengths = mask.sum(-1, keepdim=True)
    episodes = (lengths > 0).sum()
    if average == "tokens":
        return lengths.sum().expand_as(lengths)
    return episodes * (lengths if average == "sequences" else torch.full_like(lengths, constant))


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
    count: torch.Tensor | float,
    *,
    clip_range_high: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated: -mean min(rho A, clip(rho, 1-c, 1+h) A).

    c is ``clip_range`` and h is ``clip_range_high`` (None: c), which DAPO sets higher (arXiv 2503.14476, section 3.1).
    rho = exp(log pi - log pi_old). The log-ratio is masked *before* exp: on the guide's tokens it may overflow, and
    infinity times 0 is NaN. All [B, T], mask bool. Returns the loss and sums over the mask: ``ratio``,
    ``clipped`` (tokens where the clip binds), ``approx_kl`` (k3 estimate of KL(pi_old || pi)).
    """
    difference = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = difference.exp()
    unclipped = ratio * advantages
    high = clip_range if clip_range_high is None else clip_range_high
    clipped = ratio.clamp(1 - clip_range, 1 + high) * advantages
    loss = _mean(-torch.minimum(unclipped, clipped), mask, count)
    with torch.no_grad():
        # both estimators of KL(pi_old || pi) sample from pi_old, where r = log pi_old - log pi = -difference
        stats = {
            "ratio": torch.where(mask, ratio, torch.zeros_like(ratio)).sum(),
            "clipped": (mask & (clipped < unclipped)).sum(),
            "approx_kl": torch.where(mask, kl.k3(-difference), torch.zeros_like(ratio)).sum(),
        }
    return loss, stats


def kl_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    estimator: kl.KLEstimator,
    count: torch.Tensor | float,
) -> torch.Tensor:
    """KL(pi || pi_ref) as a loss: the mean over the mask of :func:`kl.estimate`. All [B, T]."""
    return _mean(kl.estimate(logprobs, old_logprobs, ref_logprobs, mask, estimator), mask, count)


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


def guide_weights(logprobs: torch.Tensor, weight: GuideWeight, gamma: float) -> torch.Tensor:
    """w(p) of tokens with log-probabilities ``logprobs``, without a gradient. Any shape, the same shape.

    ``one``: 1, the likelihood. ``probability``: p, the importance ratio with the guide's probability taken as 1.
    ``phi``: p (1 - p) (CHORD, arXiv 2508.11408, section 3.3). ``shaped``: gamma p / (p + gamma)^2, with which the
    gradient is that of f(p) = p / (p + gamma) (LUFFY, arXiv 2504.14945, section 3.2).
    """
    p = logprobs.detach().exp()
    if weight == "probability":
        return p
    if weight == "phi":
        return p * (1 - p)
    if weight == "shaped":
        return gamma * p / (p + gamma).square()
    return torch.ones_like(p)


def guide_loss(
    logprobs: torch.Tensor,
    credit: torch.Tensor,
    mask: torch.Tensor,
    weight: GuideWeight,
    gamma: float,
    count: torch.Tensor | float,
) -> torch.Tensor:
    """The guide-token term: -mean c w(p) log pi, w without a gradient. logprobs, credit [B, T], mask [B, T] bool."""
    weights = guide_weights(logprobs, weight, gamma)
    return _mean(-credit * weights * logprobs, mask, count)


def most_uncertain(entropies: torch.Tensor, mask: torch.Tensor, share: float) -> torch.Tensor:
    """Of each row's tokens in ``mask``, the ceil(share x n) with the highest entropy; of equal ones the first.

    entropies [B, T], mask [B, T] bool -> [B, T] bool
    """
    wanted = uncertain_counts(mask, share)
    ranked = torch.where(mask, entropies.detach(), entropies.new_full((), -float("inf")))
    rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return mask & (rank < wanted.unsqueeze(-1))


def uncertain_counts(mask: torch.Tensor, share: float) -> torch.Tensor:
    """The number of tokens that :func:`most_uncertain` selects in each row. mask [B, T] bool -> [B] int64"""
    return (mask.sum(-1).double() * share).ceil().long()


def entropy_bonus(entropies: torch.Tensor, mask: torch.Tensor, count: torch.Tensor | float) -> torch.Tensor:
    """Mean entropy over the mask (nats per token), to be subtracted with a coefficient. [B, T]"""
    return _mean(entropies, mask, count)
