"""Shift, scale and clip of a reward's parts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from rlgf_cli.config.common import PartConfig, Parts
from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example, Reward, Score
from rlgf_cli.scorers.base import signature_of
from rlgf_cli.scorers.figures import compute_figures, make_metrics
from rlgf_cli.scorers.weighted_sum import Normalisation, Part, SumReward, make_reward, normalisation

EXAMPLES = [Example(str(i), "p") for i in range(4)]
TEXTS = ["a", "a b", "a b c d e", "a b c d e f g"]  # `length` with max_words 1 gives 0, -1, -4, -6
LENGTH = {"name": "length", "params": {"max_words": 1}}

NUMBER = st.floats(-1e6, 1e6)
SCALE = st.floats(1e-3, 1e3)
BOUNDS = st.tuples(NUMBER, NUMBER).map(sorted).filter(lambda ends: ends[0] < ends[1]).map(tuple)


@given(NUMBER, NUMBER, SCALE, BOUNDS)
def test_the_formula(score, shift, scale, bounds):
    low, high = bounds
    found, clipped = Normalisation(shift, scale, bounds).apply(score)
    moved, never = Normalisation(shift, scale).apply(score)
    assert moved == (score - shift) / scale and not never
    assert low <= found <= high
    assert clipped == (found != moved)
    assert found == (low if moved < low else high if moved > high else moved)


@given(st.lists(NUMBER, min_size=2), NUMBER, SCALE, BOUNDS)
def test_the_order_of_scores_is_kept(scores, shift, scale, bounds):
    found = [Normalisation(shift, scale, bounds).apply(score)[0] for score in sorted(scores)]
    assert found == sorted(found)


@given(st.lists(NUMBER, min_size=1, max_size=5), NUMBER, SCALE, BOUNDS, st.floats(-3, 3))
def test_the_sum_takes_the_normalised_scores_and_logs_both(scores, shift, scale, bounds, weight):
    class Fixed(Reward):
        name = "fixed"

        def score(self, examples, texts):
            return [Score(value) for value in scores]

    normalise = Normalisation(shift, scale, bounds)
    reward = SumReward([Part(weight, Fixed(), normalise), (1.0, Fixed())])
    found = reward.score([EXAMPLES[0]] * len(scores), ["x"] * len(scores))
    for raw, score in zip(scores, found, strict=True):
        counted, clipped = normalise.apply(raw)
        assert score.value == weight * counted + raw
        assert score.parts == {
            "fixed": raw, "fixed.normalised": counted, "fixed.clipped": float(clipped), "fixed#2": raw,
        }  # fmt: skip
    assert reward.counts == {"fixed.clipped": sum(normalise.apply(raw)[1] for raw in scores)}


def test_from_config():
    reward = make_reward([PartConfig(**LENGTH, weight=2, shift=-2, scale=2, clip=[-1, 0.75])])
    scores = reward.score(EXAMPLES, TEXTS)
    assert [score.value for score in scores] == [1.5, 1.0, -2.0, -2.0]
    assert [score.parts["length.normalised"] for score in scores] == [0.75, 0.5, -1.0, -1.0]
    assert [score.parts["length"] for score in scores] == [0, -1, -4, -6]
    assert reward.counts == {"length.clipped": 2}
    assert reward.score(EXAMPLES[3:], TEXTS[3:]) and reward.counts == {"length.clipped": 3}


def test_by_default_nothing_changes_and_nothing_more_is_logged():
    plain = make_reward([PartConfig(**LENGTH)])
    assert plain.score(EXAMPLES, TEXTS)[2] == Score(-4.0, {"length": -4.0})
    assert plain.counts == {} and normalisation(PartConfig(**LENGTH, shift=0, scale=1)) is None
    scaled = make_reward([PartConfig(**LENGTH, scale=2)])
    assert scaled.score(EXAMPLES, TEXTS)[2] == Score(-2.0, {"length": -4.0, "length.normalised": -2.0})
    assert scaled.counts == {}


def test_each_key_is_in_the_signature():
    given = [
        {},
        {"shift": 1},
        {"scale": 2},
        {"clip": [0, 1]},
        {"clip": [0, 2]},
        {"clip": [-1, 1]},
        {"scale": 2.0000001},
    ]
    signatures = [signature_of(make_reward([PartConfig(**LENGTH, **keys)])) for keys in given]
    assert len(set(signatures)) == len(given)


def test_a_reward_as_metric():
    (metric,) = make_metrics([PartConfig(name="reward:length", params={"max_words": 1}, clip=[-2, 0])])
    figures, counts = compute_figures(metric, EXAMPLES, TEXTS)
    assert figures["reward.total"].values == figures["reward.length.normalised"].values == [0, -1, -2, -2]
    assert figures["reward.length"].values == [0, -1, -4, -6]
    assert counts == {"reward.length.clipped": 2}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scale": 0}, "scale"),
        ({"scale": -1}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"shift": float("inf")}, "shift"),
        ({"clip": [1, 1]}, r"low \(1\) must be below high \(1\)"),
        ({"clip": [2, 1]}, "must be below"),
        ({"clip": [0]}, "two numbers"),
        ({"clip": [0, 1, 2]}, "two numbers"),
        ({"clip": [0, float("inf")]}, "two numbers"),
        ({"clip": [float("nan"), 1]}, "two numbers"),
    ],
)
def test_what_means_nothing_is_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        PartConfig(name="rouge", **keys)


@pytest.mark.parametrize("keys", [{"shift": 1}, {"scale": 2}, {"clip": [0, 1]}])
def test_only_rewards_take_them(keys):
    with pytest.raises(UserError, match="the metric 'rouge' takes no shift, scale or clip"):
        make_metrics([PartConfig(name="rouge", **keys)])


def test_the_letter_of_a_recipe_says_where(tmp_path, run_cli):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("metrics:\n  - name: reward:rouge\n    clip: [1, 0]\n")
    result = run_cli("eval", "--predictions", "x.jsonl", "-c", recipe, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "low (1) must be below high (0)" in result.stderr and "recipe.yaml:2" in result.stderr


def blocks_of_the_page(language: str) -> list[str]:
    page = Path(__file__).parents[2] / "docs" / "rewards.md"
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_examples_of_the_page(tmp_path):
    (recipe,) = blocks_of_the_page("yaml")
    parts = TypeAdapter(Parts).validate_python(yaml.safe_load(recipe)["reward"])
    assert normalisation(parts[-1]) == Normalisation(1.5, 2.0, (-3.0, 3.0))
    assert make_reward(parts[:-1]).score([Example("a", "p", ("x",))], ["x " * 30])[0].parts["length"] == -10
    (function,) = blocks_of_the_page("python")
    (tmp_path / "rewards.py").write_text(function)
    reward = make_reward([PartConfig(name=f"{tmp_path}/rewards.py:score")])
    assert reward.score([Example("a", "p", ("a b",))], ["a b"])[0].value == 0.7


def test_rlgf_eval(eval_texts):
    rows = [{"id": e.id, "prompt": "p", "text": text} for e, text in zip(EXAMPLES, TEXTS, strict=True)]
    metrics = 'metrics=[{name: "reward:length", params: {max_words: 1}, shift: -1, scale: 2, clip: [-1, 1]}]'
    scores = eval_texts(rows, "--set", metrics)
    assert scores["metrics"]["reward.total"]["value"] == (0.5 + 0 - 1 - 1) / 4
    assert scores["metrics"]["reward.length"]["value"] == -11 / 4
    assert scores["counts"]["reward.length.clipped"] == 2
    assert (
        "clip(([length,rule=1,min_words=0,max_words=1] - -1.0) / 2.0, -1.0, 1.0)"
        in (scores["metrics"]["reward.total"]["signature"])
    )
