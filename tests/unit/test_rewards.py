"""Builtin rewards, their sum, and what is refused before a run starts."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from rlgf_cli.config.common import PartConfig
from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example, Reward, Score
from rlgf_cli.scorers.base import signature_of
from rlgf_cli.scorers.coverage import base_forms, concepts_of, coverage
from rlgf_cli.scorers.repetition import repeated_share
from rlgf_cli.scorers.weighted_sum import SumReward, make_reward

CAT = Example("cat", "cat mat", ("the cat sat on the mat", "a cat"), {"concepts": ["cat", "mat"]})
DOG = Example("dog", "dog run field", ("dogs are running in the field",))


def parts(*specs: str | dict) -> list[PartConfig]:
    return [PartConfig(name=s) if isinstance(s, str) else PartConfig(**s) for s in specs]


def values(spec: str | dict, examples: list[Example], texts: list[str]) -> list[float]:
    return [score.value for score in make_reward(parts(spec)).score(examples, texts)]


class Fixed(Reward):
    """A reward with given scores."""

    def __init__(self, name: str, scores: list[float], **logged: float) -> None:
        self.name, self.scores, self.logged = name, scores, logged

    def score(self, examples, texts):
        return [Score(value, self.logged) for value in self.scores]


class TestSum:
    def test_weights_count_in_the_total_and_parts_are_logged_raw(self):
        total = SumReward([(1.0, Fixed("a", [0.5, 1.0], extra=7.0)), (-2.0, Fixed("b", [3.0, 4.0]))])
        first, second = total.score([CAT, DOG], ["x", "y"])
        assert first == Score(0.5 - 6.0, {"a": 0.5, "a.extra": 7.0, "b": 3.0})
        assert second.value == 1.0 - 8.0

    def test_a_name_that_comes_again_is_numbered(self):
        total = SumReward([(1.0, Fixed("a", [1.0])), (1.0, Fixed("a", [2.0])), (1.0, Fixed("a", [4.0]))])
        assert total.score([CAT], ["x"])[0].parts == {"a": 1.0, "a#2": 2.0, "a#3": 4.0}

    def test_the_signature_is_that_of_the_parts_as_they_are_now(self):
        """A reward may know only after its first score what it scored with, as a judge's server reports its model."""

        class Late(Fixed):
            @property
            def signature(self) -> str:
                return f"late,model={self.model}"

            model = "unknown"

        late = Late("late", [1.0])
        total = SumReward([(1.0, late)])
        late.model = "m-0613"
        assert signature_of(total) == "1*[late,model=m-0613]"

    def test_signature_changes_with_weight_and_parameters(self):
        one = signature_of(make_reward(parts("rouge1")))
        assert one != signature_of(make_reward(parts({"name": "rouge1", "weight": 2})))
        assert one != signature_of(make_reward(parts({"name": "rouge1", "params": {"stemmer": False}})))
        assert one == signature_of(make_reward(parts("rouge1")))

    def test_from_config(self):
        reward = make_reward(parts("coverage", {"name": "length", "weight": 0.1, "params": {"max_words": 2}}))
        (score,) = reward.score([CAT], ["the cat and the dog"])
        assert score.parts == {"coverage": 0.5, "length": -3.0}
        assert score.value == pytest.approx(0.5 - 0.3)

    @pytest.mark.parametrize("given", [{"weight": float("nan")}, {"weight": float("inf")}])
    def test_weights_are_numbers(self, given):
        moving = {"weight_start": -given["weight"], "weight_steps": 3}
        for part in (given, moving):
            with pytest.raises(ValidationError, match="finite number"):
                parts({"name": "rouge1", **part})


class TestRefused:
    @pytest.mark.parametrize(
        ("spec", "message", "hint"),
        [
            ("rogue", "unknown reward 'rogue'", "'rouge'"),
            ({"name": "rouge", "params": {"stemer": True}}, "unknown parameter 'stemer'", "'stemmer'"),
            ({"name": "rouge", "params": {"stemmer": "perhaps"}}, "'stemmer'", None),
            ({"name": "coverage", "params": {"n": 1}}, "unknown parameter 'n'", "takes no parameters"),
            ({"name": "repetition", "params": {"n": 0}}, "'n'", None),
            ("rouge:large", "nothing behind a colon", "write rouge"),
            ("length", "needs a bound", "max_words"),
            ({"name": "length", "params": {"min_words": 5, "max_words": 4}}, "larger than", None),
            ({"name": "length", "params": {"target": 5, "max_words": 9}}, "not both", None),
            ("classifier", "needs a checkpoint", "classifier:PATH"),
        ],
    )
    def test_bad_spec(self, spec, message, hint):
        with pytest.raises(UserError) as caught:
            make_reward(parts(spec)).check([])
        assert message in caught.value.message
        assert hint is None or hint in (caught.value.hint or "")

    def test_no_parts(self):
        with pytest.raises(UserError, match="no reward"):
            make_reward([])

    @pytest.mark.parametrize("name", ["rouge", "rouge1", "rouge2", "rougeL"])
    def test_missing_references_are_counted_before_the_run(self, name):
        bare = Example("bare", "a prompt")
        for ask in (
            lambda reward, examples: reward.check(examples),
            lambda reward, examples: reward.score(examples, ["x", "y"]),
        ):
            with pytest.raises(UserError, match=r"1 of 2 examples have none \(first: 'bare'\)"):
                ask(make_reward(parts(name)), [CAT, bare])

    def test_coverage_without_any_concept(self):
        with pytest.raises(UserError, match="'dots' has no concepts"):
            make_reward(parts("coverage")).check([Example("dots", "...")])

    def test_concepts_that_are_no_list(self):
        with pytest.raises(UserError, match="not a list of strings"):
            concepts_of(Example("x", "p", meta={"concepts": "cat mat"}))


