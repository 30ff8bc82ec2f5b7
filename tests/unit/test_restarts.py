"""Where a guide's text is cut: the distributions by themselves, and in rollouts and steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms import spec_of
from rl import (
    ScriptedGuide,
    actor_critic,
    chi_square,
    generator_for,
    guide,
    loaded_from,
    prompts_for,
    token_batch,
    trainer_for,
)
from rlgf_cli import noise
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.training.episodes import Episode
from rlgf_cli.training.restarts import (
    FLOOR,
    Restarts,
    draw_cut,
    lowest_backward,
    uncertain_probabilities,
    uniform_from,
    values_along,
)

TEXT = "the cat sees the river it ."
"""Seven tokens of the tiny tokenizer; with EOS, L is 8."""
UNIFORM = Regime(roll_in="guide", rollin_prob=1.0)
BACKWARD = Regime(roll_in="guide", rollin_prob=1.0, restart="backward", restart_steps=10)
UNCERTAIN = Regime(roll_in="guide", rollin_prob=1.0, restart="uncertain")

draws = st.floats(0, 1, exclude_max=True)
lengths = st.integers(2, 400)


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2: Path) -> Loaded:
    return loaded_from(tiny_gpt2)


@pytest.fixture(scope="module", params=["gpt2", "t5"])
def several(request: pytest.FixtureRequest) -> Loaded:
    return loaded_from(request.getfixturevalue(f"tiny_{request.param}"))


# --- the distributions


@given(lengths, draws)
def test_uniform_is_the_formula_that_recorded_runs_were_made_with(length: int, draw: float) -> None:
    assert uniform_from(1, length, draw) == 1 + int(draw * (length - 1))
    assert 1 <= uniform_from(1, length, draw) <= length - 1


@given(lengths, st.integers(0, 300), st.integers(1, 200), draws)
def test_backward_starts_at_the_end_and_widens_to_the_beginning(length: int, age: int, steps: int, draw: float) -> None:
    lowest = lowest_backward(length, age, steps)
    assert 1 <= lowest <= uniform_from(lowest, length, draw) <= length - 1
    assert lowest_backward(length, age + 1, steps) <= lowest  # never back to the end
    assert lowest_backward(length, 0, steps) == length - 1
    if age >= steps:
        assert lowest == 1
    else:  # the share of the cuts that are open is the share of the steps that are done, rounded up to a cut
        share, cut = (length - lowest) / (length - 1), 1 / (length - 1)
        assert share - cut < age / steps + 1e-9 and (share >= age / steps - 1e-9)


def test_backward_by_hand() -> None:
    """Five tokens, four cuts, eight steps: a cut more every second step."""
    assert [lowest_backward(5, age, 8) for age in range(10)] == [4, 4, 4, 3, 3, 2, 2, 1, 1, 1]


values_of_texts = st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=50).map(np.array)


@given(values_of_texts, draws)
def test_uncertain_reaches_every_cut_and_no_other(values: np.ndarray, draw: float) -> None:
    probabilities = uncertain_probabilities(values)
    count = len(values) - 1
    assert probabilities.shape == (count,)
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities.min() >= FLOOR / count - 1e-12
    assert 1 <= draw_cut(probabilities, draw) <= count


def test_uncertain_by_hand() -> None:
    """L = 5. The third token moves the value by .3, the fourth by .1: cuts before them, k = 2 and 3, share .8 as 3 : 1.
    What the first token did (k = 0 is no cut) and the last (no value behind it) does not count."""
    found = uncertain_probabilities(np.array([0.9, 0.2, 0.2, 0.5, 0.6]))
    assert found == pytest.approx([0.05, 0.05 + 0.6, 0.05 + 0.2, 0.05])
    assert uncertain_probabilities(np.array([0.6, 0.5, 0.2, 0.2, 0.9])) == pytest.approx(
        [0.05 + 0.24, 0.05, 0.05 + 0.56, 0.05]
    )


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0], [0.0, 9.0, 9.0, 9.0]])
def test_a_critic_that_says_the_same_everywhere_leaves_the_cut_uniform(values: list[float]) -> None:
    assert uncertain_probabilities(np.array(values)).tolist() == pytest.approx([1 / 3] * 3)


def test_a_cut_is_drawn_with_its_probability() -> None:
    """Each cut's expected count is made equal by weighting; chi-square with four degrees of freedom, .999: 18.47."""
    probabilities = uncertain_probabilities(np.array([0.0, 0.1, 0.3, 0.25, 0.9, 0.9]))
    uniforms = noise.uniforms(20_000, 0, "test")
    counts = Counter(draw_cut(probabilities, draw) for draw in uniforms)
    expected = probabilities * len(uniforms)
    assert sum((counts[k] - e) ** 2 / e for k, e in enumerate(expected, 1)) < 18.47
    assert draw_cut(probabilities, 0.0) == 1 and draw_cut(probabilities, 1 - 2**-53) == 5
    assert draw_cut(np.array([0.5, 0.5]), 0.5) == 2  # an edge belongs to what is behind it: draws are in [0, 1)


