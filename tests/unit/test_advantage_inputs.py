"""What advantages depend on besides the episodes: moments of the scores, which critics to trust, when the policy may
learn, and where the KL is charged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch

from configured import trainer_of, with_sgd
from rl import coverage_score, guide, loaded_from, parameters_of, prompts_for
from rlgf_cli.functional.stats import running_moments, spread_of
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.protocols import Example, Score
from rlgf_cli.training.advantages import Advantages
from rlgf_cli.training.critics import TRUST_MEMORY, CriticSettings, calibrate_critics
from rlgf_cli.training.episodes import Episode, build_batch
from rlgf_cli.training.loop import Trainer


@pytest.fixture
def gpt2(tiny_gpt2: Path) -> Loaded:
    return loaded_from(tiny_gpt2)


def recorded(trainer: Trainer) -> list[tuple[list[Episode], Any, Advantages]]:
    """What every later step gives advantages for, in the order of the steps: episodes, stats, advantages."""
    found: list[tuple[list[Episode], Any, Advantages]] = []
    compute = trainer._compute_advantages

    def listening(regime: Any, episodes: list[Episode]) -> Any:
        data = compute(regime, episodes)
        found.append((episodes, data.stats, data.advantages))
        return data

    trainer._compute_advantages = listening  # type: ignore[method-assign]
    return found


# --- the units of rewards


@pytest.mark.parametrize(
    ("algorithm", "ppo"),
    [
        ("ppo", {}),
        ("ppo", {"critic": "head", "critic_min_explained": -1.0, "value_clip_range": 0.2}),
        ("ppo", {"critic": "separate", "critic_min_explained": -1.0}),
        ({"name": "grpo", "group_size": 4}, {}),
    ],
)
def test_the_policy_learns_the_same_from_rewards_in_other_units(tiny_gpt2: Path, algorithm: Any, ppo: Any) -> None:
    """One hundred times the reward less seven, in three steps: what a score is worth is a matter of the others."""
    found = []
    for scale, shift in ((1.0, 0.0), (100.0, -7.0)):

        def scorer(batch: Sequence[Example], texts: Sequence[str], scale: float = scale, shift: float = shift) -> Any:
            return [Score(scale * s.value + shift) for s in coverage_score(batch, texts)]

        trainer = with_sgd(
            trainer_of(loaded_from(tiny_gpt2), algorithm, scorer=scorer, ppo={"minibatch_size": 4, "epochs": 2, **ppo})
        )
        start = parameters_of(trainer.model)[: sum(p.numel() for p in trainer.model.policy.parameters())].clone()
        rows = [trainer.step()[0] for _ in range(3)]
        moved = parameters_of(trainer.model)[: len(start)] - start
        found.append((moved, [row.get("value/explained_policy") for row in rows], rows[-1]["advantage/std"]))
    (one, explained, size), (other, explained_too, size_too) = found
    assert float(one.norm()) > 1e-2 and 0.1 < size < 10
    # grpo adds 1e-4 to the standard deviation, which is less to the larger one
    assert torch.allclose(one, other, atol=2e-4 if algorithm != "ppo" else 1e-5)
    assert size_too == pytest.approx(size, rel=1e-2 if algorithm != "ppo" else 1e-3)
    if algorithm == "ppo":
        assert explained_too == pytest.approx(explained, abs=1e-3)


@pytest.mark.parametrize(("name", "critics"), [("ppo", {"policy"}), ("lols", {"policy", "guide"}), ("rloo", set())])
def test_the_run_remembers_its_scores_and_those_of_each_critic(gpt2: Loaded, name: str, critics: set[str]) -> None:
    """Each critic's units come from the texts that it is fitted on, the advantages' spread from all."""
    parameters = {"lols": {"p_ppo_pp": 0.5}, "rloo": {"group_size": 4}}.get(name, {})
    trainer = trainer_of(gpt2, {"name": name, **parameters}, guide=guide() if name == "lols" else None)
    trainer.missing_eos_penalty = 0.25
    seen = recorded(trainer)
    expected: dict[str, list[float]] = {}
    for _ in range(4):
        trainer.step()
        episodes = seen[-1][0]
        for critic in critics:
            if values := [e.value for e in episodes if e.fits == critic]:
                expected[critic] = running_moments(expected.get(critic), values)
        expected["scores"] = running_moments(expected.get("scores"), [e.value for e in episodes])
        assert trainer.state.moments.keys() == expected.keys()
        for critic, moments in expected.items():
            assert trainer.state.moments[critic] == pytest.approx(moments)
            if critic != "scores":
                head = trainer.model.head(critic)
                assert float(head.mean) == pytest.approx(moments[1], abs=1e-6)
                assert float(head.unit) == pytest.approx(spread_of(moments) or 1.0)
    assert set(expected) == critics | {"scores"}


def test_behaviour_cloning_has_no_scores_to_remember(gpt2: Loaded) -> None:
    trainer = trainer_of(gpt2, "bc-guide", guide=guide())
    trainer.step()
    assert trainer.state.moments == {}


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_values_begin_at_the_mean_score_and_are_never_thrown_out_of_place(gpt2: Loaded, critic: str) -> None:
    """In the first step every value is the mean score; later the units change and the values stay."""
    trainer = trainer_of(gpt2, ppo={"critic": critic})
    seen = recorded(trainer)
    trainer.step()
    episodes, stats, _ = seen[0]
    batch = build_batch(episodes, trainer.spec.regimes[0], ["policy"], gpt2)
    assert torch.allclose(stats.values["policy"][batch.real], torch.tensor(fmean(e.value for e in episodes)))

    def values() -> torch.Tensor:
        with torch.no_grad():
            scored = trainer.model.forward_logprobs(
                batch.tokens, batch.real, temperature=1.0, min_new_tokens=0, values=["policy"]
            )
        return scored.values["policy"][batch.real]

    before, unit = values(), float(trainer.model.value_unit("policy"))
    for e in episodes:
        e.score = Score(40 * e.value - 3)
    calibrate_critics(trainer.model, trainer.state, ["policy"], trainer.spec.regimes[0], episodes)
    assert float(trainer.model.value_unit("policy")) > 5 * unit
    assert float(before.std()) > 1e-4 and torch.allclose(values(), before, atol=1e-4)


def test_advantages_are_divided_by_the_larger_spread_of_the_run_and_of_the_step(gpt2: Loaded) -> None:
    trainer = trainer_of(gpt2, kl={"coef": 0.3, "where": "reward"})
    scored = [
        Episode(i, prompts_for(gpt2, 4)[i].example, [5], i, "policy", [("policy", [7])], score=Score(float(i)))
        for i in range(4)
    ]
    assert trainer._advantage_inputs(scored).spread == 0.0  # nothing is known: nothing is divided
    for moments, spread in (([3.0, 2.0, 4.0 + 0.25], pstdev(range(4))), ([3.0, 2.0, 4.0 + 25.0], 5.0)):
        trainer.state.moments["scores"] = moments
        inputs = trainer._advantage_inputs(scored)
        assert inputs.spread == pytest.approx(spread)
        assert inputs.kl_coef == 0.3


# --- a critic that explains nothing does not steer


def test_a_critics_share_of_the_variance_is_followed_and_its_worst_steps_count_for_minus_one(gpt2: Loaded) -> None:
    trainer = trainer_of(gpt2, ppo={"critic_min_explained": 0.05})
    expected = 0.0
    for now in (0.4, -30.0, None, 0.9, 0.9, 0.9):
        trainer.optimizer.step()
        advantages = Advantages(torch.zeros(1), torch.zeros(1), {"policy": torch.zeros(1)})
        row = {} if now is None else {"value/explained_policy": now}
        episodes = [Episode(0, prompts_for(gpt2, 1)[0].example, [5], 0, "policy", [("policy", [7])])]
        trainer._advance(trainer.spec.regimes[0], episodes, advantages, row)
        if now is not None:
            expected = TRUST_MEMORY * expected + (1 - TRUST_MEMORY) * max(now, -1.0)
        assert trainer.state.explained["policy"] == pytest.approx(expected)
        assert trainer.critic.trusts(trainer.state, "policy") == (expected >= 0.05)
        assert trainer._advantage_inputs([]).trusted == ({"policy"} if expected >= 0.05 else set())
    assert (
        trainer.state.critic_steps == {"policy": 6}
        and 0.05 < expected < 0.9
        and not trainer.critic.trusts(trainer.state, "guide")
    )


@pytest.mark.parametrize(("explained", "trusted"), [(0.04, False), (0.06, True)])
def test_below_the_threshold_the_mean_score_is_the_baseline(gpt2: Loaded, explained: float, trusted: bool) -> None:
    trainer = trainer_of(gpt2, ppo={"advantage_scale": "none", "gae_lambda": 1.0})
    trainer.step()
    seen = recorded(trainer)
    trainer.state.explained["policy"] = explained
    row, episodes = trainer.step()
    _, stats, advantages = seen[0]
    assert row["value/trusted_policy"] == float(trusted)
    mean = fmean(e.value for e in episodes)
    for i, e in enumerate(episodes):
        baseline = stats.values["policy"][i, : e.length] if trusted else torch.full((e.length,), mean)
        assert torch.allclose(advantages.per_token[i, : e.length], e.value - baseline, atol=1e-5)


# --- the policy waits for its critic


@pytest.mark.parametrize(
    ("steps", "wanted", "done", "explained", "frozen"),
    [
        (0, None, 0, 0.0, False),
        (3, None, 2, 0.9, True),  # a number of steps, whatever the critic explains
        (3, None, 3, 0.0, False),
        (3, 0.5, 1, 0.4, True),
        (3, 0.5, 1, 0.5, False),
        (3, 0.5, 3, 0.4, False),  # and no longer than that
    ],
)
def test_the_policy_waits_so_many_steps_or_until_the_critic_explains_enough(
    gpt2: Loaded, steps: int, wanted: float | None, done: int, explained: float, frozen: bool
) -> None:
    trainer = trainer_of(gpt2)
    trainer.critic = CriticSettings(steps, wanted)
    trainer.state.critic_steps["policy"] = done
    trainer.state.explained["policy"] = explained
    assert trainer._update_settings(trainer.spec.regimes[0]).policy_frozen is frozen
    trainer.state.critic_steps, trainer.state.explained = {"guide": 99}, {"guide": 1.0}
    assert trainer._update_settings(trainer.spec.regimes[0]).policy_frozen is (steps > 0)  # another's does not count


def test_who_has_no_critic_waits_for_none(gpt2: Loaded) -> None:
    trainer = trainer_of(gpt2, {"name": "rloo", "group_size": 4}, ppo={"critic_warmup_steps": 5})
    assert not trainer._update_settings(trainer.spec.regimes[0]).policy_frozen


# --- where the KL is charged


@pytest.mark.parametrize("where", [None, "reward", "loss", "log"])
@pytest.mark.parametrize("name", ["ppo", "rloo"])
def test_the_kl_is_charged_in_one_place(gpt2: Loaded, name: str, where: str | None) -> None:
    """As a loss, where nothing else is said."""
    place = where or "loss"
    algorithm = {"name": "rloo", "group_size": 4} if name == "rloo" else "ppo"
    trainer = trainer_of(gpt2, algorithm, kl={"coef": 0.5, **({"where": where} if where else {})}, ppo={"epochs": 2})
    trainer.step()
    row, episodes = trainer.step()
    assert abs(row["kl/episode"]) > 1e-3 and row["kl/k3"] > 0  # it is measured everywhere
    charged = row["score/mean"] - row["reward/sum"]
    assert charged == pytest.approx(0.5 * row["kl/episode"] if place == "reward" else 0.0, abs=1e-5)
    assert ("loss/kl" in row) == (place == "loss")
    assert row["kl/coef"] == (0.0 if place == "log" else 0.5)
    assert row["score/mean"] == pytest.approx(fmean(e.value for e in episodes))


def test_a_kl_that_is_only_measured_changes_nothing(tiny_gpt2: Path) -> None:
    found = []
    for kl in ({"coef": 0.0}, {"coef": 0.5, "where": "log"}, {"coef": 0.0, "where": "log"}, {"coef": 0.5}):
        trainer = with_sgd(trainer_of(loaded_from(tiny_gpt2), kl=kl))
        rows = [trainer.step()[0] for _ in range(2)]
        found.append((parameters_of(trainer.model), {k for k in rows[-1] if k.startswith("kl/")}))
    plain, logged, logged_too, charged = found
    assert torch.equal(plain[0], logged[0]) and torch.equal(plain[0], logged_too[0])
    assert not torch.equal(plain[0], charged[0])
    assert plain[1] == {"kl/coef"} and logged[1] == logged_too[1] == {"kl/coef", "kl/mean", "kl/k3", "kl/episode"}


@pytest.mark.parametrize("algorithm", ["ppo", {"name": "grpo", "group_size": 4}, "bc-guide"])
def test_where_no_kl_is_charged_there_is_no_reference_and_none_is_run(
    gpt2: Loaded, algorithm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("a reference was run")

    monkeypatch.setattr(ActorCritic, "ref_logprobs", never)
    trainer = trainer_of(gpt2, algorithm, guide=guide() if algorithm == "bc-guide" else None, examined=True)
    assert trainer.model.ref_model is None and not trainer.model.has_ref_model
    row, _ = trainer.step()
    assert not {"kl/mean", "kl/k3", "kl/episode", "loss/kl"} & row.keys()
    assert all(math.isfinite(v) for v in row.values() if not isinstance(v, str))


@pytest.mark.parametrize("kl", [{"coef": 0.1}, {"coef": 0.0, "where": "log"}])
def test_a_kl_that_is_charged_or_measured_has_a_reference(gpt2: Loaded, kl: Any) -> None:
    assert trainer_of(gpt2, kl=kl).model.ref_model is not None
    cloned = trainer_of(gpt2, "bc-guide", guide=guide(), kl=kl)
    assert cloned.model.ref_model is None  # a likelihood is charged no KL


@pytest.mark.parametrize(("target", "error"), [(3.0, 0.2), (3.9, 4 / 3.9 - 1), (5.0, -0.2)])
def test_the_adaptive_coefficient_follows_the_kl_of_the_episode(gpt2: Loaded, target: float, error: float) -> None:
    """Not that of a token, and not k3."""
    kl = {"coef": 0.1, "adaptive": True, "target": target, "horizon": 400}
    trainer = trainer_of(gpt2, kl=kl)
    trainer.optimizer.step()
    advantages = Advantages(torch.zeros(1), torch.zeros(1), {})
    episodes = [Episode(i, prompts_for(gpt2, 1)[0].example, [5], i, "policy", [("policy", [7])]) for i in range(6)]
    trainer._advance(trainer.spec.regimes[0], episodes, advantages, {"kl/episode": 4.0, "kl/mean": 0.4, "kl/k3": 0.6})
    assert trainer.state.kl_coef == pytest.approx(0.1 * (1 + error * 6 / 400))
    fixed = trainer_of(gpt2, kl={"coef": 0.1, "target": target})
    fixed.optimizer.step()
    fixed._advance(fixed.spec.regimes[0], episodes, advantages, {"kl/episode": 4.0, "kl/mean": 0.4, "kl/k3": 0.6})
    assert fixed.state.kl_coef == 0.1