@pytest.mark.parametrize(
    "spec",
    [
        "rouge",
        "rouge1",
        "rouge2",
        "rougeL",
        "coverage",
        {"name": "length", "params": {"target": 3}},
        "repetition",
    ],
)
def test_an_empty_text_is_legal(spec):
    empty, blank = values(spec, [CAT, DOG], ["", " \n"])
    expected = -3.0 if isinstance(spec, dict) else 0.0
    assert empty == blank == expected


class TestRouge:
    def test_best_reference_for_each_type_by_itself(self):
        # rouge1 is best with the second reference (F1 1), rouge2 too; a text equal to the first gives 1 there
        assert values("rouge1", [CAT, CAT], ["a cat", "the cat sat on the mat"]) == [1.0, 1.0]

    def test_known_value(self):
        # against "a cat": precision 1/2, recall 1/2; against the other: 1/2 and 1/6
        assert values("rouge1", [CAT], ["one cat"]) == [pytest.approx(0.5)]

    def test_stemmer_is_on_and_can_be_switched_off(self):
        example = Example("s", "p", ("dogs running",))
        assert values("rouge1", [example], ["dog runs"]) == [1.0]
        assert values({"name": "rouge1", "params": {"stemmer": False}}, [example], ["dog runs"]) == [0.0]

    def test_rouge_is_the_mean_of_its_logged_parts(self):
        (score,) = make_reward(parts("rouge")).score([CAT], ["the cat on the mat"])
        logged = [score.parts[f"rouge.{kind}"] for kind in ("rouge1", "rouge2", "rougeL")]
        assert len(set(logged)) > 1
        assert score.value == pytest.approx(sum(logged) / 3)


class TestCoverage:
    @pytest.mark.parametrize(
        ("concept", "word"),
        [
            ("dog", "dogs"), ("watch", "watches"), ("walk", "walked"), ("move", "moved"), ("walk", "walking"),
            ("carry", "carries"), ("carry", "carried"), ("take", "taking"), ("run", "running"), ("stop", "stopped"),
            ("go", "goes"), ("Dog", "DOGS"), ("t-shirt", "T-shirts"),
        ],
    )  # fmt: skip
    def test_regular_inflections_count(self, concept, word):
        assert concept.lower() in base_forms(word.lower())
        assert coverage([concept.lower()], f"the {word}, now.") == 1.0

    @pytest.mark.parametrize(
        ("concept", "word"), [("run", "ran"), ("cat", "category"), ("car", "cart"), ("thing", "th"), ("b", "bed")]
    )
    def test_other_words_do_not(self, concept, word):
        assert coverage([concept], word) == 0.0

    def test_share_and_multi_word_concepts(self):
        assert coverage(["hot dog", "stand", "sea"], "dogs stand in the hot sun") == pytest.approx(2 / 3)
        assert coverage(["hot dog"], "a hot sun") == 0.0

    def test_concepts_from_meta_else_from_the_prompt_once_each(self):
        assert concepts_of(CAT) == ["cat", "mat"]
        assert concepts_of(Example("x", "Ski mountain, ski!")) == ["ski", "mountain"]

    def test_reward(self):
        assert values("coverage", [CAT, DOG], ["two cats", "a dog runs over the fields"]) == [0.5, 1.0]


class TestShape:
    @pytest.mark.parametrize(
        ("params", "words", "penalty"),
        [
            ({"max_words": 3}, 5, -2), ({"max_words": 3}, 3, 0), ({"min_words": 3}, 1, -2), ({"min_words": 3}, 9, 0),
            ({"min_words": 2, "max_words": 4}, 5, -1), ({"target": 4}, 6, -2), ({"target": 4}, 3, -1),
            ({"target": 4}, 4, 0), ({"max_words": 0}, 2, -2),
        ],
    )  # fmt: skip
    def test_length(self, params, words, penalty):
        assert values({"name": "length", "params": params}, [CAT], ["w " * words]) == [penalty]

    def test_repetition(self):
        assert repeated_share(["a", "b", "a", "b", "a", "b"], 2) == pytest.approx(1 - 2 / 5)
        assert repeated_share(["a", "b"], 3) == 0.0
        texts = ["A a a a", "a b c"]
        assert values({"name": "repetition", "params": {"n": 1}}, [CAT, CAT], texts) == [-0.75, 0.0]
