"""Restarts of failed groups alone, and the lengths of prefixes that change over a run."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import binom, chisquare

from algorithms import spec_of
from rl import ScriptedGuide, loaded_from, prompts_for, trainer_for
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.protocols import Score
from rlgf_cli.training.episodes import Episode
from rlgf_cli.training.loop import Trainer
from rlgf_cli.training.restarts import SLICES, Restarts, cosine_share, drawn_slices, steered_share

TEXT = "the dog finds the ball in the house"


@pytest.fixture
def gpt2(tiny_gpt2: Path) -> Loaded:
    return loaded_from(tiny_gpt2)


# --- lengths


@pytest.mark.parametrize("age", [0, 90, 200, 299])
def test_ufts_slices_are_binomial(age: int) -> None:
    """Chi-square of 20,000 draws against Binomial(5, p(t)), p(t) = .05 + .45 (1 + cos(pi t / T))."""
    p = 0.05 + 0.45 * (1 + math.cos(math.pi * age / 300))
    draws = (np.arange(20_000) + 0.5) / 20_000
    counts = Counter(drawn_slices(cosine_share(age, 300), float(d)) for d in draws)
    expected = binom.pmf(range(SLICES + 1), SLICES, p) * 20_000
    common = [i for i in range(SLICES + 1) if expected[i] > 5]
    found = np.array([counts[i] for i in common], dtype=float)
    assert chisquare(found, expected[common] * found.sum() / expected[common].sum()).pvalue > 0.9
    assert sum(counts.values()) == 20_000 and set(counts) <= set(range(SLICES + 1))


def whole_text(length: int) -> Episode:
    return Episode(0, prompts_for_none(), [1], 0, "policy", [("guide", list(range(length)))])


def prompts_for_none() -> Any:
    from rlgf_cli.protocols import Example

    return Example("x", "x")


@pytest.mark.parametrize(("restart", "age", "draw", "kept"), [
    ("slices", 0, 0.999, 9),  # all five slices, but never the EOS
    ("slices", 299, 0.5, 0),
    ("annealed", 0, 0.3, 9),
    ("annealed", 150, 0.3, 5),
    ("annealed", 300, 0.3, 1),
    ("annealed", 999, 0.3, 1),
])  # fmt: skip
def test_the_kept_part_over_a_run(restart: Any, age: int, draw: float, kept: int) -> None:
    regime = Regime(roll_in="guide", rollin_prob=1.0, restart=restart, restart_steps=300)
    assert Restarts(age=age).cuts(regime, [whole_text(10)], [draw]) == {0: kept}


def test_after_its_hints_uft_asks_no_guide(gpt2: Loaded) -> None:
    guide = ScriptedGuide((TEXT, "stop"), live=False)
    trainer = trainer_for(gpt2, "uft", guide, parameters={"group_size": 4, "hint_steps": 1})
    rows = [trainer.step()[0] for _ in range(2)]
    assert len(guide.asked) == 2 and [row["rollin/share"] > 0 for row in rows] == [True, False]
    assert "loss/guide_nll" in rows[0] and "loss/guide_nll" not in rows[1]


def test_a_steered_share_follows_the_success(gpt2: Loaded) -> None:
    """More of the guide's text where few succeed behind it, less where many do."""
    shares = {}
    for score in (0.0, 1.0):
        regime = Regime(
            roll_in="guide",
            rollin_prob=1.0,
            restart="steered",
            target_success=0.3,
            estimator="group_mean",
            group_size=4,
        )
        guide = ScriptedGuide((TEXT, "stop"), live=False)
        trainer = with_regime(trainer_for(loaded_again(gpt2), "grpo++", guide, scorer=constant(score)), regime)
        _, episodes = trainer.step()
        length = len(prompts_ids(gpt2, TEXT)) + 1
        assert {e.cut for e in episodes} == {round(0.5 * length)}
        shares[score] = trainer.state.guide_share
    assert shares == pytest.approx({0.0: 0.5 + 0.1 * 0.3, 1.0: 0.5 - 0.1 * 0.7})
    assert steered_share(0.94, [], 0.5, 0.0) == 0.94


# --- failed groups


def loaded_again(loaded: Loaded) -> Loaded:
    return loaded_from(Path(loaded.model.config.name_or_path))


def prompts_ids(loaded: Loaded, text: str) -> list[int]:
    return loaded.text.encode_response(loaded.tokenizer, text)


def constant(score: float) -> Any:
    return lambda examples, texts: [Score(score) for _ in texts]


def with_regime(trainer: Trainer, regime: Regime) -> Trainer:
    trainer.spec = trainer.spec.model_copy(update={"regimes": (regime,)})
    return trainer


def where_told(successes: set[int]) -> Any:
    """Of the texts of the first call, those at these places score 1, every later one 0.5 and 0 in turn."""
    calls: list[int] = []

    def score(examples: Any, texts: Any) -> list[Score]:
        calls.append(len(texts))
        if len(calls) == 1:
            return [Score(float(i in successes)) for i in range(len(texts))]
        return [Score(0.5 * (i % 2)) for i in range(len(texts))]

    score.calls = calls  # type: ignore[attr-defined]
    return score


def failing_step(
    loaded: Loaded, algorithm: str, scorer: Any, **parameters: Any
) -> tuple[Trainer, Any, list[Episode], Any]:
    guide = ScriptedGuide((TEXT, "stop"), live=False)
    own = {"group_size": 4, "restarted": 2, **parameters}
    trainer = trainer_for(loaded, algorithm, guide, parameters=own, scorer=scorer)
    row, episodes = trainer.step()
    return trainer, row, episodes, guide


