"""Annotation (log-probabilities and values, no gradient) and credit: from scores to advantages.

Shapes: B episodes, T response positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from rlgf_cli.algorithms.spec import Estimator, Regime
from rlgf_cli.config.train import PPOConfig
from rlgf_cli.functional import advantages as adv
from rlgf_cli.functional.shaping import log_ratio, token_rewards
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.training.distributed import ALONE, Group
from rlgf_cli.training.episodes import Episode, EpisodeBatch
from rlgf_cli.training.rollout import Sampling


@dataclass(frozen=True)
class CreditSettings:
    """gamma; ``gae_lambda`` on the policy's tokens, ``guide_lambda`` on the guide's; whitening of GAE and
    guide_mc advantages."""

    gamma: float
    gae_lambda: float
    guide_lambda: float
    whiten: bool

    @classmethod
    def of(cls, ppo: PPOConfig) -> CreditSettings:
        return cls(ppo.gamma, ppo.gae_lambda, ppo.guide_lambda, ppo.whiten_advantages)


@dataclass(frozen=True)
class Notes:
    """What the models said of the episodes before the update, all [B, T]. ``values`` has one entry per critic."""

    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Credit:
    """``rewards`` (the tensor that the advantages were made of), ``advantages`` on learned tokens, ``returns`` per
    critic on the tokens that it is fitted on, ``log_ratio`` = log pi - log pi_ref on the policy's tokens. [B, T]"""

    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: dict[str, torch.Tensor]
    log_ratio: torch.Tensor


@torch.no_grad()
def annotate(
    model: ActorCritic,
    batch: EpisodeBatch,
    regime: Regime,
    sampling: Sampling,
    *,
    rows_at_once: int,
    group: Group = ALONE,
) -> Notes:
    """Score all episodes under the policy, the reference and the critics that this regime uses.

    Each process scores some of the rows; the notes that come back are whole, and the same for all.
    """
    shape, device = batch.real.shape, batch.real.device
    logprobs = torch.zeros(shape, device=device)
    ref_logprobs = torch.zeros(shape, device=device)
    critics = {name for name, mask in batch.fit.items() if bool(mask.any())} | ({regime.critic} - {None})
    values = {str(name): torch.zeros(shape, device=device) for name in sorted(str(c) for c in critics)}
    select = batch.policy
    order = batch.tokens.lengths.argsort()  # rows of like length together: less padding
    for rows in group.rows(order).split(rows_at_once):
        if not len(rows):  # fewer rows than processes
            continue
        tokens = batch.tokens.rows(rows)
        width = tokens.response_ids.shape[1]
        chosen = select[rows][:, :width]
        options: dict[str, Any] = {"temperature": sampling.temperature, "min_new_tokens": sampling.min_new_tokens}
        scored = model.score(tokens, chosen, values=values, **options)
        logprobs[rows, :width] = scored.logprobs.float()
        for name, value in scored.values.items():
            values[name][rows, :width] = value.float()
        ref_logprobs[rows, :width] = model.reference_logprobs(tokens, chosen, **options).float()
    group.add_up([logprobs, ref_logprobs, *values.values()])  # a row is 0 but for the process that scored it
    return Notes(logprobs, ref_logprobs, values)


def sampler_gap(episodes: Sequence[Episode], logprobs: torch.Tensor) -> torch.Tensor | None:
    """[N]: what a server said of the tokens that it drew for the policy, less their log-probability under the scorer
    [B, T]; nats. None where none was drawn there."""
    told = [(row, at, value) for row, e in enumerate(episodes) for at, value in e.said.items()]
    if not told:
        return None
    rows, places, values = zip(*told, strict=True)
    scored = logprobs[list(rows), list(places)]
    return torch.tensor(values, dtype=scored.dtype, device=scored.device) - scored


def assign(regime: Regime, batch: EpisodeBatch, notes: Notes, *, kl_coef: float, settings: CreditSettings) -> Credit:
    """Rewards, advantages and value targets of a step. ``kl_coef`` 0 charges nothing; the log-ratio is kept."""
    ratio = log_ratio(notes.logprobs, notes.ref_logprobs, batch.policy)
    rewards = token_rewards(batch.scores, ratio, batch.last, kl_coef)
    advantages = ESTIMATORS[regime.estimator](_Known(regime, batch, notes, rewards, ratio, kl_coef, settings))
    returns = {}
    for name, mask in batch.fit.items():
        if name in notes.values and bool(mask.any()):
            returns[name] = _gae(batch, notes.values[name], rewards, settings)[1]
    return Credit(rewards, torch.where(batch.learned, advantages, torch.zeros_like(advantages)), returns, ratio)


@dataclass(frozen=True)
class _Known:
    """What an estimator makes its advantages [B, T] of: it takes what it needs."""

    regime: Regime
    batch: EpisodeBatch
    notes: Notes
    rewards: torch.Tensor
    ratio: torch.Tensor
    kl_coef: float
    settings: CreditSettings

    def whitened(self, advantages: torch.Tensor) -> torch.Tensor:
        return adv.whiten(advantages, self.batch.learned) if self.settings.whiten else advantages


def _gae(
    batch: EpisodeBatch, values: torch.Tensor, rewards: torch.Tensor, settings: CreditSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    lambdas = torch.where(batch.policy, settings.gae_lambda, settings.guide_lambda)
    return adv.gae(rewards, values, batch.real, settings.gamma, lambdas.to(rewards.dtype))


def _estimate_gae(known: _Known) -> torch.Tensor:
    critic = known.regime.critic
    assert critic is not None
    return known.whitened(_gae(known.batch, known.notes.values[critic], known.rewards, known.settings)[0])


def _estimate_group(baseline: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], known: _Known) -> torch.Tensor:
    batch = known.batch
    returns = adv.episode_returns(batch.scores, known.ratio, batch.learned, known.kl_coef)
    return baseline(returns, batch.groups).unsqueeze(-1).expand_as(known.rewards)


def _estimate_guide_mc(known: _Known) -> torch.Tensor:
    """What the guide earned after the action less what it earned before it, less the action's KL."""
    batch = known.batch
    each = adv.episode_returns(batch.differences, known.ratio, batch.learned, known.kl_coef).unsqueeze(-1)
    return known.whitened(torch.where(batch.learned, each, torch.zeros_like(known.rewards)))


ESTIMATORS: dict[Estimator, Callable[[_Known], torch.Tensor]] = {
    "gae": _estimate_gae,
    "group_mean": partial(_estimate_group, adv.group_advantages),
    "leave_one_out": partial(_estimate_group, adv.leave_one_out_advantages),
    "guide_mc": _estimate_guide_mc,
}
"""How advantages are estimated, by the regime's estimator; ``likelihood`` needs none."""
