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
    """What chains went through: seen [B, T, F], actions [B, T] int64, rewards [B, T], real [B, T] bool.

    Steps whose reward is None say nothing of their operation and are not there: the step before one is followed by the
    step after it. That is how GAE passes over them: the state after such a step is the one that it found, but for what
    the policy knows of having asked. Each chain's steps stand at the left; what is right of them is no step.
    """

    seen: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    real: torch.Tensor


def trajectories(policy: LearnedPolicy, chains: Sequence[Chain]) -> Trajectories:
    """The chains' steps as tensors."""
    index = {operation.name: i for i, operation in enumerate(policy.operations)}
    known = [[t for t, step in enumerate(chain.steps) if step.reward is not None] for chain in chains]
    shape = (len(chains), max(1, *map(len, known)) if known else 1)
    seen = np.zeros((*shape, len(feature_names(policy.operations))), dtype=np.float32)
    actions, rewards = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    real = np.zeros(shape, dtype=bool)
    for row, (chain, at) in enumerate(zip(chains, known, strict=True)):
        if at:
            seen[row, : len(at)] = policy.seen(chain)[at]
            actions[row, : len(at)] = [index[chain.steps[t].operation] for t in at]
            rewards[row, : len(at)] = [chain.steps[t].reward or 0.0 for t in at]
            real[row, : len(at)] = True
    return Trajectories(*(torch.from_numpy(array) for array in (seen, actions, rewards, real)))


def update(
    net: PolicyNet,
    optimizer: torch.optim.Optimizer,
    found: Trajectories,
    config: EvolvePPOConfig,
    *,
    key: Sequence[int | str],
) -> dict[str, float]:
    """Learn from one batch of chains: ``epochs`` passes over minibatches of chains that ``key`` shuffles.

    Returns the figures of the row: means over the steps of all minibatches. Without a single step nothing is learned.
    """
    real = found.real
    if not bool(real.any()):
        return {}
    with torch.no_grad():
        old, values = _looked_up(net, found)[:2]
    lambdas = torch.full_like(values, config.gae_lambda)
    advantages, returns = gae(found.rewards, values, real, config.gamma, lambdas)
    explained = explained_variance(values, returns, real)
    advantages = whiten(advantages, real)
    totals: dict[str, float] = {}
    norms: list[float] = []
    for epoch in range(config.epochs):
        order = torch.from_numpy(noise.generator(*key, "minibatches", epoch).permutation(len(real)))
        for rows in order.split(config.minibatch_size):
            mask, count = real[rows], real[rows].sum()
            if not count:
                continue
            part = Trajectories(found.seen[rows], found.actions[rows], found.rewards[rows], mask)
            logprobs, value, entropies = _looked_up(net, part)
            loss, stats = policy_loss(logprobs, old[rows], advantages[rows], mask, config.clip_range, count)
            fit = value_loss(value, values[rows], returns[rows], mask, float("inf"), count)
            entropy = entropy_bonus(entropies, mask, count)
            optimizer.zero_grad()
            (loss + config.value_coef * fit - config.entropy_coef * entropy).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), config.max_grad_norm)))
            optimizer.step()
            sums = {"ppo/approx_kl": stats["approx_kl"], "ppo/clip_fraction": stats["clipped"]}
            means = {"loss/policy": loss, "loss/value": fit, "ppo/entropy": entropy}
            for name, value_ in [*sums.items(), *((name, mean * count) for name, mean in means.items())]:
                totals[name] = totals.get(name, 0.0) + float(value_.detach())
    looked_at = config.epochs * int(real.sum())
    row: dict[str, Any] = {name: total / looked_at for name, total in totals.items()}
    row["update/grad_norm"] = float(np.mean(norms))
    if explained is not None:
        row["value/explained"] = explained
    return row


def _looked_up(net: PolicyNet, found: Trajectories) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of the actions, values, entropies: each [B, T]."""
    logprobs, values = net(found.seen)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, found.actions.unsqueeze(-1)).squeeze(-1), values, entropies
