"""From scores to advantages for whole episodes, against the definitions written out."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms import spec_of
from rlgf_cli.algorithms.spec import Author, Regime
from rlgf_cli.config.train import KLConfig
from rlgf_cli.protocols import Example, Score
from rlgf_cli.training.advantages import (
    AdvantageInputs,
    Advantages,
    AdvantageSettings,
    RolloutStats,
    compute_advantages,
)
from rlgf_cli.training.episodes import Episode, EpisodeBatch, build_batch

LOADED = SimpleNamespace(device=torch.device("cpu"), pad_id=0, encoder_decoder=False)
KL = 0.3


@st.composite
def cases(draw: st.DrawFn, regime: Regime) -> tuple[list[Episode], int]:
    """Episodes with random scores, and a seed for what the models say of them."""
    episodes = []
    for index in range(4):
        first, last = draw(st.integers(0, 3)), draw(st.integers(1, 4))
        segments: list[tuple[Author, list[int]]] = [(regime.roll_out, [7] * last)]
        if first and regime.roll_in != "none":
            segments.insert(0, (regime.roll_in, [7] * first))
        cut = first if len(segments) == 2 else 0
        if len(segments) == 2 and regime.roll_in == "policy" and draw(st.booleans()):
            segments.pop()  # the roll-in ended by itself
        e = Episode(index, Example("e", "p"), [5], index // 2, regime.roll_out, segments, cut, max(0, cut - 1), cut > 0)
        e.score = Score(draw(st.integers(-2, 2)) / 2)
        episodes.append(e)
    return episodes, draw(st.integers(0, 999))


def stats_for(batch: EpisodeBatch, critics: Any, seed: int) -> RolloutStats:
    rng = np.random.default_rng(seed)

    def random() -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=batch.real.shape)).float()

    return RolloutStats(random(), random(), {name: random() for name in critics})


def by_definition(
    e: Episode, row: int, stats: RolloutStats, values: list[float], settings: AdvantageSettings, lambdas: list[float]
) -> tuple[list[float], list[float], list[float]]:
    """Rewards, advantages and returns of one episode, token by token. lambdas: one per token."""
    assert stats.ref_logprobs is not None
    authors = [author for author, ids in e.segments for _ in ids]
    rewards = [
        -KL * float(stats.old_logprobs[row, t] - stats.ref_logprobs[row, t]) if author == "policy" else 0.0
        for t, author in enumerate(authors)
    ]
    rewards[-1] += e.value
    deltas = [r + settings.gamma * v2 - v for r, v, v2 in zip(rewards, values, [*values[1:], 0.0], strict=True)]
    advantages = [
        sum(settings.gamma ** (j - t) * math.prod(lambdas[t + 1 : j + 1]) * deltas[j] for j in range(t, len(deltas)))
        for t in range(len(deltas))
    ]
    return rewards, advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def lambdas_of(e: Episode, settings: AdvantageSettings) -> list[float]:
    authors = [author for author, ids in e.segments for _ in ids]
    own = settings.gae_lambda
    if settings.adaptive_lambda is not None:
        own = max(0.0, 1 - 1 / (settings.adaptive_lambda * len(authors)))
    return [own if author == "policy" else settings.guide_lambda for author in authors]


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("scale", ["none", "batch", "running"])
@pytest.mark.parametrize("name", ["ppo", "ppo++", "lols", "aggrevated"])
@given(data=st.data())
def test_gae_algorithms(name: str, scale: Any, trusted: bool, data: st.DataObject) -> None:
    """Advantages from the critic of the regime's roll-out, or from the mean score where that critic is not trusted;
    each critic's targets on its own, with a lambda of their own."""
    spec = spec_of(name)
    regime = data.draw(st.sampled_from(spec.regimes))
    episodes, seed = data.draw(cases(regime))
    batch = build_batch(episodes, regime, spec.critics, LOADED)
    stats = stats_for(batch, data.draw(st.permutations(spec.critics)), seed)
    adaptive = data.draw(st.sampled_from([None, 0.5]))
    settings = AdvantageSettings(0.9, 0.7, 1.0, 0.8, adaptive, scale)
    inputs = AdvantageInputs(KL, 0.4, frozenset(spec.critics) if trusted else frozenset())
    advantages: Advantages = compute_advantages(regime, batch, stats, settings, inputs)
    fitted = [e.value for e in episodes if e.fits == regime.roll_out] or [e.value for e in episodes]
    expected = torch.zeros(batch.real.shape)
    for row, e in enumerate(episodes):
        baseline = [float(v) for v in stats.values[regime.roll_out][row, : e.length]]
        if not trusted:
            baseline = [sum(fitted) / len(fitted)] * e.length
        rewards, per_token, _ = by_definition(e, row, stats, baseline, settings, lambdas_of(e, settings))
        assert advantages.rewards[row, : e.length].tolist() == pytest.approx(rewards, abs=1e-5)
        expected[row, : e.length] = torch.tensor(per_token)
        for critic, returns in advantages.returns.items():
            own = [float(v) for v in stats.values[critic][row, : e.length]]
            targets = torch.tensor(by_definition(e, row, stats, own, settings, [0.8] * e.length)[2])
            fit = batch.fit[critic][row, : e.length]
            assert torch.allclose(returns[row, : e.length][fit], targets[fit], atol=1e-5)
    chosen = expected[batch.learned]
    if scale == "batch" and len(chosen) > 1:
        chosen = (chosen - chosen.mean()) / (chosen.var(unbiased=False) + 1e-8).sqrt()
    if scale == "running" and len(chosen):
        chosen = (chosen - chosen.mean()) / 0.4
    assert torch.allclose(advantages.per_token[batch.learned], chosen, atol=1e-4)
    assert not advantages.per_token[~batch.learned].any()
    assert set(advantages.returns) == {critic for critic in spec.critics if bool(batch.fit[critic].any())}


