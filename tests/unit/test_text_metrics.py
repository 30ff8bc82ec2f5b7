"""Metrics of the texts themselves: distinct, self_bleu, novel, repetition, length."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import sacrebleu
from hypothesis import assume, given
from hypothesis import strategies as st

from rlgf_cli.config.common import PartConfig
from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example
from rlgf_cli.scorers.figures import compute_figures, make_metrics
from rlgf_cli.scorers.repetition import Repetition, loop_share

TEXT = st.lists(st.sampled_from(["the", "cat", "Cat", "sat,", "on", "mat."]), max_size=9).map(" ".join)
WRITTEN = TEXT.filter(str.strip)


def figures(name: str, texts: list[str], examples: list[Example] | None = None, **params):
    """Values per figure (a number where it is of the set as one), and the counts."""
    examples = examples or [Example(f"{i}", "the cat on a hill") for i in range(len(texts))]
    (metric,) = make_metrics([PartConfig(name=name, params=params)])
    found, counts = compute_figures(metric, examples, texts)
    return {k: f.values if f.values is not None else f.whole for k, f in found.items()}, counts


class TestDistinct:
    def test_per_text_and_of_the_set(self):
        found, _ = figures("distinct", ["a b a b", "a b", "C. c!", ""])
        assert found["distinct.1"] == [0.5, 1.0, 0.5, None]
        assert found["distinct.2"] == [pytest.approx(2 / 3), 1.0, 1.0, None]
        assert found["distinct.3"] == [1.0, None, None, None]
        assert found["distinct.set_1"] == 3 / 8 and found["distinct.set_2"] == 3 / 5 and found["distinct.set_3"] == 1.0

    def test_what_no_text_is_long_enough_for_is_left_out(self):
        assert list(figures("distinct", ["a b", "c"])[0]) == [
            "distinct.1", "distinct.2", "distinct.set_1", "distinct.set_2",
        ]  # fmt: skip
        with pytest.raises(UserError, match=r"no example could be scored with distinct\.1"):
            figures("distinct", ["", "..."])

    @given(st.lists(WRITTEN, min_size=1, max_size=5), st.randoms())
    def test_the_sets_figures_do_not_depend_on_the_order(self, texts, rng):
        shuffled = rng.sample(texts, len(texts))
        one, other = figures("distinct", texts)[0], figures("distinct", shuffled)[0]
        for key in one:
            assert (
                one[key] == other[key] if "set" in key else sorted(map(str, one[key])) == sorted(map(str, other[key]))
            )

    @given(st.lists(WRITTEN, min_size=1, max_size=5))
    def test_texts_twice_halve_the_sets_figures_and_leave_the_texts_own(self, texts):
        one, twice = figures("distinct", texts)[0], figures("distinct", texts * 2)[0]
        for key in one:
            assert twice[key] == (pytest.approx(one[key] / 2) if "set" in key else one[key] * 2)
            if "set" in key:
                assert 0 < one[key] <= 1


def as_defined(texts: list[str]) -> list[float | None]:
    """sacrebleu's own sentence BLEU of each text against all others that have words."""
    return [
        sacrebleu.sentence_bleu(text, [t for j, t in enumerate(texts) if j != i and t.strip()]).score
        if text.strip()
        else None
        for i, text in enumerate(texts)
    ]


class TestSelfBleu:
    @given(st.lists(TEXT, min_size=2, max_size=7))
    def test_equals_sacrebleu_against_all_others(self, texts):
        assume(sum(bool(text.strip()) for text in texts) > 1)
        found, counts = figures("self_bleu", texts)
        assert found["self_bleu"] == [v if v is None else pytest.approx(v, abs=1e-9) for v in as_defined(texts)]
        assert counts.get("self_bleu.empty_texts", 0) == sum(not text.strip() for text in texts)

    def test_longer_texts(self):
        rng = random.Random(0)
        texts = [
            " ".join(rng.choices(["a", "b", "c", "d", "e", "f,", "g.", "h"], k=rng.randint(3, 30))) for _ in range(40)
        ]
        assert figures("self_bleu", texts)[0]["self_bleu"] == pytest.approx(as_defined(texts), abs=1e-9)

    @given(st.lists(WRITTEN, min_size=2, max_size=6), st.randoms())
    def test_the_order_of_texts_does_not_matter(self, texts, rng):
        order = rng.sample(range(len(texts)), len(texts))
        one = figures("self_bleu", texts)[0]["self_bleu"]
        assert figures("self_bleu", [texts[i] for i in order])[0]["self_bleu"] == [one[i] for i in order]

    @given(st.lists(WRITTEN, min_size=1, max_size=5))
    def test_a_text_that_comes_twice_is_wholly_alike(self, texts):
        assert figures("self_bleu", [*texts, texts[0]])[0]["self_bleu"][-1] == pytest.approx(100.0)

    def test_texts_without_a_common_word_are_not_alike(self):
        assert figures("self_bleu", ["a b c", "d e f"])[0]["self_bleu"] == [0.0, 0.0]

    def test_one_text_is_refused_before_the_run(self):
        (metric,) = make_metrics([PartConfig(name="self_bleu")])
        with pytest.raises(UserError, match="there is one"):
            metric.check_set([Example("a", "p")])
        with pytest.raises(UserError, match="no example could be scored"):
            figures("self_bleu", ["a b", " "])


