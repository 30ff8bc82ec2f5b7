"""Metrics from config to figures."""

from __future__ import annotations

import pytest

from rlgf_cli.config.common import PartConfig
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.protocols import Example, Metric, MetricResult
from rlgf_cli.scorers.figures import compute_figures, make_metrics

EXAMPLES = [
    Example("a", "cat mat", ("the cat sat on the mat", "a cat"), {"concepts": ["cat", "mat"]}),
    Example("b", "dog run", ("dogs are running",)),
]
TEXTS = ["a cat", "the dog runs"]
LENGTHS = ["length.words", "length.characters", "length.ratio"]


def figures(*specs: str | dict, examples=EXAMPLES, texts=TEXTS):
    """All figures by name, the counts, and the metrics."""
    parts = [PartConfig(name=s) if isinstance(s, str) else PartConfig(**s) for s in specs]
    found, counted = {}, {}
    for metric in make_metrics(parts, device="cpu"):
        some, counts = compute_figures(metric, examples, texts)
        found.update(some)
        counted.update(counts)
    return found, counted


class TestFigures:
    def test_rouge(self):
        found, _ = figures("rouge")
        assert list(found) == ["rouge.rouge1", "rouge.rouge2", "rouge.rougeL", "rouge.rougeLsum"]
        assert found["rouge.rouge1"].values == [1.0, pytest.approx(2 / 3)]

    def test_lsum_takes_lines_for_sentences(self):
        example = Example("x", "p", ("one two three\nfour five six",))
        flipped, _ = figures("rouge", examples=[example], texts=["four five six\none two three"])
        assert flipped["rouge.rougeLsum"].values == [1.0]
        assert flipped["rouge.rougeL"].values == [0.5]

    def test_coverage_length_and_a_single_figures_name(self):
        found, _ = figures("coverage", "length")
        assert found["coverage"].values == [0.5, 1.0]
        assert found["length.words"].values == [2.0, 3.0]

    def test_rewards_add_up_and_show_their_parts(self):
        found, _ = figures(
            "reward:coverage", "length", {"name": "reward:length", "weight": 0.5, "params": {"max_words": 2}}
        )
        assert list(found) == ["reward.total", "reward.coverage", "reward.length", *LENGTHS]
        assert found["reward.coverage"].values == [0.5, 1.0]
        assert found["reward.total"].values == [0.5, 0.5]

    def test_a_metric_twice_with_other_parameters(self):
        found, _ = figures("rouge", {"name": "rouge", "params": {"stemmer": False}})
        assert found["rouge.rouge1"].values[1] == pytest.approx(2 / 3)
        assert found["rouge#2.rouge1"].values[1] == 0.0
        assert found["rouge.rouge1"].signature != found["rouge#2.rouge1"].signature

    def test_python_functions(self, tmp_path):
        (tmp_path / "mine.py").write_text(
            "def words(text): return len(text.split())\n"
            "def both(texts): return [{'score': 1.0, 'x': 2.0}, {'score': 3.0}]\n"
        )
        found, _ = figures(f"{tmp_path}/mine.py:words", f"{tmp_path}/mine.py:both", f"reward:{tmp_path}/mine.py:words")
        assert found["words"].values == [2.0, 3.0] == found["reward.total"].values == found["reward.words"].values
        assert found["both"].values == [1.0, 3.0] and found["both.x"].values == [2.0, None]

    def test_classifier(self, tiny_classifier):
        found, counts = figures(
            {"name": f"reward:classifier:{tiny_classifier}", "params": {"max_tokens": 8}},
            texts=["the cat sees the garden . the cat sees the garden .", "the dog"],
        )
        assert all(0 < value < 1 for value in found["reward.classifier"].values)
        assert counts == {"reward.classifier.truncated": 1}

    def test_empty_texts_are_scored(self):
        found, _ = figures("rouge", "coverage", "length", "reward:rouge", texts=["", "\n"])
        assert all(figure.values == [0.0, 0.0] for figure in found.values())


