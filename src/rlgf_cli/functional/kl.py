"""KL(pi || pi_ref): estimators, the charge in the reward, and the adaptive coefficient.

Shapes: B episodes, T response positions. The sign of every KL here: log_ratio = log pi - log pi_ref, taken on tokens
that the policy wrote; its mean over samples of pi estimates KL(pi || pi_ref). ``losses.kl_loss`` is the KL as a loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

KLEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class KLCoefficients:
    """The coefficient of the KL in the reward and in the loss; one of them at least is 0."""

    reward: float
    loss: float

    @classmethod
    def of(cls, where: Literal["reward", "loss", "log"], coef: float) -> KLCoefficients:
        """``log``: the KL is computed and charged nowhere."""
        return cls(coef if where == "reward" else 0.0, coef if where == "loss" else 0.0)


def log_ratio(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, policy_tokens: torch.Tensor) -> torch.Tensor:
    """log pi - log pi_ref on the policy's tokens, 0 elsewhere. All [B, T]; policy_tokens bool."""
    return torch.where(policy_tokens, logprobs - ref_logprobs, torch.zeros_like(logprobs))


# estimators per token


def k3(ratio: torch.Tensor) -> torch.Tensor:
    """The non-negative estimate of KL(pi || pi_ref) per token: exp(-r) - 1 + r with r = log pi - log pi_ref.

    Its mean over samples of pi is the KL (Schulman, "Approximating KL divergence", estimator k3).
    """
    return torch.expm1(-ratio) + ratio


def estimate(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    estimator: KLEstimator,
) -> torch.Tensor:
    """An estimate of KL(pi || pi_ref) per token that can be differentiated, with r = log pi - log pi_ref. All [B, T].

    ``k3``: exp(-r) - 1 + r (Shao et al. 2024, eq. 4); its gradient is that of KL(pi_ref || pi). ``k2``: r^2 / 2, whose
    gradient is that of KL(pi || pi_ref) where pi wrote the tokens. ``k1``: rho r with rho = pi / pi_old: r alone has a
    gradient of mean zero and would hold nothing back (arXiv 2506.09477). The names are those of Schulman,
    "Approximating KL divergence".
    """
    zero = torch.zeros_like(logprobs)
    ratio = torch.where(mask, logprobs - ref_logprobs, zero)
    if estimator == "k3":
        return k3(ratio)
    if estimator == "k2":
        return 0.5 * ratio.square()
    return torch.where(mask, logprobs - old_logprobs, zero).exp() * ratio


# the charge in the reward


def token_rewards(scores: torch.Tensor, ratio: torch.Tensor, last: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """r_t = -kl_coef * log-ratio_t, plus the score on the last real token (Ziegler et al. 2019, eq. 2).

    scores [B]; ratio [B, T] from :func:`log_ratio`; last [B, T] bool -> [B, T].
    """
    return torch.where(last, scores.unsqueeze(-1), torch.zeros_like(ratio)) - kl_coef * ratio


def episode_returns(scores: torch.Tensor, ratio: torch.Tensor, learned: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """R = score - kl_coef * sum of the log-ratio over learned tokens. scores [B], ratio and learned [B, T] -> [B]"""
    return scores - kl_coef * torch.where(learned, ratio, torch.zeros_like(ratio)).sum(-1)


# the coefficient


def adapt_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The adaptive coefficient of Ziegler et al. 2019, section 2.2: grows while ``kl`` is above ``target``.

    ``kl`` is the mean per-episode sum of the log-ratio (nats); the relative error is clipped to +-0.2.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * episodes / horizon)
