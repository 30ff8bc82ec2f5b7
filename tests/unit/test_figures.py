"""The figures of a row, from episodes and tensors written down by hand."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, pstdev, stdev, variance
from types import SimpleNamespace

import pytest
import torch

from rl import loaded_from, trainer_for
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.protocols import Example, Score
from rlgf_cli.training import figures
from rlgf_cli.training.advantages import Advantages, RolloutStats
from rlgf_cli.training.episodes import Episode, build_batch

LOADED = SimpleNamespace(device=torch.device("cpu"), pad_id=0, encoder_decoder=False)
EXAMPLE = Example("e", "p")
SCORES = [0.5, 0.5, 2.0, 1.0]


def episodes() -> list[Episode]:
    """Two groups of two; the second one begins with two tokens of the guide's."""
    found = []
    for i, score in enumerate(SCORES):
        guided = i >= 2
        segments = [("guide", [7, 7]), ("policy", [8] * i)] if guided else [("policy", [8] * (3 + i))]
        e = Episode(i, EXAMPLE, [5], i // 2, "policy", segments, 2 * guided, finished=i != 3)  # type: ignore[arg-type]
        e.score, e.penalty = Score(score), 0.25 * (i == 3)
        found.append(e)
    return found


def test_scores_lengths_and_groups() -> None:
    regime = Regime(roll_in="guide", estimator="group_mean", group_size=2)
    row = figures.of_episodes(regime, episodes())
    values = [0.5, 0.5, 2.0, 0.75]
    assert row["score/mean"] == pytest.approx(fmean(values)) and row["score/std"] == pytest.approx(pstdev(values))
    assert row["score/groups_without_variance"] == 0.5
    assert row["length/mean"] == (3 + 4 + 4 + 5) / 4 and row["length/truncated"] == 0.25
    assert row["rollin/share"] == 0.5 and row["rollin/tokens"] == 2.0 and row["regime"] == "guide>policy"
    alone = figures.of_episodes(Regime(), episodes()[:2])
    assert "score/groups_without_variance" not in alone and "rollin/share" not in alone
    assert alone["regime"] == "policy" and alone["length/truncated"] == 0.0


@pytest.mark.parametrize("reference", [True, False])
def test_what_the_losses_used(reference: bool) -> None:
    """Every figure over the tokens that it speaks of: the policy's, the learned, those that a critic is fitted on."""
    torch.manual_seed(0)
    texts = episodes()
    batch = build_batch(texts, Regime(roll_in="guide"), ["policy"], LOADED)
    shape = batch.real.shape

    def own(x: torch.Tensor, mask: torch.Tensor) -> list[float]:
        return [float(v) for row, chosen in zip(x, mask, strict=True) for v, c in zip(row, chosen, strict=True) if c]

    logprobs, values, returns, rewards, per_token, ratio = (torch.randn(shape) for _ in range(6))
    per_token = per_token * batch.learned
    stats = RolloutStats(logprobs, logprobs - ratio if reference else None, {"policy": values})
    advantages = Advantages(rewards, per_token, {"policy": returns})
    row = figures.of_tensors(batch, stats, advantages)
    policy, fit = batch.policy, batch.fit["policy"]
    assert int(policy.sum()) == 3 + 4 + 2 + 3 < int(batch.real.sum()) == 16
    expected = {
        "tokens/policy": 12 / 16,
        "policy/entropy": -fmean(own(logprobs, policy)),
        "reward/sum": fmean(float(r.sum()) for r in rewards),
        "advantage/std": stdev(own(per_token, batch.learned)),
        "value/return_policy": fmean(own(returns, fit)),
        "value/bias_policy": fmean(own(values, fit)) - fmean(own(returns, fit)),
        "value/explained_policy": 1 - variance(own(returns - values, fit)) / variance(own(returns, fit)),
    }
    if reference:
        ratios = own(ratio, policy)
        expected |= {
            "kl/mean": fmean(ratios),
            "kl/k3": fmean(math.exp(-r) - 1 + r for r in ratios),
            "kl/episode": sum(ratios) / 4,
        }
    assert row == pytest.approx(expected, abs=1e-5)


def test_a_likelihood_has_no_credit_to_speak_of() -> None:
    batch = build_batch(episodes(), Regime(), ["policy"], LOADED)
    assert figures.of_tensors(batch, None, None) == {"tokens/policy": 12 / 16}


def test_the_share_of_groups_whose_scores_are_all_equal() -> None:
    scores = [1.0, 1.0, 0.0, 1.0, 0.5, 0.0]  # groups of two: equal, different, different
    found = [
        Episode(i, Example("e", "p"), [5], i // 2, "policy", [("policy", [7])], score=Score(s))
        for i, s in enumerate(scores)
    ]
    regime = Regime(estimator="group_mean", group_size=2)
    assert figures.of_episodes(regime, found)["score/groups_without_variance"] == pytest.approx(1 / 3)


def test_tokens_that_are_masked_are_not_counted_as_learned(tiny_gpt2: Path) -> None:
    trainer = trainer_for(loaded_from(tiny_gpt2), "ppo", mask_truncated=True)
    row, episodes = trainer.step()
    assert any(not e.finished for e in episodes)
    assert row["tokens/learned"] == sum(e.length for e in episodes if e.finished)
