"""What a policy sees of a chain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolving import BUILTIN
from rlgf_cli.evolve.environment import KEPT, Step
from rlgf_cli.evolve.features import TEXT_FEATURES, feature_names, features, text_features

NAMES = feature_names(BUILTIN)
STEP = Step("constraints", "old", "new text", KEPT, 0.25, None, 0.25, 1, None)


def seen(*steps: Step, prompt: str = "Name a colour.", horizon: int = 6) -> dict[str, float]:
    return dict(zip(NAMES, features(prompt, steps, BUILTIN, horizon).tolist(), strict=True))


def test_a_chain_that_has_not_begun():
    found = seen()
    assert {name for name, value in found.items() if value} == {"previous/none", "words", "sentences", "type_token"}
    assert found["words"] == pytest.approx(np.log(4) / 4)


def test_a_chain_by_hand():
    kept, lost = (
        replace(STEP, text="A b b? 12 of 3.\n- one\n- two"),
        replace(STEP, operation="reasoning", outcome="empty"),
    )
    found = seen(kept, kept, lost)
    assert {name: value for name, value in found.items() if value and "/" in name} == {
        "previous/reasoning": 1,
        "asked/constraints": pytest.approx(2 / 6),
        "asked/reasoning": pytest.approx(1 / 6),
        "held/constraints": pytest.approx(2 / 3),
    }
    assert (found["step"], found["rejected"], found["question"]) == (0.5, 1, 1)
    assert found["novelty"] == pytest.approx(0.25)  # of the instruction, which the rejected rewrite left alone
    assert found["numbers"] == pytest.approx(np.log(3) / 4)
    assert found["list_marks"] == pytest.approx(np.log(3) / 4)
    assert found["type_token"] == pytest.approx(7 / 8)


def test_breadth_begins_the_instruction_anew():
    wide = replace(STEP, operation="breadth")
    after = seen(STEP, STEP, wide, STEP)
    assert (after["held/constraints"], after["held/breadth"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert after["asked/constraints"] == pytest.approx(3 / 6)
    rejected = seen(STEP, STEP, replace(wide, outcome="duplicate"), STEP)
    assert (rejected["held/constraints"], rejected["held/breadth"]) == (pytest.approx(1), 0)


steps_drawn = st.lists(
    st.builds(
        Step,
        operation=st.sampled_from([operation.name for operation in BUILTIN]),
        instruction=st.text(),
        text=st.text(max_size=400),
        outcome=st.sampled_from([KEPT, "duplicate", "empty", "unanswered"]),
        novelty=st.none() | st.floats(0, 1),
        different=st.none(),
        reward=st.none(),
        queries=st.just(1),
        cost_usd=st.none(),
    ),
    max_size=12,
)


@given(st.text(max_size=400), steps_drawn, st.integers(1, 12))
def test_numbers_of_order_one_for_any_chain(prompt, steps, horizon):
    found = features(prompt, steps, BUILTIN, horizon)
    assert found.dtype == np.float32 and found.shape == (len(NAMES),) == (len(set(NAMES)),)
    assert np.isfinite(found).all() and (found >= 0).all() and (found <= 12).all()
    named = dict(zip(NAMES, found.tolist(), strict=True))
    assert sum(value for name, value in named.items() if name.startswith("previous/")) == 1
    asked = sum(value for name, value in named.items() if name.startswith("asked/"))
    assert asked * horizon == pytest.approx(len(steps), abs=1e-4)


@given(st.text(max_size=200), st.text(max_size=200))
def test_text_features_only_know_the_text(one, two):
    assert len(text_features(one)) == len(TEXT_FEATURES)
    assert text_features(one)[0] <= text_features(f"{one} {two}")[0] + 1e-12  # more text has no fewer words