class TestProgress:
    def test_a_text_is_done_when_all_rewards_that_tell_have_scored_it(self, tiny_classifier):
        part = PartConfig(name=f"reward:classifier:{tiny_classifier}", params={"batch_size": 2})
        (metric,) = make_metrics([part, PartConfig(name="reward:coverage"), part], device="cpu")
        told: list[int] = []
        assert metric.reports_rows
        metric.on_rows = told.append
        metric.compute([Example(str(i), "p") for i in range(5)], ["the cat"] * 5)
        assert sum(told) == 5 and told == [1, 1, 0, 1, 1, 1]  # after 2, 4, 5 of ten scores, and 7, 9, 10

    def test_one_that_does_not_tell_is_not_asked_to(self):
        (metric,) = make_metrics([PartConfig(name="length")])
        assert not metric.reports_rows


class TestSkipped:
    bare = Example("bare", "one two")

    def test_an_example_without_references_is_skipped(self):
        found, _ = figures("rouge", examples=[EXAMPLES[0], self.bare])
        assert found["rouge.rougeL"].values == [1.0, None]

    def test_none_at_all_is_refused_before_the_run(self):
        for name in ("rouge", "reward:rouge"):
            (metric,) = make_metrics([PartConfig(name=name)])
            with pytest.raises(UserError, match="references"):
                metric.check_set([self.bare])

    def test_coverage_skips_examples_without_concepts(self):
        dots = Example("dots", "...")
        found, _ = figures("coverage", examples=[EXAMPLES[0], dots])
        assert found["coverage"].values == [0.5, None]
        (metric,) = make_metrics([PartConfig(name="coverage")])
        with pytest.raises(UserError, match="concepts"):
            metric.check_set([dots])

    def test_references_that_rouge_cannot_read_are_counted(self):
        found, counts = figures(
            "rouge", examples=[EXAMPLES[0], Example("zh", "p", ("猫在垫子上",))], texts=["a cat", "猫"]
        )
        assert found["rouge.rouge1"].values == [1.0, 0.0]
        assert counts == {"rouge.references_without_words": 1}


class TestSignatures:
    def test_metric_library_settings_and_n(self):
        signature = figures("rouge")[0]["rouge.rougeL"].signature
        assert signature.startswith("rouge|rouge-score=") and signature.endswith("|n=2")
        assert "stemmer=yes" in signature and "references=max" in signature and "lsum=newline" in signature

    def test_a_signature_does_not_depend_on_the_texts(self):
        for name in ("rouge", "coverage", "length", "reward:rouge"):
            one = {key: figure.signature for key, figure in figures(name)[0].items()}
            other = {key: figure.signature for key, figure in figures(name, texts=["", "x"])[0].items()}
            assert one == other

    def test_weights_are_in_it(self):
        one = figures("reward:coverage")[0]["reward.total"].signature
        assert one != figures({"name": "reward:coverage", "weight": 2})[0]["reward.total"].signature


class TestRefused:
    @pytest.mark.parametrize(
        ("spec", "message", "hint"),
        [
            ("rogue", "unknown metric 'rogue'", "'rouge'"),
            ("bertscor", "unknown metric 'bertscor'", "'bertscore'"),
            ("reward", "needs a reward's name", "reward:NAME"),
            ("reward:rogue", "unknown reward 'rogue'", "'rouge'"),
            ("rouge:x", "nothing behind a colon", None),
            ({"name": "rouge", "weight": 2}, "takes no weight", None),
            ({"name": "length", "params": {"target": 2}}, "unknown parameter 'target'", None),
        ],
    )
    def test_bad_spec(self, spec, message, hint):
        with pytest.raises(UserError) as caught:
            figures(spec)
        assert message in caught.value.message
        assert hint is None or hint in (caught.value.hint or "")

    def test_no_metric(self):
        with pytest.raises(UserError, match="no metric"):
            make_metrics([])

    @pytest.mark.parametrize(
        ("values", "kind", "message"),
        [
            ([1.0], RlgfError, "1 values of odd for 2 texts"),
            ([1.0, float("nan")], RlgfError, "nan as odd of example 'b'"),
            ([None, None], UserError, "no example could be scored with odd"),
        ],
    )
    def test_a_metric_that_breaks_its_promise(self, values, kind, message):
        class Odd(Metric):
            name = "odd"

            def compute(self, examples, texts):
                return MetricResult({"score": values}, "odd")

        with pytest.raises(kind, match=message):
            compute_figures(Odd(), EXAMPLES, TEXTS)
