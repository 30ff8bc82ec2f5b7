"""The loop around the math: which prompts, when a critic is warm, what is carried on, what a row says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rl import ScriptedGuide, generator_for, guide, loaded_from, parameters_of, state_of, trainer_for
from rlgf_cli.config.train import KLConfig
from rlgf_cli.errors import RlgfError
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.prompts import Encoded
from rlgf_cli.protocols import Example, Score
from rlgf_cli.runs.metric_names import known
from rlgf_cli.training import loop
from rlgf_cli.training.advantages import AdvantageSettings
from rlgf_cli.training.divergence import HeldOutResult
from rlgf_cli.training.loop import Trainer
from rlgf_cli.training.prompts import step_prompts

ALGORITHMS = [
    "ppo", "ppo++", "aggrevated", "lols", "d2lols", "grpo", "rloo", "grpo++", "rloo++", "bc-guide", "dagger"
]  # fmt: skip


@pytest.fixture
def gpt2(tiny_gpt2: Path) -> Loaded:
    return loaded_from(tiny_gpt2)


def prompts_of(trainer: Trainer, step: int) -> list[Encoded]:
    size = trainer.spec.group_size
    return step_prompts(trainer.prompts, trainer.seed, step, groups=trainer.episodes // size, group_size=size)


def test_each_epoch_visits_every_prompt_once_in_an_order_of_its_own(gpt2: Loaded) -> None:
    """Twelve prompts, eight an iteration: three iterations are two epochs."""
    trainer = trainer_for(gpt2, "ppo")
    visited = [p.example.id for step in range(6) for p in prompts_of(trainer, step)]
    epochs = [visited[i : i + 12] for i in range(0, 48, 12)]
    assert all(len(set(epoch)) == 12 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [p.example.id for p in prompts_of(trainer_for(gpt2, "ppo"), 4)] == visited[32:40]


def test_a_group_is_one_prompt_repeated(gpt2: Loaded) -> None:
    trainer = trainer_for(gpt2, "rloo", parameters={"group_size": 4}, episodes=8)
    first, second = prompts_of(trainer, 0)[:4], prompts_of(trainer, 0)[4:]
    assert len({p.example.id for p in first}) == len({p.example.id for p in second}) == 1
    ids = [p.example.id for step in range(6) for p in prompts_of(trainer, step)]
    assert set(Counter(ids).values()) == {4}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_figure_of_a_row_is_known_and_finite(gpt2: Loaded, name: str) -> None:
    parameters = {"switch_step": 1} if name == "d2lols" else {"group_size": 4} if name[0] in "gr" else {}
    trainer = trainer_for(gpt2, name, guide(), parameters=parameters, kl_coef=0.1, entropy_coef=0.01, reference_nll=0.1)
    for step in range(2):
        row, episodes = trainer.step()
        assert row["step"] == step + 1 == trainer.state.step
        for key, value in row.items():
            assert known(key), key
            assert isinstance(value, str) or math.isfinite(value), key
        assert row["episodes"] == len(episodes) == 8
        assert row["score/mean"] == pytest.approx(sum(e.value for e in episodes) / 8)
    assert not known("score/meen")


@pytest.mark.parametrize("is_watched", [False, True])
def test_the_first_row_has_the_held_out_figures_before_the_first_step(gpt2: Loaded, is_watched: bool) -> None:
    trainer = trainer_for(gpt2, "ppo")

    def evaluate() -> HeldOutResult:
        score = float(parameters_of(trainer.model).sum())
        return HeldOutResult({"eval/score": score, "eval/score_error": 0.5}, {"a": score, "b": score}, watched(score))

    def watched(score: float) -> dict[str, float] | None:
        return {"a": score + 1, "b": score + 3} if is_watched else None

    trainer.evaluate = evaluate
    before = evaluate().figures["eval/score"]
    (first, _), (second, _) = trainer.step(), trainer.step()
    assert (first["eval/start"], first["eval/start_error"]) == (before, 0.5) and first["eval/score"] != before
    assert first.get("eval/start_watch") == (pytest.approx(before + 2) if is_watched else None)
    assert not {key for key in second if key.startswith("eval/start")}
    assert all(known(key) for key in first)


@pytest.mark.parametrize(("name", "frozen"), [("ppo", [1, 1, 0, 0, 0]), ("d2lols", [1, 1, 0, 1, 1]), ("grpo", [0] * 5)])
def test_the_policy_waits_until_its_critic_is_warm(gpt2: Loaded, name: str, frozen: list[int]) -> None:
    """At d2lols's switch (after three steps) another critic takes over, and it starts cold."""
    own: dict[str, dict[str, Any]] = {"d2lols": {"switch_step": 3, "cut_horizon": 2}, "grpo": {"group_size": 4}}
    parameters = own.get(name, {})
    trainer = trainer_for(gpt2, name, guide(), parameters=parameters, warmup=2)
    for expected in frozen:
        before = state_of(trainer.model.policy)
        row, _ = trainer.step()
        after = state_of(trainer.model.policy)
        assert row["update/policy_frozen"] == expected
        assert all(torch.equal(before[n], after[n]) for n in before) == bool(expected)


