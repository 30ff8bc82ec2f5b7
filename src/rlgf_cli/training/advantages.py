"""Log-probabilities and values before the update, and advantages from scores.

Shapes: B episodes, T response positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from rlgf_cli.algorithms.spec import Estimator, Regime
from rlgf_cli.config.train import AdvantageScale, PPOConfig
from rlgf_cli.functional import advantages as adv
from rlgf_cli.functional.kl import episode_returns, log_ratio, token_rewards
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.training.episodes import EpisodeBatch
from rlgf_cli.training.microbatches import split_by_tokens
from rlgf_cli.training.parallel.processes import SINGLE, Processes
from rlgf_cli.training.rollout import Sampling


@dataclass(frozen=True)
class AdvantageSettings:
    """gamma; ``gae_lambda`` on the policy's tokens (or by length, with ``adaptive_lambda``), ``guide_lambda`` on the
    guide's, ``critic_lambda`` in the critics' targets; ``scale``: what advantages are divided by."""

    gamma: float = 1.0
    gae_lambda: float = 0.95
    guide_lambda: float = 1.0
    critic_lambda: float = 1.0
    adaptive_lambda: float | None = None
    scale: AdvantageScale = "auto"

    @classmethod
    def of(cls, ppo: PPOConfig) -> AdvantageSettings:
        return cls(
            ppo.gamma, ppo.gae_lambda, ppo.guide_lambda, ppo.critic_lambda, ppo.adaptive_lambda, ppo.advantage_scale
        )


@dataclass(frozen=True)
class AdvantageInputs:
    """Inputs of a step's advantages besides its episodes.

    ``kl_coef``: coefficient of the KL in the reward. ``spread``: standard deviation of the scores so far. ``trusted``:
    the critics whose values are the baseline; the values of any other critic are replaced by the mean score of the
    step's episodes that it is fitted on.
    """

    kl_coef: float = 0.0
    spread: float = 1.0
    trusted: frozenset[str] = frozenset({"policy", "guide"})


@dataclass(frozen=True)
class RolloutStats:
    """Log-probabilities under the policy (None: the passes of the update's one minibatch give them) and the reference
    model (None: the run has none) and each critic's values, before the update. All [B, T]."""

    old_logprobs: torch.Tensor | None
    ref_logprobs: torch.Tensor | None
    values: dict[str, torch.Tensor]

    @property
    def old(self) -> torch.Tensor:
        """``old_logprobs`` where they are known."""
        assert self.old_logprobs is not None
        return self.old_logprobs

    def log_ratio(self, batch: EpisodeBatch) -> torch.Tensor | None:
        """log pi - log pi_ref on the policy's tokens; None where one of them is not known. [B, T]"""
        if self.old_logprobs is None or self.ref_logprobs is None:
            return None
        return log_ratio(self.old_logprobs, self.ref_logprobs, batch.policy)


@dataclass(frozen=True)
class Advantages:
    """Rewards, advantages and value targets of a step. All [B, T].

    ``rewards``: what the advantages were made of; ``per_token``: the advantages, 0 on tokens that carry no loss;
    ``returns``: each critic's value targets, on the tokens that it is fitted on.
    """

    rewards: torch.Tensor
    per_token: torch.Tensor
    returns: dict[str, torch.Tensor]


@torch.no_grad()
def compute_stats(
    model: ActorCritic,
    batch: EpisodeBatch,
    regime: Regime,
    sampling: Sampling,
    *,
    max_tokens: int | None = None,
    with_policy: bool = True,
    processes: Processes = SINGLE,
) -> RolloutStats:
    """Log-probabilities and values of all episodes under the policy, the reference model and the regime's critics.

    ``max_tokens``: of one forward pass. ``with_policy`` false: without the policy's log-probabilities. Each process
    computes some of the rows; the result has all rows, and is the same for all processes.
    """
    shape, device = batch.real.shape, batch.real.device
    logprobs = torch.zeros(shape, device=device) if with_policy else None
    ref_logprobs = torch.zeros(shape, device=device) if model.has_ref_model else None
    critics = {name for name, mask in batch.fit.items() if bool(mask.any())} | ({regime.critic} - {None})
    values = {str(name): torch.zeros(shape, device=device) for name in sorted(str(c) for c in critics)}
    select = batch.policy
    needed = torch.arange(len(select), device=device) if values else select.any(-1).nonzero()[:, 0]
    mine = processes.rows(needed[batch.tokens.lengths[needed].argsort()])
    for part in split_by_tokens(batch.tokens, mine, max_tokens, packing_hidden=model.packing_hidden):
        if not len(part):  # fewer rows than processes
            continue
        rows = mine[part]
        tokens = batch.tokens.rows(rows)
        width = tokens.response_ids.shape[1]
        chosen = select[rows][:, :width]
        if logprobs is not None or values:
            wanted = chosen if logprobs is not None else torch.zeros_like(chosen)
            scored = model.forward_logprobs(tokens, wanted, values=values, **sampling.scored)
            if logprobs is not None:
                logprobs[rows, :width] = scored.logprobs.float()
            for name, value in scored.values.items():
                values[name][rows, :width] = value.float()
        if ref_logprobs is not None:
            ref_logprobs[rows, :width] = model.ref_logprobs(tokens, chosen, **sampling.scored).float()
    tensors = [tensor for tensor in (logprobs, ref_logprobs, *values.values()) if tensor is not None]
    processes.add_up(tensors)  # a row is 0 in all processes but the one that computed it
    return RolloutStats(logprobs, ref_logprobs, values)


def compute_advantages(
    regime: Regime,
    batch: EpisodeBatch,
    stats: RolloutStats,
    settings: AdvantageSettings,
    inputs: AdvantageInputs = AdvantageInputs(),
) -> Advantages:
    """Rewards, advantages and value targets of a step."""
    ratio = stats.log_ratio(batch)
    charged = torch.zeros(batch.real.shape, device=batch.real.device) if ratio is None else ratio
    rewards = token_rewards(batch.scores, charged, batch.last, inputs.kl_coef)
    given = _EstimatorInputs(regime, batch, stats, rewards, charged, settings, inputs)
    advantages = ESTIMATORS[regime.estimator](given)
    returns = {}
    for name, mask in batch.fit.items():
        if name in stats.values and bool(mask.any()):
            targets = torch.full_like(rewards, settings.critic_lambda)
            returns[name] = adv.gae(rewards, stats.values[name], batch.real, settings.gamma, targets)[1]
    carried = batch.learned | batch.guide
    return Advantages(rewards, torch.where(carried, advantages, torch.zeros_like(advantages)), returns)


def scale_of(scale: AdvantageScale, estimator: Estimator) -> AdvantageScale:
    """The scale of an estimator, with ``auto`` resolved."""
    if scale != "auto":
        return scale
    return {"group_mean": "group", "leave_one_out": "none"}.get(estimator, "running")  # type: ignore[return-value]


@dataclass(frozen=True)
class _EstimatorInputs:
    """The inputs of an estimator of advantages [B, T]."""

    regime: Regime
    batch: EpisodeBatch
    stats: RolloutStats
    rewards: torch.Tensor
    ratio: torch.Tensor
    settings: AdvantageSettings
    inputs: AdvantageInputs

    @property
    def scale(self) -> AdvantageScale:
        return scale_of(self.settings.scale, self.regime.estimator)

    def scaled(self, advantages: torch.Tensor) -> torch.Tensor:
        """Advantages [B, T] of any estimator without groups, divided as the settings say."""
        if self.scale == "batch":
            return adv.whiten(advantages, self.batch.learned)
        if self.scale == "running":
            return adv.divide(advantages, self.batch.learned, self.inputs.spread)
        return advantages

    @property
    def lambdas(self) -> torch.Tensor:
        """lambda of every token. [B, T]"""
        own = torch.full_like(self.rewards, self.settings.gae_lambda)
        if self.settings.adaptive_lambda is not None:
            lengths = self.batch.real.sum(-1, keepdim=True)
            own = adv.length_adaptive_lambdas(lengths, self.settings.adaptive_lambda).expand_as(own)
        return torch.where(self.batch.policy, own, torch.full_like(own, self.settings.guide_lambda))


def _estimate_gae(given: _EstimatorInputs) -> torch.Tensor:
    critic = given.regime.critic
    assert critic is not None
    values = given.stats.values[critic]
    if critic not in given.inputs.trusted:
        values = _mean_score(given.batch, critic).expand_as(values)
    advantages, _ = adv.gae(given.rewards, values, given.batch.real, given.settings.gamma, given.lambdas)
    return given.scaled(advantages)


def _mean_score(batch: EpisodeBatch, critic: str) -> torch.Tensor:
    """Mean score of the episodes that a critic is fitted on (of all where there are none), as a scalar."""
    fitted = batch.fit[critic].any(-1)
    return batch.scores[fitted].mean() if bool(fitted.any()) else batch.scores.mean()


def _estimate_group(given: _EstimatorInputs) -> torch.Tensor:
    """From scores; ``kl_coef`` is 0 where they are divided by their standard deviation (config.train)."""
    batch, term = given.batch, given.regime.guide_term
    counted = batch.own[batch.compared] if term is not None and term.baseline_of == "own" else None
    scaled = given.scale == "group"
    return _of_groups(given, partial(adv.group_advantages, scaled=scaled, counted=counted))


def _estimate_leave_one_out(given: _EstimatorInputs) -> torch.Tensor:
    return _of_groups(given, adv.leave_one_out_advantages)


def _of_groups(given: _EstimatorInputs, estimate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Advantages by group of the episodes that a baseline may count; 0 for the others. [B, T]"""
    batch, rows = given.batch, given.batch.compared
    returns = episode_returns(batch.scores, given.ratio, batch.learned, given.inputs.kl_coef)
    advantages = torch.zeros_like(returns)
    advantages[rows] = estimate(returns[rows], batch.groups[rows])
    return advantages.unsqueeze(-1).expand_as(given.rewards)


def _estimate_guide_mc(given: _EstimatorInputs) -> torch.Tensor:
    """The guide's mean return from after the action less that from before it, less the action's KL where that is
    charged in the reward."""
    batch = given.batch
    each = episode_returns(batch.differences, given.ratio, batch.learned, given.inputs.kl_coef).unsqueeze(-1)
    return given.scaled(torch.where(batch.learned, each, torch.zeros_like(given.rewards)))


ESTIMATORS: dict[Estimator, Callable[[_EstimatorInputs], torch.Tensor]] = {
    "gae": _estimate_gae,
    "group_mean": _estimate_group,
    "leave_one_out": _estimate_leave_one_out,
    "guide_mc": _estimate_guide_mc,
}
"""The function of each estimator of advantages; ``likelihood`` needs none."""
