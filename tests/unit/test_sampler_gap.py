"""The correction for the sampler's gap: its weights against their definition, and what a loss makes of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl import PPO, loaded_from, prompts_for, step_data, update_settings
from rlgf_cli.functional import losses
from rlgf_cli.functional.importance import importance_ratios, truncated_weights
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.training.episodes import Episode
from rlgf_cli.training.minibatches import StepData
from rlgf_cli.training.optimizer import make_optimizer
from rlgf_cli.training.rollout import Sampling
from rlgf_cli.training.sampler_gap import correction_weights, gap_figures
from rlgf_cli.training.update import update

NAN, INF = float("nan"), float("inf")


def weight(own: float, reported: float, cap: float) -> float:
    """min(pi / mu, C) of one token, from the probabilities."""
    return min(math.exp(own) / math.exp(reported), cap)


@given(
    st.lists(st.tuples(st.floats(-8, 0), st.floats(-8, 0), st.booleans()), min_size=1, max_size=12),
    st.floats(1, 5),
    st.sampled_from([NAN, INF, -INF, 1e30]),
)
def test_a_weight_is_the_ratio_of_the_probabilities_up_to_the_cap(
    tokens: list[tuple[float, float, bool]], cap: float, garbage: float
) -> None:
    """Outside the mask the weight is 1, whatever stands there."""
    mask = torch.tensor([[sampled for *_, sampled in tokens]])
    own = torch.tensor([[value for value, *_ in tokens]], dtype=torch.float64, requires_grad=True)
    reported = torch.tensor([[mu if sampled else garbage for _, mu, sampled in tokens]], dtype=torch.float64)
    weights = truncated_weights(importance_ratios(own, reported, mask), cap)
    assert not weights.requires_grad
    expected = [weight(pi, mu, cap) if sampled else 1.0 for pi, mu, sampled in tokens]
    assert weights[0].tolist() == pytest.approx(expected, rel=1e-9)


@given(
    st.lists(st.tuples(st.floats(-2, 2), st.floats(-1, 1), st.floats(0.01, 5)), min_size=1, max_size=9),
)
def test_a_weighted_advantage_weighs_the_clipped_term_of_its_token(tokens: list[tuple[float, float, float]]) -> None:
    """w min(rho A, clip(rho) A), token by token: a factor above 0 goes through the minimum and the clipping."""
    advantages, moved, weights = (torch.tensor([list(c)], dtype=torch.float64) for c in zip(*tokens, strict=True))
    mask = torch.ones_like(moved, dtype=torch.bool)
    loss, _ = losses.policy_loss(moved, torch.zeros_like(moved), advantages * weights, mask, 0.2, len(tokens))
    terms = []
    for a, difference, w in tokens:
        rho = math.exp(difference)
        terms.append(w * min(rho * a, min(max(rho, 0.8), 1.2) * a))
    assert float(loss) == pytest.approx(-sum(terms) / len(terms), abs=1e-9)


def episodes_of(loaded: Any) -> list[Episode]:
    """Texts of which a sampler wrote some tokens: the second author's, and all of the last text."""
    texts: list[Any] = [
        ([("guide", [40, 41]), ("policy", [300, 42, 1])], {2: -1.0, 3: -2.5, 4: -0.1}),
        ([("policy", [70, 71, 72])], {0: -9.0, 1: -0.01, 2: -3.0}),
    ]
    prompts = prompts_for(loaded, 2)
    return [
        Episode(i, p.example, p.ids, i, "policy", segments, text="x" * (i + 1), sampler_logprobs=reported)
        for i, (p, (segments, reported)) in enumerate(zip(prompts, texts, strict=True))
    ]


def test_the_weights_of_a_step_are_at_the_tokens_that_the_sampler_wrote(tiny_gpt2: Path) -> None:
    episodes = episodes_of(loaded_from(tiny_gpt2))
    torch.manual_seed(0)
    own = -3 * torch.rand(2, 5)
    weights = correction_weights(episodes, own, 2.0)
    assert weights.shape == own.shape
    expected = torch.ones_like(own)
    for row, e in enumerate(episodes):
        for at, reported in e.sampler_logprobs.items():
            expected[row, at] = weight(float(own[row, at]), reported, 2.0)
    torch.testing.assert_close(weights, expected)
    figures = gap_figures(episodes, own, 2.0)
    pairs = [(float(own[r, at]), mu) for r, e in enumerate(episodes) for at, mu in e.sampler_logprobs.items()]
    assert figures["sampler/gap"] == pytest.approx(sum(abs(mu - pi) for pi, mu in pairs) / 6, rel=1e-5)
    assert figures["sampler/gap_max"] == pytest.approx(max(abs(mu - pi) for pi, mu in pairs), rel=1e-5)
    assert figures["sampler/weight"] == pytest.approx(sum(weight(pi, mu, 2.0) for pi, mu in pairs) / 6, rel=1e-5)
    assert figures["sampler/truncated"] == pytest.approx(sum(math.exp(pi - mu) > 2 for pi, mu in pairs) / 6)
    assert set(gap_figures(episodes, own, None)) == {"sampler/gap", "sampler/gap_max"}
    assert gap_figures([replace(e, sampler_logprobs={}) for e in episodes], own, 2.0) == {}


def updated(path: Path, change: Any) -> dict[str, torch.Tensor]:
    """The policy's weights after one update on the same data, with ``change`` made to it."""
    loaded = loaded_from(path)
    model = ActorCritic(loaded, ["policy"], mode="head", with_ref_model=False)
    sampling = Sampling(max_new_tokens=5)
    data = step_data(model, PPO, episodes_of(loaded), sampling, kl_coef=0.0)
    assert data.advantages is not None
    torch.manual_seed(1)
    per_token = torch.randn(data.batch.real.shape) * data.batch.learned
    data = change(replace(data, advantages=replace(data.advantages, per_token=per_token)))
    optimizer = make_optimizer(model.trainable(), 1e-2, 0.0)
    update(model, optimizer, data, sampling, update_settings(epochs=2, minibatch_size=1), seed=0, step=0)
    return {name: p.detach().clone() for name, p in model.trainable()}


def test_weights_of_one_are_no_correction_and_others_weigh_the_advantages(tiny_gpt2: Path) -> None:
    """To the last bit, whatever the minibatch."""

    def weighted(data: StepData, weights: torch.Tensor) -> StepData:
        return replace(data, weights=weights)

    def by_hand(data: StepData) -> StepData:
        assert data.advantages is not None
        per_token = data.advantages.per_token * weights
        return replace(data, advantages=replace(data.advantages, per_token=per_token))

    weights = torch.tensor([[1.0, 1.0, 0.5, 2.0, 0.25], [2.0, 0.125, 1.0, 1.0, 1.0]])
    none = updated(tiny_gpt2, lambda data: data)
    ones = updated(tiny_gpt2, lambda data: weighted(data, torch.ones(data.batch.real.shape)))
    corrected, expected = updated(tiny_gpt2, lambda data: weighted(data, weights)), updated(tiny_gpt2, by_hand)
    assert all(torch.equal(none[name], ones[name]) for name in none)
    assert all(torch.equal(expected[name], corrected[name]) for name in none)
    assert any(not torch.equal(none[name], corrected[name]) for name in none)