def test_only_failed_groups_begin_again(gpt2: Loaded) -> None:
    scorer = where_told({1})  # the second of the two groups of four failed
    _, row, episodes, guide = failing_step(gpt2, "on-failure", scorer, longest_prefix=0.5)
    assert [r.example.id for r in guide.asked] == [episodes[4].example.id] and scorer.calls == [8, 2]
    begun = [e for e in episodes if e.cut > 0]
    assert [e.index for e in begun] == [6, 7] and len({e.group for e in episodes}) == 3
    whole = [*prompts_ids(gpt2, TEXT), gpt2.eos_id]
    for e in begun:
        assert e.ids[: e.cut] == whole[: e.cut] and 1 <= e.cut <= 0.5 * (len(whole) - 1)
        assert e.group == begun[0].group and e.segments[0][0] == "guide"
    assert begun[0].ids != begun[1].ids, "each has draws of its own"
    assert (row["guide/failed_groups"], row["rollout/rewritten"], row["episodes"]) == (1, 2, 8)
    assert row["rollin/share"] == 2 / 8


def test_the_first_texts_are_plain_grpos(gpt2: Loaded) -> None:
    _, _, episodes, _ = failing_step(gpt2, "on-failure", where_told({1}))
    plain = trainer_for(loaded_again(gpt2), "grpo", parameters={"group_size": 4}, scorer=where_told({1}))
    _, others = plain.step()
    assert [e.ids for e in episodes[:6]] == [e.ids for e in others[:6]]
    assert [e.ids for e in episodes[6:]] != [e.ids for e in others[6:]]


@pytest.mark.parametrize("joined", [False, True])
def test_the_baseline_of_what_begins_again(gpt2: Loaded, joined: bool) -> None:
    """A group of their own, or the failed group with them in it."""
    guide = ScriptedGuide((TEXT, "stop"), live=False)
    rule = {"restarted": 2, "joined": joined}
    regime = Regime.model_validate({"estimator": "group_mean", "group_size": 4, "on_failure": rule})
    trainer = trainer_for(gpt2, "grpo", guide, parameters={"group_size": 4}, scorer=where_told({1}))
    seen: list[Any] = []
    compute = trainer._compute_advantages
    trainer._compute_advantages = lambda r, e: seen.append(compute(r, e)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    _, episodes = with_regime(trainer, regime).step()
    advantages = seen[0].advantages.per_token
    values = [float(advantages[i][seen[0].batch.learned[i]][0]) for i in range(8)]
    scores = [e.value for e in episodes[4:]]
    assert scores == [0.0, 0.0, 0.0, 0.5]
    counted = scores if joined else scores[2:]
    spread = (sum((s - fmean(counted)) ** 2 for s in counted) / (len(counted) - 1)) ** 0.5 + 1e-4
    expected = [(s - fmean(counted)) / spread if joined or i > 1 else 0.0 for i, s in enumerate(scores)]
    assert values[4:] == pytest.approx(expected, abs=1e-5)


def test_nothing_fails_and_nothing_is_asked(gpt2: Loaded) -> None:
    _, row, episodes, guide = failing_step(gpt2, "on-failure", where_told({0, 4}))
    assert not guide.asked and not any(e.cut for e in episodes) and row["guide/failed_groups"] == 0


def test_a_group_without_a_guide_text_keeps_its_own(gpt2: Loaded) -> None:
    guide = ScriptedGuide(("", "stop"), live=False)
    trainer = trainer_for(gpt2, "on-failure", guide, parameters={"group_size": 4, "restarted": 2}, scorer=constant(0.0))
    row, episodes = trainer.step()
    assert len(guide.asked) == 2 and row["rollout/rewritten"] == 0 and len({e.group for e in episodes}) == 2


def test_pope_begins_behind_the_guide_where_the_record_says_failed(gpt2: Loaded) -> None:
    """No text is written twice: the first visit of a prompt is unguided, and a success ends the hints."""
    guide = ScriptedGuide((TEXT, "stop"), live=False)
    outcome = {"score": 0.0}
    trainer = trainer_for(
        gpt2, "pope", guide, parameters={"group_size": 4, "restarted": 2},
        scorer=lambda e, t: [Score(outcome["score"]) for _ in t],
    )  # fmt: skip
    trainer.prompts = prompts_for(gpt2, 2)
    shares = []
    for score in (0.0, 1.0, 1.0):
        outcome["score"] = score
        row, episodes = trainer.step()
        shares.append(row["rollin/share"])
        assert len(episodes) == 8 and "rollout/rewritten" not in row
    assert shares == [0.0, 0.5, 0.0] and len(guide.asked) == 2


@pytest.mark.parametrize(("values", "words"), [
    ({"estimator": "gae", "group_size": 1}, "for groups"),
    ({"roll_in": "guide"}, "roll_in: none"),
    ({"on_failure": {"restarted": 5}}, "divides a group of 4"),
    ({"on_failure": {"restarted": 3}}, "two episodes or none"),
    ({"on_failure": {"restarted": 1}}, "two episodes or none"),
    ({"guide_term": {"tokens": "beside"}, "on_failure": {"restarted": 2}}, "exclude each other"),
])  # fmt: skip
def test_rules_that_cannot_work(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Regime.model_validate({"estimator": "group_mean", "group_size": 4, "on_failure": {"restarted": 2}, **values})


def test_one_episode_that_joins_its_failed_group() -> None:
    """Scaf-GRPO's replacement is a line in a recipe."""
    rule = {"restarted": 1, "joined": True}
    regime = {"estimator": "group_mean", "group_size": 8, "on_failure": rule}
    assert Regime.model_validate(regime).needs_guide and spec_of("on-failure").needs_guide
