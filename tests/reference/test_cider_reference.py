"""CIDEr equals pycocoevalcap's own class on equal words; with fixed frequencies it depends on nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from pycocoevalcap.cider.cider import Cider as PackageCider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from test_rouge_reference import made_up

from conftest import toy_examples, write_rows
from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.artifacts.predictions import answers_to
from rlgf_cli.protocols import Example
from rlgf_cli.scorers import captions
from rlgf_cli.scorers.cider import Cider

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="there is no java")


def theirs(examples: Sequence[Example], texts: Sequence[str], tokenize: captions.Tokenize) -> tuple[float, list[float]]:
    """pycocoevalcap's corpus value and its value per text."""
    references = {i: tokenize(example.references) for i, example in enumerate(examples)}
    mean, values = PackageCider().compute_score(references, {i: tokenize([text]) for i, text in enumerate(texts)})
    return float(mean), values.tolist()


def assert_equal(examples: Sequence[Example], texts: Sequence[str], kind: captions.Tokenizer = "treebank") -> None:
    found = Cider(tokenizer=kind).compute(examples, texts).values["score"]
    mean, values = theirs(examples, texts, captions.tokenizer("cider", kind)[0])
    assert found == pytest.approx(values, abs=1e-12)
    assert sum(found) / len(found) == pytest.approx(mean) and 0.1 < mean < 9


def real(task: str, guide: str) -> tuple[list[Example], list[str]]:
    folder = Path(os.environ["RLGF_REAL_DATA"]) / task
    answers, _ = answers_to(read_examples(folder / "test.jsonl.gz"), folder / f"{guide}.jsonl.gz", on_missing="skip")
    answers = [answer for answer in answers if answer.example.references]
    return [answer.example for answer in answers], [answer.text for answer in answers]


def test_made_up_texts():
    examples, texts = made_up(100)
    texts = [t if i % 3 else e.references[-1] for i, (e, t) in enumerate(zip(examples, texts, strict=True))]
    written = [(e, t) for e, t in zip(examples, texts, strict=True) if all(r.strip() for r in e.references)]
    assert_equal(*zip(*written, strict=True))


@pytest.mark.realdata
@pytest.mark.skipif("RLGF_REAL_DATA" not in os.environ, reason="RLGF_REAL_DATA is not set")
def test_real_sentences_with_many_references():
    """CommonGen's test sets (three to six references) and gpt-3.5-turbo's sentences."""
    examples, texts = real("commongen", "guide_gpt-3.5-turbo.test400")
    assert len(examples) == 400 and sum(len(e.references) for e in examples) > 1600
    assert_equal(examples, texts)


class TestFixedFrequencies:
    @pytest.fixture
    def training(self, tmp_path):
        return write_rows(tmp_path / "train.jsonl", toy_examples(60, seed=1))

    def test_of_the_evaluated_set_they_give_what_the_set_gives(self, tmp_path):
        rows = toy_examples(30)
        data = write_rows(tmp_path / "data.jsonl", rows)
        examples, texts = read_examples(data), [row["references"][0] for row in rows[::-1]]
        fixed = Cider(references=str(data)).compute(examples, texts).values["score"]
        assert fixed == pytest.approx(Cider().compute(examples, texts).values["score"], abs=1e-12)
        assert len(set(fixed)) > 5

    def test_a_reward_depends_on_its_text_alone(self, training):
        examples = [Example(r["id"], "p", tuple(r["references"])) for r in toy_examples(12)]
        texts = [examples[-1 - i].references[0] for i in range(12)]
        reward = Cider(references=str(training))
        together = [score.value for score in reward.score(examples, texts)]
        alone = [reward.score([e], [t])[0].value for e, t in zip(examples, texts, strict=True)]
        again = [score.value for score in reward.score(examples[::-1], texts[::-1])][::-1]
        assert together == alone == again and len(set(together)) > 3
        of_set = Cider().compute(examples, texts).values["score"]
        assert Cider().compute(examples[:5], texts[:5]).values["score"] != of_set[:5]

    def test_the_reward_is_a_tenth_of_the_metric(self, training):
        examples = [Example("a", "p", ("the cat sees the garden .",)), Example("b", "p", ("a bird", "x"))]
        texts = ["the cat sees the garden .", ""]
        values = Cider(references=str(training)).compute(examples, texts).values["score"]
        assert [s.value for s in Cider(references=str(training)).score(examples, texts)] == [
            pytest.approx(value / 10) for value in values
        ]
        assert values == [pytest.approx(10.0), 0.0]

    def test_rare_words_weigh_more(self, training):
        """`the` is in every reference of the training file, a noun in few."""
        reward = Cider(references=str(training))
        example = Example("x", "p", ("the queen",))
        common, rare = (reward.score([example], [text])[0].value for text in ("the dog", "a queen"))
        assert rare > 0 == common


@needs_java
class TestWords:
    def test_java_words_are_those_of_the_package(self, monkeypatch):
        texts = ['A dog (brown) runs. "Hi," he said -- it\'s fun...', "", "naïve cats’ e-mail", "two\nlines", " ", "?"]
        written = {i: [{"caption": text.replace("\n", " ")}] for i, text in enumerate(texts) if text.strip()}
        package = PTBTokenizer().tokenize(written)
        expected = [package[i][0] if i in written else "" for i in range(len(texts))]
        monkeypatch.setenv("LC_ALL", "C")
        assert captions.tokenizer("cider", "ptb")[0](texts) == expected
        assert "naïve" in expected[2]

    @pytest.mark.realdata
    @pytest.mark.skipif("RLGF_REAL_DATA" not in os.environ, reason="RLGF_REAL_DATA is not set")
    @pytest.mark.parametrize(
        ("task", "guide", "within"),
        [
            ("commongen", "guide_gpt-3.5-turbo.test400", 0.001),
            ("dialogsum", "guide_gpt-3.5.max20words.test", 0.01),
        ],
    )
    def test_the_default_words_give_nearly_the_same_cider(self, task, guide, within):
        """Stanford's splitter takes DialogSum's `#Person1#` apart in another place; nltk's does not know `Mr.`"""
        examples, texts = (some[:200] for some in real(task, guide))
        means = []
        for kind in ("treebank", "ptb"):
            values = Cider(tokenizer=kind).compute(examples, texts).values["score"]
            means.append(sum(values) / len(values))
        assert means[0] == pytest.approx(means[1], rel=within) and means[0] != means[1]
