"""PPO for the policy over operations, on :mod:`rlgf_cli.functional`. B chains, T steps, F features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlgf_cli import noise
from rlgf_cli.config.evolve_train import EvolvePPOConfig
from rlgf_cli.evolve.environment import Chain
from rlgf_cli.evolve.features import feature_names
from rlgf_cli.evolve.learned import LearnedPolicy, PolicyNet
from rlgf_cli.functional.advantages import gae, whiten
from rlgf_cli.functional.losses import entropy_bonus, policy_loss, value_loss
from rlgf_cli.functional.stats import explained_variance


@dataclass(frozen=True)
class Trajectories:
    """The steps of chains: observations [B, T, F], actions [B, T] int64, rewards [B, T], mask [B, T] bool.

    Steps without a reward are left out, so that GAE passes over them: the state after such a step is the one before it,
    except that the features count the step. Each chain's steps stand at the left; ``mask`` is False right of them.
    """

    observations: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    mask: torch.Tensor


def trajectories(policy: LearnedPolicy, chains: Sequence[Chain]) -> Trajectories:
    """The chains' steps that have a reward, as tensors."""
    index = {operation.name: i for i, operation in enumerate(policy.operations)}
    rewarded = [[t for t, step in enumerate(chain.steps) if step.reward is not None] for chain in chains]
    shape = (len(chains), max(1, *map(len, rewarded)) if rewarded else 1)
    observations = np.zeros((*shape, len(feature_names(policy.operations))), dtype=np.float32)
    actions, rewards = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    mask = np.zeros(shape, dtype=bool)
    for row, (chain, steps) in enumerate(zip(chains, rewarded, strict=True)):
        if steps:
            observations[row, : len(steps)] = policy.observations(chain)[steps]
            actions[row, : len(steps)] = [index[chain.steps[t].operation] for t in steps]
            rewards[row, : len(steps)] = [chain.steps[t].reward or 0.0 for t in steps]
            mask[row, : len(steps)] = True
    return Trajectories(*(torch.from_numpy(array) for array in (observations, actions, rewards, mask)))


def update(
    net: PolicyNet,
    optimizer: torch.optim.Optimizer,
    batch: Trajectories,
    config: EvolvePPOConfig,
    *,
    key: Sequence[int | str],
) -> dict[str, float]:
    """Update the policy with one batch of chains: ``epochs`` passes over minibatches of chains, shuffled by ``key``.

    Returns the figures of the row: means over the steps of all minibatches. Nothing is changed by an empty batch.
    """
    mask = batch.mask
    if not bool(mask.any()):
        return {}
    with torch.no_grad():
        old, values = _evaluate(net, batch)[:2]
    lambdas = torch.full_like(values, config.gae_lambda)
    advantages, returns = gae(batch.rewards, values, mask, config.gamma, lambdas)
    explained = explained_variance(values, returns, mask)
    advantages = whiten(advantages, mask)
    totals: dict[str, float] = {}
    norms: list[float] = []
    for epoch in range(config.epochs):
        order = torch.from_numpy(noise.generator(*key, "minibatches", epoch).permutation(len(mask)))
        for rows in order.split(config.minibatch_size):
            part = Trajectories(batch.observations[rows], batch.actions[rows], batch.rewards[rows], mask[rows])
            count = part.mask.sum()
            if not count:
                continue
            logprobs, value, entropies = _evaluate(net, part)
            loss, stats = policy_loss(logprobs, old[rows], advantages[rows], part.mask, config.clip_range, count)
            fit = value_loss(value, values[rows], returns[rows], part.mask, float("inf"), count)
            entropy = entropy_bonus(entropies, part.mask, count)
            optimizer.zero_grad()
            (loss + config.value_coef * fit - config.entropy_coef * entropy).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), config.max_grad_norm)))
            optimizer.step()
            sums = {"ppo/approx_kl": stats["approx_kl"], "ppo/clip_fraction": stats["clipped"]}
            means = {"loss/policy": loss, "loss/value": fit, "ppo/entropy": entropy}
            for name, total in [*sums.items(), *((name, mean * count) for name, mean in means.items())]:
                totals[name] = totals.get(name, 0.0) + float(total.detach())
    steps = config.epochs * int(mask.sum())
    row: dict[str, Any] = {name: total / steps for name, total in totals.items()}
    row["update/grad_norm"] = float(np.mean(norms))
    if explained is not None:
        row["value/explained"] = explained
    return row


def _evaluate(net: PolicyNet, batch: Trajectories) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logprobs of the actions, values, entropies: each [B, T]."""
    logprobs, values = net(batch.observations)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1), values, entropies