def test_the_horizon_follows_the_lengths(gpt2: Loaded) -> None:
    trainer = trainer_for(gpt2, "aggrevated", guide())
    for _ in range(2):
        before = trainer.state.typical_length
        row, episodes = trainer.step()
        assert row["length/horizon"] == before
        assert trainer.state.typical_length == pytest.approx(0.9 * before + 0.1 * sum(e.length for e in episodes) / 8)


def test_the_adaptive_coefficient_is_moved_by_what_was_logged(gpt2: Loaded) -> None:
    trainer = trainer_for(gpt2, "ppo", kl_coef=0.1, learning_rate=5e-2)
    trainer.kl = KLConfig(coef=0.1, adaptive=True, target=0.01, horizon=100)
    trainer.step()
    row, _ = trainer.step()
    third, _ = trainer.step()
    assert row["kl/episode"] > 0.02
    assert third["kl/coef"] == pytest.approx(row["kl/coef"] * (1 + 0.2 * 8 / 100))


def test_a_text_without_eos_pays_the_penalty_and_the_log_shows_it(gpt2: Loaded) -> None:
    trainer = trainer_for(gpt2, "ppo")
    free, _ = trainer.step()
    again = trainer_for(gpt2, "ppo")
    again.missing_eos_penalty = 0.5
    again.prompts, again.state.step = trainer.prompts, 1
    row, episodes = again.step()
    cut = sum(not e.finished for e in episodes)
    assert cut and row["length/truncated"] == cut / 8
    assert row["score/mean"] == pytest.approx(sum(e.score.value for e in episodes if e.score) / 8 - 0.5 * cut / 8)
    assert row["reward/sum"] == pytest.approx(row["score/mean"], abs=1e-5)
    assert free["score/mean"] > row["score/mean"]


def test_a_part_that_only_some_texts_have_is_averaged_over_those(gpt2: Loaded) -> None:
    def scorer(batch: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        return [Score(0.1, {"odd": 4.0} if i % 4 == 1 else {}) for i in range(len(texts))]

    row, _ = trainer_for(gpt2, "ppo", scorer=scorer).step()
    assert row["score/part/odd"] == 4.0


@pytest.mark.parametrize("name", ["aggrevated", "ppo++", "bc-guide", "grpo"])
def test_accumulation_gives_the_whole_minibatchs_update(tiny_gpt2: Path, name: str) -> None:
    """Parts with few or no learned tokens count for what they hold."""
    found = []
    for parts, tokens in ((1, None), (4, None), (3, None), (1, 30), (2, 45)):
        parameters = {"group_size": 4} if name == "grpo" else {}
        trainer = trainer_for(
            loaded_from(tiny_gpt2), name, guide(), parameters=parameters, kl_coef=0.1, learning_rate=1e-3,
            minibatch_size=8, accumulation=parts, max_tokens=tokens, entropy_coef=0.01, reference_nll=0.1, epochs=2,
        )  # fmt: skip
        # Adam divides a gradient by its size: where it is only rounding, that is no longer small
        trainer.optimizer = torch.optim.SGD([p for _, p in trainer.model.trainable()], lr=0.1)
        trainer.scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, factor=1.0)
        row, _ = trainer.step()
        figures = {k: v for k, v in row.items() if not k.startswith("time/") and k != "regime"}
        found.append((parameters_of(trainer.model), figures))
    for other, row in found[1:]:
        assert torch.allclose(other, found[0][0], atol=1e-5)
        assert row == pytest.approx(found[0][1], rel=1e-4, abs=1e-5)


def count_passes(trainer: Trainer) -> list[bool]:
    """For each later pass of the policy, whether it has a gradient."""
    passes: list[bool] = []
    score = trainer.model.forward_logprobs

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(torch.is_grad_enabled())
        return score(*args, **kwargs)

    trainer.model.forward_logprobs = counted  # type: ignore[method-assign]
    return passes


