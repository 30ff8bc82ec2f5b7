"""From one score per episode to one reward per token, with the KL charge.

Shapes: B episodes, T response positions. The sign of every KL: log-ratio = log pi - log pi_ref, taken on
tokens that the policy wrote; its mean over samples of pi estimates KL(pi || pi_ref), which is charged.
"""

from __future__ import annotations

import torch


def log_ratio(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, policy_tokens: torch.Tensor) -> torch.Tensor:
    """log pi - log pi_ref on the policy's tokens, 0 elsewhere. All [B, T]; policy_tokens bool."""
    return torch.where(policy_tokens, logprobs - ref_logprobs, torch.zeros_like(logprobs))


def token_rewards(scores: torch.Tensor, ratio: torch.Tensor, last: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """r_t = -kl_coef * log-ratio_t, plus the score on the last real token (Ziegler et al. 2019, eq. 2).

    scores [B]; ratio [B, T] from :func:`log_ratio`; last [B, T] bool -> [B, T].
    """
    return torch.where(last, scores.unsqueeze(-1), torch.zeros_like(ratio)) - kl_coef * ratio


def k3(ratio: torch.Tensor) -> torch.Tensor:
    """The non-negative estimate of KL(pi || pi_ref) per token: exp(-r) - 1 + r with r = log pi - log pi_ref.

    Its mean over samples of pi is the KL (Schulman, "Approximating KL divergence", estimator k3).
    """
    return torch.expm1(-ratio) + ratio


def adapt_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The adaptive coefficient of Ziegler et al. 2019, section 2.2: grows while ``kl`` is above ``target``.

    ``kl`` is the mean per-episode sum of the log-ratio (nats); the relative error is clipped to +-0.2.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * episodes / horizon)