# --- in rollouts


def plan_of(e: Episode, step: int = 0) -> list[float]:
    return noise.uniforms(4, 0, "plan", step, e.group).tolist()


def rolled(loaded: Loaded, regime: Regime, restarts: Restarts, count: int = 700, group_size: int = 1) -> list[Episode]:
    generator = generator_for(loaded, ScriptedGuide((TEXT, "stop")), max_new_tokens=9)
    generator.restarts = restarts
    prompts = prompts_for(loaded, count // group_size, repeat=group_size)
    return generator.generate(regime, prompts, 0, 9.0, group_size)


def test_without_a_curriculum_nothing_moved(gpt2: Loaded) -> None:
    """To the bit: the cut is this function of the episode's second uniform, as in every run so far."""
    for e in rolled(gpt2, UNIFORM, Restarts(age=3), 200):
        assert e.cut == 1 + int(plan_of(e)[1] * 7)


@pytest.mark.parametrize(
    ("age", "cuts"), [(0, [7]), (1, [7]), (2, [6, 7]), (5, [4, 5, 6, 7]), (9, [1, 2, 3, 4, 5, 6, 7])]
)
def test_backward_cuts_are_uniform_on_the_window(gpt2: Loaded, age: int, cuts: list[int]) -> None:
    """The largest .999 quantile among these (six degrees of freedom) is 22.46."""
    found = Counter(e.cut for e in rolled(gpt2, BACKWARD, Restarts(age=age)))
    assert sorted(found) == cuts
    assert chi_square([found[k] for k in cuts]) < 22.46


def test_after_its_steps_backward_is_uniform_to_the_bit(gpt2: Loaded) -> None:
    late, plain = (rolled(gpt2, r, Restarts(age=10), 60) for r in (BACKWARD, UNIFORM))
    assert [e.segments for e in late] == [e.segments for e in plain]


@pytest.mark.parametrize("age", [0, 4])
def test_a_group_shares_its_cut_whatever_it_follows(gpt2: Loaded, age: int) -> None:
    model = actor_critic(gpt2)
    along = Restarts(age=age, values=lambda texts: values_along(model, texts, 3))
    for regime in (BACKWARD, UNCERTAIN):
        episodes = rolled(gpt2, regime, along, 80, group_size=4)
        assert all(len({e.cut for e in episodes[i : i + 4]}) == 1 for i in range(0, 80, 4))
        assert all(e.cut > 0 for e in episodes)


def test_uncertain_cuts_follow_the_critic(several: Loaded) -> None:
    """Each text's values, scored alone and unpadded, give the cut: batches do not decide. And they are not uniform."""
    model = actor_critic(several)
    episodes = rolled(several, UNCERTAIN, Restarts(values=lambda texts: values_along(model, texts, 8)), 120)
    whole = [*several.text.encode_response(several.tokenizer, TEXT), several.eos_id]
    moved = 0
    for e in episodes:
        tokens = token_batch(several, [e.prompt_ids], [whole])
        with torch.no_grad():
            none = torch.zeros((1, len(whole)), dtype=torch.bool)
            scored = model.forward_logprobs(tokens, none, temperature=1.0, min_new_tokens=0, values=["policy"])
        values = scored.values["policy"][0].double().tolist()
        steps = [abs(b - a) for a, b in pairwise(values[1:])] + [0.0]
        edges = np.cumsum([FLOOR / len(steps) + (1 - FLOOR) * s / sum(steps) for s in steps])
        draw = plan_of(e)[1]
        if np.abs(edges - draw).min() > 1e-5:  # beside an edge, rounding decides
            assert e.cut == 1 + sum(draw >= edge for edge in edges)
        moved += e.cut != 1 + int(draw * (len(whole) - 1))
    assert moved > 30


def test_values_come_in_the_texts_order_and_see_no_token_ahead(several: Loaded) -> None:
    model = actor_critic(several)
    prompts = prompts_for(several, 4)
    ids = [*several.text.encode_response(several.tokenizer, TEXT), several.eos_id]

    def texts(sizes: Sequence[int]) -> list[Episode]:
        return [
            Episode(i, p.example, p.ids, i, "policy", [("guide", ids[:n])])
            for i, (p, n) in enumerate(zip(prompts, sizes, strict=True))
        ]

    short, long = values_along(model, texts([5, 2, 7, 3]), 3), values_along(model, texts([8] * 4), 8)
    assert [len(v) for v in short] == [5, 2, 7, 3]
    for a, b in zip(short, long, strict=True):
        assert a == pytest.approx(b[: len(a)], abs=1e-5)
    assert len({round(float(v[0]), 4) for v in long}) == 4  # each prompt has values of its own


# --- in steps


def cuts_of(episodes: list[Episode]) -> list[int]:
    return [e.cut for e in episodes]


def test_the_curriculum_moves_with_the_steps(gpt2: Loaded) -> None:
    own = {"rollin_prob": 1.0, "restart": "backward", "restart_steps": 4}
    trainer = trainer_for(gpt2, "ppo++", ScriptedGuide((TEXT, "stop")), parameters=own, episodes=12)
    for lowest in (7, 6, 4, 2, 1):
        _, episodes = trainer.step()
        assert lowest <= min(cuts_of(episodes)) <= max(cuts_of(episodes)) <= 7
        expected = [lowest + int(plan_of(e, trainer.state.step - 1)[1] * (8 - lowest)) for e in episodes]
        assert cuts_of(episodes) == expected


def test_after_a_switch_the_curriculum_begins_anew(gpt2: Loaded) -> None:
    own = {"switch_step": 3, "restart": "backward", "restart_steps": 2, "rollin_prob": 0.9}
    spec = spec_of("d2lols", own)
    assert [spec.age(step) for step in range(6)] == [0, 1, 2, 0, 1, 2]
    assert spec_of("lols", {"restart": "backward", "restart_steps": 2}).age(5) == 5
    trainer = trainer_for(gpt2, "d2lols", guide(), parameters=own)
    trainer.state.step = 3
    row, episodes = trainer.step()
    assert row["regime"] == "guide>policy"
    begun = [e for e in episodes if e.cut]
    text = gpt2.text
    wholes = [len(text.encode_response(gpt2.tokenizer, f" {e.example.prompt} it .")) + 1 for e in begun]
    assert begun and [e.cut for e in begun] == [min(12, whole) - 1 for whole in wholes]


def test_uncertain_uses_the_critic_as_it_is_now(gpt2: Loaded) -> None:
    """A value head starts at zero, so the first step's cuts are uniform; then it has learned something."""
    own: dict[str, Any] = {"rollin_prob": 0.9, "restart": "uncertain"}
    trainer = trainer_for(gpt2, "ppo++", ScriptedGuide((TEXT, "stop")), parameters=own, episodes=12, value_coef=5.0)
    moved = []
    for step in range(4):
        _, episodes = trainer.step()
        plain = [1 + int(plan_of(e, step)[1] * 7) for e in episodes]
        moved.append(sum(e.cut != k for e, k in zip(episodes, plain, strict=True) if e.cut))
    assert moved[0] == 0 and sum(moved[1:]) > 5