@pytest.mark.parametrize(("name", "estimator"), [("grpo", "k1"), ("grpo", "k3"), ("rloo", "k2")])
def test_the_update_gives_the_old_log_probabilities_where_every_ratio_is_one(
    tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch, name: str, estimator: Any
) -> None:
    """Against the same run that computes them before the update; from the second step on, one pass fewer."""
    found = []
    for deferred in (True, False):
        if not deferred:
            monkeypatch.setattr(loop, "update_gives_old_logprobs", lambda *_: False)
        trainer = trainer_for(
            loaded_from(tiny_gpt2), name, parameters={"group_size": 4}, kl_coef=0.1, learning_rate=1e-3,
            minibatch_size=8, max_tokens=60, kl_estimator=estimator,
        )  # fmt: skip
        trainer.optimizer = torch.optim.SGD([p for _, p in trainer.model.trainable()], lr=0.1)
        trainer.scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, factor=1.0)
        passes = count_passes(trainer)
        rows = [trainer.step()[0] for _ in range(3)]
        rows = [{k: v for k, v in row.items() if not k.startswith("time/") and k != "regime"} for row in rows]
        found.append((parameters_of(trainer.model), rows, passes.count(False)))
    (weights, rows, before), (others, other_rows, computed) = found
    assert before * 3 == computed > 0  # in the first step alone
    assert torch.allclose(weights, others, atol=1e-6)
    for row, other in zip(rows, other_rows, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert rows[2]["kl/mean"] != 0 and rows[2]["policy/entropy"] > 1


@pytest.mark.parametrize(
    ("name", "parameters", "changes"),
    [
        ("grpo", {"group_size": 4}, {"epochs": 2}),
        ("grpo", {"group_size": 4}, {"minibatch_size": 4}),
        ("grpo", {"group_size": 4}, {"mask_truncated": True}),
        ("rloo", {"group_size": 4}, {"kl_coef": 0.1, "kl_where": "reward"}),
        ("ppo", {}, {}),
    ],
)
def test_old_log_probabilities_are_computed_before_the_update_where_it_needs_them(
    gpt2: Loaded, name: str, parameters: dict[str, Any], changes: dict[str, Any]
) -> None:
    trainer = trainer_for(gpt2, name, parameters=parameters, **{"minibatch_size": 8, **changes})
    trainer.step()
    passes = count_passes(trainer)
    trainer.step()
    assert passes[0] is False


def test_a_gradient_that_is_not_finite_stops_the_run_with_the_weights_as_they_were(gpt2: Loaded) -> None:
    trainer = trainer_for(gpt2, "ppo")
    before = parameters_of(trainer.model)
    trainer.advantage = AdvantageSettings(scale="none")
    trainer.scorer = lambda batch, texts: [Score(1e38 * (i % 2)) for i in range(len(texts))]
    with pytest.raises(RlgfError, match="step 1 is not finite"):
        trainer.step()
    assert torch.equal(before, parameters_of(trainer.model))


def test_behaviour_cloning_of_short_texts_is_finite_whatever_the_policy_may_sample(gpt2: Loaded) -> None:
    """The guide may end before the policy is allowed to: its EOS has a likelihood all the same."""
    trainer = trainer_for(gpt2, "bc-guide", ScriptedGuide(("the cat", "stop")))
    trainer.generator = generator_for(gpt2, ScriptedGuide(("the cat", "stop")), min_new_tokens=10, temperature=0.5)
    row, episodes = trainer.step()
    assert {e.length for e in episodes} == {3}
    assert math.isfinite(row["loss/likelihood"]) and row["tokens/learned"] == 24


def test_behaviour_cloning_learns_the_guides_text(gpt2: Loaded) -> None:
    trainer = trainer_for(gpt2, "bc-guide", ScriptedGuide(("the cat sees it .", "stop")), epochs=4)
    rows = [trainer.step()[0]["loss/likelihood"] for _ in range(6)]
    assert 0 < rows[-1] < 0.3 * rows[0]


@pytest.mark.parametrize("name", ["ppo", "aggrevated", "bc-guide"])
def test_the_first_step_is_examined_before_anything_is_learned(gpt2: Loaded, name: str) -> None:
    """And its entropy is estimated from the log-probabilities of the policy's own tokens."""
    trainer = trainer_for(gpt2, name, guide(), kl_coef=0.3, kl_where="reward")
    before, seen = parameters_of(trainer.model), []

    def probe(episodes: Any, data: Any, kl_coef: float) -> None:
        assert torch.equal(before, parameters_of(trainer.model))
        drawn = None if data.stats is None else [float(p) for p in data.stats.old_logprobs[data.batch.policy]]
        seen.append((len(episodes), kl_coef, drawn))

    trainer.probe = probe
    row, _ = trainer.step()
    trainer.step()
    ((count, kl_coef, drawn),) = seen
    assert (count, kl_coef) == (8, 0.3) and row["time/check"] >= 0
    if drawn is None:
        assert name == "bc-guide" and "policy/entropy" not in row
    else:
        assert row["policy/entropy"] == pytest.approx(-sum(drawn) / len(drawn), rel=1e-4) and row["policy/entropy"] > 0
