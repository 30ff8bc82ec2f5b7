"""Advantage estimators.

Shapes: B episodes, T response positions. ``values[:, t]`` is V(s_t), the state before token t; the state
after the last real token is terminal and worth 0.
"""

from __future__ import annotations

import torch

from rlgf_cli.functional.masks import masked_mean


def gae(
    rewards: torch.Tensor, values: torch.Tensor, real: torch.Tensor, gamma: float, lambdas: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation with a lambda per token (Schulman et al. 2015, eq. 16).

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t);  A_t = delta_t + gamma lambda_{t+1} A_{t+1}

    ``lambdas[:, t+1]`` belongs to token t+1, the one that the trace passes on its way back: with lambda 1 on the
    guide's tokens, the policy's token before the cut sees the guide's Monte-Carlo return.
    rewards, values, lambdas [B, T]; real [B, T] bool -> (advantages, returns = advantages + values), [B, T],
    both 0 on padding.
    """
    advantages = torch.zeros_like(rewards)
    following = rewards.new_zeros(rewards.shape[0])  # A_{t+1}
    next_value = rewards.new_zeros(rewards.shape[0])  # V(s_{t+1})
    next_lambda = rewards.new_zeros(rewards.shape[0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = real[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(here, delta + gamma * next_lambda * following, torch.zeros_like(delta))
        advantages[:, t] = advantage
        following = advantage
        next_value = torch.where(here, values[:, t], torch.zeros_like(delta))
        next_lambda = lambdas[:, t]
    return advantages, torch.where(real, advantages + values, torch.zeros_like(values))


def whiten(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean zero and variance one over the mask, 0 elsewhere. Fewer than two tokens are left as they are. [B, T]"""
    count = mask.sum()
    if count < 2:
        return torch.where(mask, advantages, torch.zeros_like(advantages))
    mean = masked_mean(advantages, mask)
    variance = masked_mean((advantages - mean).square(), mask)
    return torch.where(mask, (advantages - mean) * torch.rsqrt(variance + 1e-8), torch.zeros_like(advantages))


def divide(advantages: torch.Tensor, mask: torch.Tensor, spread: float) -> torch.Tensor:
    """Mean zero over the mask, divided by ``spread`` (that of the scores; 1 where it is 0); 0 elsewhere. [B, T]

    ``spread`` comes from more than this batch: dividing a batch without signal by its own standard deviation gives
    noise of full size.
    """
    centred = torch.where(mask, advantages - masked_mean(advantages, mask), torch.zeros_like(advantages))
    return centred / (spread if spread > 0 else 1.0)


def length_adaptive_lambdas(lengths: torch.Tensor, alpha: float) -> torch.Tensor:
    """lambda = 1 - 1 / (alpha * length), at least 0 (VAPO, arXiv 2504.05118, length-adaptive GAE).

    lengths, of any shape -> the same shape, float32
    """
    return (1 - 1 / (alpha * lengths.clamp_min(1).float())).clamp_min(0)


def group_advantages(
    scores: torch.Tensor, groups: torch.Tensor, *, scaled: bool = True, counted: torch.Tensor | None = None
) -> torch.Tensor:
    """GRPO: (score - group mean) / (group standard deviation + 1e-4) (Shao et al. 2024, section 4.1.2).

    scores [B], groups [B] int64 (equal number: same prompt and prefix) -> [B]. A group whose scores are all equal gets
    exactly 0. Scores alone go in: a KL charge that differs between equal scores would be divided up to size 1.
    ``scaled`` false: not divided (Dr. GRPO, arXiv 2503.20783). ``counted`` [B] bool: the episodes that the mean and the
    deviation are of (None: all); where their scores are all equal, the others' are not divided, by almost 0.
    """
    if counted is None:
        counted = torch.ones_like(scores, dtype=torch.bool)
    _, index = groups.unique(return_inverse=True)
    mean, size = _group_means(scores, index, counted)
    varies = _varies(scores, index, counted, len(mean))[index]
    centred = torch.where(varies | ~counted, scores - mean[index], torch.zeros_like(scores))
    if not scaled:
        return centred
    squares = torch.where(counted, centred, torch.zeros_like(centred)).square()
    variance = torch.zeros_like(mean).index_add(0, index, squares) / (size - 1).clamp_min(1)
    return torch.where(varies, centred / (variance[index].sqrt() + 1e-4), centred)


def _varies(scores: torch.Tensor, index: torch.Tensor, counted: torch.Tensor, count: int) -> torch.Tensor:
    """Per group, whether the scores of its counted episodes differ. scores, index, counted [B] -> [count] bool"""
    scores, index = scores[counted], index[counted]
    low = scores.new_full((count,), float("inf")).scatter_reduce(0, index, scores, "amin")
    high = scores.new_full((count,), float("-inf")).scatter_reduce(0, index, scores, "amax")
    return high > low


def leave_one_out_advantages(returns: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """RLOO: R_i minus the mean R of the group's other episodes (Ahmadian et al. 2024, section 3.2). [B] -> [B]"""
    _, index = groups.unique(return_inverse=True)
    mean, size = _group_means(returns, index, torch.ones_like(returns, dtype=torch.bool))
    n = size[index]
    return (returns - mean[index]) * n / (n - 1).clamp_min(1)


def _group_means(
    returns: torch.Tensor, index: torch.Tensor, counted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each group's mean over its counted episodes, and their number. returns, index, counted [B] -> [groups] twice"""
    count = int(index.max()) + 1 if len(index) else 0
    size = torch.bincount(index[counted], minlength=count).to(returns.dtype)
    if bool((size < 2).any()):
        raise ValueError("a group of one has no baseline: every group needs at least two episodes")
    zeros = torch.zeros(count, dtype=returns.dtype, device=returns.device)
    return zeros.index_add(0, index[counted], returns[counted]) / size, size
