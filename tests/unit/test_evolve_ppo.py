"""PPO over chains: the update against a definition written out by hand, and learning where the optimum is known."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from evolving import OPERATIONS, SEEDS, environment_of, hash_of, number_of
from rlgf_cli.config.evolve_train import EvolvePPOConfig
from rlgf_cli.evolve import ppo
from rlgf_cli.evolve.environment import Chain, Step
from rlgf_cli.evolve.features import feature_names
from rlgf_cli.evolve.iterations import chains_of
from rlgf_cli.evolve.learned import LearnedPolicy, PolicyNet
from rlgf_cli.evolve.policies import rollout
from rlgf_cli.protocols import Example, Failure, GuideRequest

F = len(feature_names(OPERATIONS))


def net_of(seed: int = 0) -> PolicyNet:
    net = PolicyNet(F, len(OPERATIONS), 8, seed)
    torch.nn.init.normal_(net.logits.weight, generator=torch.Generator().manual_seed(seed))
    return net


def step(operation: str, reward: float | None) -> Step:
    return Step(operation, "i", f"text of {operation}", "kept", 0.5, None, reward, 1, None)


def chains_with(*rewards: list[float | None]) -> list[Chain]:
    names = [operation.name for operation in OPERATIONS]
    return [
        Chain(SEEDS[i], steps=[step(names[(i + t) % 3], reward) for t, reward in enumerate(row)])
        for i, row in enumerate(rewards)
    ]


def advantages_of(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Schulman et al. 2015, equation 16, as a double sum; the state after the last step is worth 0."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def test_the_first_update_is_the_gradient_of_the_definition():
    """One epoch, one minibatch, rho = 1: the loss is -mean(A log pi) in its gradient, and the rest is as written."""
    config = EvolvePPOConfig(
        epochs=1, minibatch_size=9, gamma=0.9, gae_lambda=0.7, entropy_coef=0.05, value_coef=0.3, max_grad_norm=1e9
    )
    chains = chains_with([0.4, None, -0.5], [0.1, 0.9], [None, None])
    net = net_of()
    policy, twin = LearnedPolicy(net, OPERATIONS, 6, ""), copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    row = ppo.update(net, optimizer, ppo.trajectories(policy, chains), config, key=(0,))

    names = [operation.name for operation in OPERATIONS]
    logprobs, values, entropies, advantages, returns = [], [], [], [], []
    for chain in chains:
        known = [t for t, s in enumerate(chain.steps) if s.reward is not None]
        if not known:
            continue
        out, value = twin(torch.from_numpy(policy.observations(chain)[known]))
        logprobs += [out[k, names.index(chain.steps[t].operation)] for k, t in enumerate(known)]
        values += list(value)
        entropies += list(-(out.exp() * out).sum(-1))
        old = [float(v.detach()) for v in value]
        own = advantages_of([chain.steps[t].reward or 0.0 for t in known], old, 0.9, 0.7)
        advantages += own
        returns += [a + v for a, v in zip(own, old, strict=True)]
    raw = torch.tensor(advantages)
    white = (raw - raw.mean()) / raw.std(correction=0)
    loss = -(white * torch.stack(logprobs)).mean()
    fit = 0.5 * (torch.stack(values) - torch.tensor(returns)).square().mean()
    entropy = torch.stack(entropies).mean()
    (loss + 0.3 * fit - 0.05 * entropy).backward()
    for (name, after), (_, before) in zip(net.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.allclose(before - after, before.grad, atol=2e-5), name
        assert float(before.grad.abs().max()) > 0, name
    assert row["loss/value"] == pytest.approx(float(fit.detach()), rel=1e-5)
    assert row["ppo/entropy"] == pytest.approx(float(entropy.detach()), rel=1e-5)
    assert row["ppo/clip_fraction"] == 0 and abs(row["ppo/approx_kl"]) < 1e-6


def test_steps_without_a_reward_are_passed_over():
    """A chain with such steps teaches what the chain without them teaches, but for what the policy saw."""
    policy = LearnedPolicy(net_of(), OPERATIONS, 6, "")
    found = ppo.trajectories(policy, chains_with([None, 0.4, None, None, -0.5, None], [0.1]))
    assert found.mask.tolist() == [[True, True], [True, False]]
    assert found.rewards.tolist() == [pytest.approx([0.4, -0.5]), pytest.approx([0.1, 0])]
    assert found.actions.tolist() == [[1, 1], [1, 0]]
    nothing = ppo.trajectories(policy, chains_with([None], [None, None]))
    before = copy.deepcopy(policy.net.state_dict())
    optimizer = torch.optim.Adam(policy.net.parameters())
    assert ppo.update(policy.net, optimizer, nothing, EvolvePPOConfig(), key=(0,)) == {}
    assert all(torch.equal(value, before[name]) for name, value in policy.net.state_dict().items())


def test_the_update_is_fixed_by_its_key():
    nets = []
    for key in ((1,), (1,), (2,)):
        net = net_of()
        found = ppo.trajectories(
            LearnedPolicy(net, OPERATIONS, 6, ""), chains_with([0.4, 0.1], [0.9, -0.5], [0.2, 0.3])
        )
        ppo.update(net, torch.optim.Adam(net.parameters()), found, EvolvePPOConfig(minibatch_size=1), key=key)
        nets.append(net.state_dict())
    assert all(torch.equal(value, nets[1][name]) for name, value in nets[0].items())
    assert not torch.equal(nets[0]["logits.weight"], nets[2]["logits.weight"])


def task(request: GuideRequest) -> str | Failure:
    """``deep`` pays after ``wide`` alone, ``long`` never; ``wide`` pays once. A fifth of the requests has no answer."""
    text = request.example.prompt
    operation = next(o for o in OPERATIONS if text.startswith(o.prompt.partition("{")[0]))
    given = text.removeprefix(operation.prompt.partition("{")[0])
    if hash_of(request) % 5 == 0:
        return Failure("bad_request", "not now", final=True)
    if operation.name == "wide" and "Task" not in given:
        return number_of(request)
    if operation.name == "deep" and "Task" in given and "then" not in given:
        return f"{given} then {number_of(request).removeprefix('Task ')}"
    return given


def test_it_learns_what_pays_only_after_something_else():
    """Known optimum: wide, then deep (each again where it had no answer). Random play earns about nothing."""
    net = PolicyNet(F, len(OPERATIONS), 32, 0)
    policy = LearnedPolicy(net, OPERATIONS, 2, "")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    seeds = [Example(f"s{i}", f"Name {i} colours of {i * 7} kinds.") for i in range(16)]
    rewards = []
    for iteration in range(1, 31):
        environment = environment_of(task, seeds=seeds)
        chains = chains_of(iteration, seeds, 16, seed=0)
        rollout(environment, chains, policy, 2, seed=0)
        ppo.update(net, optimizer, ppo.trajectories(policy, chains), EvolvePPOConfig(), key=(iteration,))
        rewards.append(np.mean([s.reward for c in chains for s in c.steps if s.reward is not None]))
    assert rewards[0] < 0.1 and np.mean(rewards[-5:]) > 0.5, rewards
    made = [Chain(seed) for seed in seeds]
    rollout(environment_of(task, seeds=seeds), made, policy, 2, seed=1)
    answered = [c for c in made if all(s.reward is not None for s in c.steps)]
    best = [[s.operation for s in c.steps] == ["wide", "deep"] for c in answered]
    assert np.mean(best) > 0.9
