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

from rlgf_cli.algorithms import catalog
from rlgf_cli.algorithms.spec import Author, Regime
from rlgf_cli.protocols import Example, Score
from rlgf_cli.training.credit import Credit, CreditSettings, Notes, assign
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


def notes_for(batch: EpisodeBatch, critics: Any, seed: int) -> Notes:
    rng = np.random.default_rng(seed)

    def random() -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=batch.real.shape)).float()

    return Notes(random(), random(), {name: random() for name in critics})


def by_definition(
    e: Episode, row: int, notes: Notes, critic: str, settings: CreditSettings
) -> tuple[list[float], list[float], list[float]]:
    """Rewards, advantages and returns of one episode, token by token."""
    authors = [author for author, ids in e.segments for _ in ids]
    rewards = [
        -KL * float(notes.logprobs[row, t] - notes.ref_logprobs[row, t]) if author == "policy" else 0.0
        for t, author in enumerate(authors)
    ]
    rewards[-1] += e.value
    values = [float(v) for v in notes.values[critic][row, : len(authors)]]
    lambdas = [settings.gae_lambda if author == "policy" else settings.guide_lambda for author in authors]
    deltas = [r + settings.gamma * v2 - v for r, v, v2 in zip(rewards, values, [*values[1:], 0.0], strict=True)]
    advantages = [
        sum(settings.gamma ** (j - t) * math.prod(lambdas[t + 1 : j + 1]) * deltas[j] for j in range(t, len(deltas)))
        for t in range(len(deltas))
    ]
    return rewards, advantages, [a + v for a, v in zip(advantages, values, strict=True)]


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("name", ["ppo", "ppo++", "lols", "aggrevated"])
@given(data=st.data())
def test_gae_algorithms(name: str, whiten: bool, data: st.DataObject) -> None:
    """Advantages from the critic of the regime's roll-out, on learned tokens; each critic's targets on its own."""
    spec = catalog.build(name, {})
    regime = data.draw(st.sampled_from(spec.regimes))
    episodes, seed = data.draw(cases(regime))
    batch = build_batch(episodes, regime, spec.critics, LOADED)
    notes = notes_for(batch, data.draw(st.permutations(spec.critics)), seed)
    settings = CreditSettings(0.9, 0.7, 1.0, whiten)
    credit: Credit = assign(regime, batch, notes, kl_coef=KL, settings=settings)
    expected = torch.zeros(batch.real.shape)
    for row, e in enumerate(episodes):
        rewards, advantages, _ = by_definition(e, row, notes, regime.roll_out, settings)
        assert credit.rewards[row, : e.length].tolist() == pytest.approx(rewards, abs=1e-5)
        expected[row, : e.length] = torch.tensor(advantages)
        for critic, returns in credit.returns.items():
            targets = torch.tensor(by_definition(e, row, notes, critic, settings)[2])
            fit = batch.fit[critic][row, : e.length]
            assert torch.allclose(returns[row, : e.length][fit], targets[fit], atol=1e-5)
    chosen = expected[batch.learned]
    if whiten and len(chosen) > 1:
        chosen = (chosen - chosen.mean()) / (chosen.var(unbiased=False) + 1e-8).sqrt()
    assert torch.allclose(credit.advantages[batch.learned], chosen, atol=1e-4)
    assert not credit.advantages[~batch.learned].any()
    assert set(credit.returns) == {critic for critic in spec.critics if bool(batch.fit[critic].any())}


@pytest.mark.parametrize("name", ["grpo", "rloo", "grpo++", "rloo++"])
@given(data=st.data())
def test_group_algorithms(name: str, data: st.DataObject) -> None:
    """R = score - KL over learned tokens; every learned token of an episode gets R less its group's baseline."""
    spec = catalog.build(name, {"group_size": 2})
    regime = spec.regimes[0]
    episodes, seed = data.draw(cases(regime))
    batch = build_batch(episodes, regime, spec.critics, LOADED)
    notes = notes_for(batch, [], seed)
    credit = assign(regime, batch, notes, kl_coef=KL, settings=CreditSettings(0.9, 0.7, 1.0, True))
    returns = []
    for row, e in enumerate(episodes):
        authors = [author for author, ids in e.segments for _ in ids]
        ratio = notes.logprobs[row] - notes.ref_logprobs[row]
        kl = sum(float(ratio[t]) for t, author in enumerate(authors) if author == "policy")
        returns.append(e.value - KL * kl)
    for row in range(4):
        own, other = returns[row], returns[row ^ 1]
        expected = own - other
        if "grpo" in name:
            mean = (own + other) / 2
            deviation = math.sqrt((own - mean) ** 2 + (other - mean) ** 2)
            expected = (own - mean) / (deviation + 1e-4)
        found = credit.advantages[row][batch.learned[row]]
        assert found.tolist() == pytest.approx([expected] * len(found), abs=1e-3)
    assert not credit.returns and not credit.advantages[~batch.learned].any()


def test_without_a_coefficient_the_log_ratio_is_still_known() -> None:
    e = Episode(0, Example("e", "p"), [5], 0, "policy", [("guide", [7, 7]), ("policy", [7])], 2, score=Score(2.0))
    batch = build_batch([e], Regime(roll_in="guide"), ["policy"], LOADED)
    notes = Notes(torch.full((1, 3), -1.0), torch.full((1, 3), -3.0), {"policy": torch.zeros(1, 3)})
    credit = assign(Regime(roll_in="guide"), batch, notes, kl_coef=0.0, settings=CreditSettings(1.0, 1.0, 1.0, False))
    assert credit.rewards.tolist() == [[0.0, 0.0, 2.0]]
    assert credit.log_ratio.tolist() == [[0.0, 0.0, 2.0]]  # on the policy's token alone
