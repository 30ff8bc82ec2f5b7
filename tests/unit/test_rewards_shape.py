"""Penalties on length and form, and weights and targets that move while a policy is trained."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgf_cli.config.common import PartConfig
from rlgf_cli.config.loader import resolve
from rlgf_cli.config.train import TrainConfig
from rlgf_cli.errors import UserError
from rlgf_cli.failures.rules import RULES
from rlgf_cli.protocols import Example, Score
from rlgf_cli.scorers.base import signature_of
from rlgf_cli.scorers.length import FORMS, Length
from rlgf_cli.scorers.schedule import LinearSchedule
from rlgf_cli.scorers.weighted_sum import SumReward, make_reward

TEN = Example("ten", "one two three four five six seven eight nine ten", ("a b c", "a b c d e"))
BARE = Example("bare", "one two")


def reward(name: str, **given: Any) -> SumReward:
    params = {key: value for key, value in given.items() if not key.startswith("weight")}
    return make_reward([PartConfig(name=name, params=params, **{k: v for k, v in given.items() if k not in params})])


def cost(count: int, example: Example = TEN, **params: Any) -> float:
    (score,) = reward("length", **params).score([example], ["w " * count])
    return -score.value


# --- length


@pytest.mark.parametrize(
    ("params", "counts"),
    [
        ({"ratio": 0.4}, {3: 1, 4: 0, 6: 2}),  # of the prompt's ten words
        ({"ratio": 0.4, "to": "prompt"}, {3: 1, 4: 0, 6: 2}),
        ({"ratio": 1, "to": "reference"}, {3: 1, 4: 0, 5: 1}),  # of the references' mean of four
        ({"ratio": 0.25, "tolerance": 0.0}, {1: 1, 2: 0, 3: 0, 4: 1}),  # 2.5 words: two and three are right
        ({"target": 10, "tolerance": 0.2}, {7: 1, 8: 0, 12: 0, 13: 1}),
        ({"target": 10, "cap": 3}, {0: 3, 7: 3, 8: 2, 99: 3}),
        ({"max_words": 4, "form": "quadratic"}, {1: 0, 4: 0, 6: 0.25, 8: 1}),
        ({"min_words": 4, "form": "quadratic"}, {9: 0, 2: 0.25, 1: 0.5625, 0: 0.5625}),
        ({"target": 4, "form": "log_ratio"}, {4: 0, 8: math.log(2), 2: math.log(2), 0: math.log(4)}),
        ({"max_words": 0, "form": "log_ratio"}, {0: 0, 1: 0, 3: math.log(3)}),
        ({"target": 4, "form": "log_ratio", "cap": 0.1}, {4: 0, 8: 0.1}),
    ],
)  # fmt: skip
def test_what_a_length_costs(params: dict[str, Any], counts: dict[int, float]) -> None:
    assert {count: cost(count, **params) for count in counts} == pytest.approx(counts)


def test_a_share_of_the_prompt_is_not_moved_by_rounding() -> None:
    example = Example("x", "w " * 100)
    assert 0.07 * 100 > 7
    assert [cost(n, example, ratio=0.07) for n in (6, 7, 8)] == [1, 0, 1]


@given(
    form=st.sampled_from(list(FORMS)),
    target=st.floats(0.5, 60),
    tolerance=st.floats(0, 0.9),
    counts=st.lists(st.integers(0, 200), min_size=2, max_size=2),
)
def test_going_further_off_never_costs_less(form: str, target: float, tolerance: float, counts: list[int]) -> None:
    penalty = Length(target=target, tolerance=tolerance, form=form)  # type: ignore[arg-type]
    near, far = sorted(counts, key=lambda n: abs(n - target))
    scores = penalty.score([BARE, BARE], ["w " * near, "w " * far])
    assert all(score.value <= 0 for score in scores)
    if (near - target) * (far - target) > 0:  # on one side
        assert scores[1].value <= scores[0].value
    assert penalty.score([BARE], ["w " * round(target)])[0].value == 0


def test_a_target_that_differs_is_logged_and_a_plain_one_is_not() -> None:
    assert reward("length", ratio=0.4).score([TEN], ["w"])[0].parts == {"length": -3, "length.target": 4}
    assert reward("length", target=4).score([TEN], ["w"])[0].parts == {"length": -3}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"target": 4, "ratio": 0.2}, "not both"),
        ({"ratio": 0.2, "max_words": 3}, "not both"),
        ({"target": 4, "to": "prompt"}, "what a ratio is of"),
        ({"max_words": 4, "tolerance": 0.1}, "for target and ratio"),
        ({"max_words": 4, "start": 1, "steps": 2}, "for target and ratio"),
        ({"target": 4, "start": 1}, "go together"),
        ({"target": 4, "steps": 5}, "go together"),
        ({"target": 4, "form": "cubic"}, "'form'"),
        ({"ratio": 0}, "'ratio'"),
        ({"ratio": 0.2, "to": "guide"}, "'to'"),
        ({"target": 4, "cap": 0}, "'cap'"),
    ],
)
def test_a_length_that_makes_no_sense_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        reward("length", **params)
    assert message in caught.value.message


def test_a_ratio_to_the_reference_needs_references() -> None:
    with pytest.raises(UserError, match="needs references; 1 of 2"):
        reward("length", ratio=1.0, to="reference").check([TEN, BARE])
    reward("length", ratio=1.0).check([TEN, BARE])


def test_signatures_tell_every_setting_apart() -> None:
    settings: list[dict[str, Any]] = [
        {"target": 4}, {"target": 5}, {"ratio": 4}, {"ratio": 4, "to": "reference"}, {"target": 4, "tolerance": 0.1},
        {"target": 4, "form": "quadratic"}, {"target": 4, "cap": 2}, {"target": 4, "start": 9, "steps": 10},
        {"target": 4, "start": 8, "steps": 10}, {"target": 4, "start": 9, "steps": 11}, {"max_words": 4},
        {"target": 4, "weight": 0.5}, {"target": 4, "weight_start": 0, "weight_steps": 5},
    ]  # fmt: skip
    assert len({signature_of(reward("length", **given)) for given in settings}) == len(settings)
    assert signature_of(reward("length", target=4, start=9, steps=10)) == "1*[length,rule=1,target=9..4/10,tolerance=0]"


# --- endings and failures


def test_an_ending_that_is_missing_costs_one() -> None:
    texts = ["It ends.", 'He said "no!"', "What (then?)", "It does not", "", "so: ", "1."]
    assert [s.value for s in reward("ending").score([BARE] * 7, texts)] == [0, 0, 0, -1, -1, -1, 0]


def test_failures_are_counted_and_logged_by_rule() -> None:
    (bad,) = reward("failures").score([TEN], ["w w w w w w w w w w w w"])
    found = {name: bad.parts[f"failures.{name}"] for name in RULES}
    assert found == {"empty": 0, "loops": 1, "unfinished": 1, "copied": 0, "overlong": 1}
    assert bad.value == bad.parts["failures"] == -3
    assert reward("failures").score([TEN], ["A b c d."])[0].value == 0
    assert reward("failures", share=True).score([TEN], ["w w w w w w w w w w w w"])[0].value == pytest.approx(-3 / 5)
    (some,) = reward("failures", rules=["loops", "empty"]).score([TEN], ["w w w w w w w w w w w w"])
    assert some == Score(-1, {"failures": -1, "failures.loops": 1, "failures.empty": 0})


def test_a_text_without_a_reference_is_never_too_long() -> None:
    assert reward("failures", rules=["overlong"]).score([BARE], ["word " * 500])[0].value == 0
    assert reward("failures", rules=["overlong"]).score([TEN], ["word " * 11])[0].value == -1
    assert reward("failures", rules=["overlong"]).score([TEN], ["word " * 5])[0].value == 0  # the longest reference's


@pytest.mark.parametrize(("rules", "message"), [(["loop"], "unknown rule 'loop'"), ([], "needs a rule")])
def test_rules_that_are_not_there_are_refused(rules: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        reward("failures", rules=rules)
    assert message in caught.value.message and "loops" in (caught.value.hint or "")


# --- what moves


@given(st.floats(-9, 9), st.floats(-9, 9), st.integers(1, 300))
def test_a_ramp_goes_in_equal_steps_and_stays(start: float, end: float, steps: int) -> None:
    schedule = LinearSchedule(end, start, steps)
    seen = [schedule.at(step) for step in range(steps + 3)]
    assert seen[0] == start and seen[steps:] == [end] * 3 == [schedule.at(None)] * 3
    strides = [b - a for a, b in pairwise(seen[: steps + 1])]
    assert strides == pytest.approx([(end - start) / steps] * steps, abs=1e-9)


def test_a_weight_moves_and_its_part_is_logged_raw() -> None:
    total = reward("length", target=4, weight=1.0, weight_start=0.0, weight_steps=4)
    assert total.moves
    scores = {step: total.at(step).score([TEN], ["w w"])[0] for step in (0, 1, 2, 4, 99)}
    assert {step: score.value for step, score in scores.items()} == {0: 0, 1: -0.5, 2: -1, 4: -2, 99: -2}
    assert all(score.parts == {"length": -2} for score in scores.values())
    assert [total.moving_weights(step) for step in (0, 3)] == [{"length": 0}, {"length": 0.75}]
    assert total.score([TEN], ["w w"])[0].value == -2, "by itself it scores with what it ends at"


def test_a_target_moves_and_is_logged() -> None:
    total = reward("length", ratio=0.2, start=1.0, steps=4)
    parts = [total.at(step).score([TEN], ["w w"])[0].parts for step in (0, 2, 4, 5)]
    assert [p["length.target"] for p in parts] == pytest.approx([10, 6, 2, 2])
    assert [p["length"] for p in parts] == [-8, -4, 0, 0]
    assert total.score([TEN], ["w w"])[0].value == 0
    assert total.moves and total.moving_weights(0) == {}


def test_what_does_not_move_is_shared() -> None:
    total = make_reward([PartConfig(name="rouge1"), PartConfig(name="length", params={"target": 4})])
    assert not total.moves and total.moving_weights(0) == {}
    assert all(a.reward is b.reward for (_, a), (_, b) in zip(total.parts, total.at(3).parts, strict=True))


@pytest.mark.parametrize("half", ["weight_start", "weight_steps"])
def test_half_of_a_ramp_is_refused(half: str) -> None:
    with pytest.raises(UserError, match="go together"):
        resolve(
            TrainConfig,
            flags={"model": "m", "data": "d", "output": "o", "reward": [{"name": "ending", half: 3}]},
        )