def test_a_batch_without_signal_has_small_advantages() -> None:
    """No text succeeded and the critic is almost right: what is left is the size of its error, not 1."""
    regime = Regime()
    episodes = [
        Episode(i, Example("e", "p"), [5], i, "policy", [("policy", [7] * 4)], score=Score(0.0)) for i in range(4)
    ]
    batch = build_batch(episodes, regime, ["policy"], LOADED)
    stats = RolloutStats(torch.zeros(4, 4), torch.zeros(4, 4), {"policy": 1e-3 * torch.randn(4, 4)})
    inputs = AdvantageInputs(0.0, 0.3, frozenset({"policy"}))
    found = {
        scale: compute_advantages(regime, batch, stats, AdvantageSettings(scale=scale), inputs).per_token.abs().max()
        for scale in ("running", "batch")
    }
    assert float(found["running"]) < 0.02 and float(found["batch"]) > 1  # whitening makes noise of full size of it


@pytest.mark.parametrize("kl_coef", [1e-4, 0.02, 1.0, 100.0])
@pytest.mark.parametrize("name", ["grpo", "grpo++", "rloo", "rloo++"])
def test_equal_scores_in_a_group_are_worth_nothing_whatever_the_kl(name: str, kl_coef: float) -> None:
    """The KL of a group algorithm is a loss of its own. Divided with the score it was noise of full size."""
    regime = spec_of(name, {"group_size": 4}).regimes[0]
    episodes = [
        Episode(i, Example("e", "p"), [5], i // 4, "policy", [("policy", [7] * (2 + i % 3))], score=Score(0.3))
        for i in range(8)
    ]
    batch = build_batch(episodes, regime, [], LOADED)
    stats = stats_for(batch, [], 0)
    inputs = AdvantageInputs(kl_coef if KLConfig(coef=kl_coef).where == "reward" else 0.0)
    assert not compute_advantages(regime, batch, stats, AdvantageSettings(), inputs).per_token.any()
    charged = compute_advantages(
        regime, batch, stats, AdvantageSettings(), AdvantageInputs(kl_coef)
    ).per_token  # as it was
    assert float(charged.abs().max()) > (0.3 if "grpo" in name else 0)


@pytest.mark.parametrize("name", ["grpo", "rloo", "grpo++", "rloo++"])
@given(data=st.data())
def test_group_algorithms(name: str, data: st.DataObject) -> None:
    """Every learned token of an episode gets its score less its group's baseline; with a charge in the reward
    (rloo alone) R = score - KL over learned tokens takes the score's place."""
    spec = spec_of(name, {"group_size": 2})
    regime = spec.regimes[0]
    episodes, seed = data.draw(cases(regime))
    batch = build_batch(episodes, regime, spec.critics, LOADED)
    stats = stats_for(batch, [], seed)
    assert stats.ref_logprobs is not None
    charge = data.draw(st.sampled_from([0.0] if "grpo" in name else [0.0, KL]))
    scale: Any = data.draw(st.sampled_from(["auto", "none"]))
    advantages = compute_advantages(
        regime, batch, stats, AdvantageSettings(0.9, 0.7, scale=scale), AdvantageInputs(charge)
    )
    returns = []
    for row, e in enumerate(episodes):
        authors = [author for author, ids in e.segments for _ in ids]
        ratio = stats.old_logprobs[row] - stats.ref_logprobs[row]
        kl = sum(float(ratio[t]) for t, author in enumerate(authors) if author == "policy")
        returns.append(e.value - charge * kl)
    for row in range(4):
        own, other = returns[row], returns[row ^ 1]
        expected = own - other
        if "grpo" in name:
            mean = (own + other) / 2
            deviation = math.sqrt((own - mean) ** 2 + (other - mean) ** 2)
            expected = (own - mean) / (deviation + 1e-4 if scale == "auto" else 1)
        found = advantages.per_token[row][batch.learned[row]]
        assert found.tolist() == pytest.approx([expected] * len(found), abs=1e-3)
    assert not advantages.returns and not advantages.per_token[~batch.learned].any()


def test_without_a_coefficient_the_log_ratio_is_still_known() -> None:
    e = Episode(0, Example("e", "p"), [5], 0, "policy", [("guide", [7, 7]), ("policy", [7])], 2, score=Score(2.0))
    batch = build_batch([e], Regime(roll_in="guide"), ["policy"], LOADED)
    stats = RolloutStats(torch.full((1, 3), -1.0), torch.full((1, 3), -3.0), {"policy": torch.zeros(1, 3)})
    advantages = compute_advantages(Regime(roll_in="guide"), batch, stats, AdvantageSettings(scale="none"))
    assert advantages.rewards.tolist() == [[0.0, 0.0, 2.0]]
    ratio = stats.log_ratio(batch)
    assert ratio is not None and ratio.tolist() == [[0.0, 0.0, 2.0]]  # on the policy's token alone