class TestNovel:
    def test_against_the_prompt(self):
        found, _ = figures("novel", ["The cat, on a roof", "hill hill", ""])
        assert found["novel.1"] == [pytest.approx(1 / 5), 0.0, None]
        assert found["novel.2"] == [pytest.approx(1 / 4), 1.0, None]
        assert found["novel.3"] == [pytest.approx(1 / 3), None, None]
        assert found["novel.4"] == [pytest.approx(1 / 2), None, None]

    @given(TEXT.filter(str.strip), TEXT)
    def test_a_copy_is_not_novel_and_longer_n_grams_are_the_more_so(self, text, prompt):
        copied = figures("novel", [text], [Example("a", f"{prompt} {text}")])[0]
        assert all(values == [0.0] for values in copied.values())
        found = figures("novel", [text], [Example("a", prompt)])[0]
        shares = [values[0] for values in found.values()]
        if len(shares) == 4:
            assert all((a == 0 or b > 0) for a, b in pairwise(shares))  # a new word makes new pairs

    def test_against_a_file(self, tmp_path):
        data = tmp_path / "train.jsonl"
        data.write_text('{"id": "a", "prompt": "red fox", "references": ["jumps high"]}\n')
        found, _ = figures("novel", ["red fox jumps high", "the cat"], against=str(data))
        assert found["novel.1"] == [0.0, 1.0]
        assert found["novel.2"] == [pytest.approx(1 / 3), 1.0]  # "fox jumps" is in no text of the file

    def test_the_source_is_in_the_signature(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"id": "a", "prompt": "red fox"}\n')
        (tmp_path / "b.jsonl").write_text('{"id": "a", "prompt": "red dog"}\n')
        specs = [{}, {"against": str(tmp_path / "a.jsonl")}, {"against": str(tmp_path / "b.jsonl")}]
        made = [make_metrics([PartConfig(name="novel", params=params)])[0] for params in specs]
        signatures = {metric.compute([Example("a", "p")], ["x"]).signature for metric in made}
        assert len(signatures) == 3 and not any(str(tmp_path) in s for s in signatures)

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(UserError):
            figures("novel", ["x"], against=str(tmp_path / "none.jsonl"))


def loop_by_definition(tokens: list[str]) -> float:
    """Every stretch and every period, tried."""
    found = [
        j - i
        for i in range(len(tokens))
        for j in range(i + 2, len(tokens) + 1)
        for p in range(1, (j - i) // 2 + 1)
        if all(tokens[k] == tokens[k - p] for k in range(i + p, j))
    ]
    return max(found) / len(tokens) if found else 0.0


class TestRepetition:
    def test_is_what_the_reward_subtracts(self):
        texts = ["a b a B a b", "one", "", "x y z x y z x"]
        found, _ = figures("repetition", texts)
        for n in (2, 3, 4):
            scores = Repetition(n=n).score([], texts)
            assert found[f"repetition.{n}"] == [-score.value for score in scores]
        assert found["repetition.2"][0] == pytest.approx(3 / 5)

    @pytest.mark.parametrize(
        ("text", "share"),
        [("", 0), ("a", 0), ("a b a", 0), ("a a", 1), ("a b a b", 1), ("a b a b a", 1), ("x a b a b y", 4 / 6),
         ("a a b c b c b", 5 / 7), ("a b b a", 0.5)],
    )  # fmt: skip
    def test_loops(self, text, share):
        assert loop_share(text.split()) == pytest.approx(share)

    @given(st.lists(st.sampled_from("abc"), max_size=12))
    def test_loops_by_definition(self, tokens):
        assert loop_share(tokens) == pytest.approx(loop_by_definition(tokens))


class TestLength:
    def test_words_characters_and_ratio(self):
        examples = [Example("a", "p", ("one two", "one two three four")), Example("b", "p"), Example("c", "p", ("",))]
        found, _ = figures("length", ["a bc ", "x", ""], examples)
        assert found == {
            "length.words": [2.0, 1.0, 0.0],
            "length.characters": [4.0, 1.0, 0.0],
            "length.ratio": [pytest.approx(2 / 3), None, None],
        }

    def test_without_references_there_is_no_ratio(self):
        assert list(figures("length", ["a"])[0]) == ["length.words", "length.characters"]


def test_rlgf_eval_has_them_all(eval_texts):
    texts = ["the cat sat on the mat", "the cat sat on the mat", "a dog", ""]
    rows = [
        {"id": f"{i}", "prompt": "the cat", "references": ["a cat sat there"], "text": text}
        for i, text in enumerate(texts)
    ]
    scores = eval_texts(rows, "--metrics", "distinct,self_bleu,novel,repetition,length")
    found = scores["metrics"]
    assert found["distinct.set_1"]["value"] == 7 / 14 and found["distinct.set_1"]["low"] is None
    assert found["distinct.1"]["n_skipped"] == 1 and found["distinct.1"]["low"] is not None
    assert found["self_bleu"]["value"] == pytest.approx(200 / 3) and "tok=13a" in found["self_bleu"]["signature"]
    assert scores["counts"]["self_bleu.empty_texts"] == 1
    assert found["novel.1"]["n"] == 3 and found["repetition.loop"]["value"] == 0.0
    assert found["length.ratio"]["value"] == pytest.approx((6 + 6 + 2 + 0) / 16)
