"""ROUGE, metric and reward, equals rouge-score's own multi-reference call."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from rouge_score.rouge_scorer import RougeScorer

from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.artifacts.predictions import answers_to
from rlgf_cli.protocols import Example
from rlgf_cli.scorers.rouge import FIGURES, Rouge, lcs_length

TEXT = """running runs ran run generously generous generate cat cats the a of to, quickly. quick 42 3.5 don't
it's e-mail national nationality relational Élan naïve WORDS"""
WORDS = TEXT.split()


def made_up(count: int) -> tuple[list[Example], list[str]]:
    """Texts of one to four lines over words that the stemmer and the tokeniser treat in their own ways."""
    rng = random.Random(0)

    def text() -> str:
        lines = [" ".join(rng.choices(WORDS, k=rng.randint(0, 9))) for _ in range(rng.randint(1, 4))]
        return "\n".join(lines)

    examples = [
        Example(str(i), "p", tuple(text().strip() or "x" for _ in range(rng.randint(1, 3)))) for i in range(count)
    ]
    return examples, ["", " \n", *[text() for _ in range(count - 2)]]


def assert_equal(examples: list[Example], texts: list[str], *, stemmer: bool) -> None:
    found = Rouge(stemmer=stemmer).compute(examples, texts)
    scorer = RougeScorer(list(FIGURES), use_stemmer=stemmer)
    rewards = Rouge(stemmer=stemmer).score(examples, texts)
    for i, (example, text) in enumerate(zip(examples, texts, strict=True)):
        expected = scorer.score_multi(list(example.references), text)
        for kind in FIGURES:
            assert found.values[kind][i] == pytest.approx(expected[kind].fmeasure, abs=1e-12), (kind, example.id)
        mean = sum(expected[kind].fmeasure for kind in ("rouge1", "rouge2", "rougeL")) / 3
        assert rewards[i].value == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("stemmer", [True, False])
def test_made_up_texts(stemmer):
    examples, texts = made_up(200)
    assert_equal(examples, texts, stemmer=stemmer)
    assert len({*Rouge().compute(examples, texts).values["rougeL"]}) > 50  # no trivial agreement


def test_the_best_reference_is_the_maximum():
    """Not through score_multi: the maximum over single-reference scores, for each type by itself."""
    examples, texts = made_up(100)
    found = Rouge().compute(examples, texts)
    scorer = RougeScorer(list(FIGURES), use_stemmer=True)
    for i, (example, text) in enumerate(zip(examples, texts, strict=True)):
        singles = [scorer.score(reference, text) for reference in example.references]
        for kind in FIGURES:
            assert found.values[kind][i] == pytest.approx(max(s[kind].fmeasure for s in singles), abs=1e-12)


LINES = st.lists(st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join), max_size=4).map("\n".join)


@given(st.lists(LINES, min_size=1, max_size=3), LINES, st.booleans())
def test_any_texts(references, text, stemmer):
    types = ["rouge1", "rouge2", "rouge4", "rougeL", "rougeLsum"]
    expected = RougeScorer(types, use_stemmer=stemmer).score_multi(references, text)
    assert Rouge(stemmer=stemmer).f1(references, text, types) == {k: expected[k].fmeasure for k in types}
    for kind in types:  # a type alone is what it is among others
        assert Rouge(stemmer=stemmer).f1(references, text, [kind]) == {kind: expected[kind].fmeasure}


LETTERS = st.text(st.sampled_from("aAbB.'-_ \n\r\t\u2028\x0c9éßİΣσςK猫\x00"))


@given(LETTERS, LETTERS)
def test_any_characters(reference, text):
    expected = RougeScorer(list(FIGURES), use_stemmer=True).score(reference, text)
    assert Rouge(stemmer=True).f1([reference], text, FIGURES) == {k: expected[k].fmeasure for k in FIGURES}


@given(st.lists(st.sampled_from("abcd"), max_size=70), st.lists(st.sampled_from("abcde"), max_size=70))
def test_the_longest_common_subsequence(one, other):
    places = {letter: sum(1 << i for i, found in enumerate(one) if found == letter) for letter in set(one)}
    assert lcs_length(other, places, len(one)) == rouge_scorer._lcs_table(one, other)[-1][-1]


def test_lines_are_sentences_for_lsum_alone():
    """A line break is white space to all but ROUGE-Lsum; empty lines are nothing to it."""
    example = Example("x", "p", ("one two three four five six",))
    broken, joined, spaced = (
        {key: values[0] for key, values in Rouge().compute([example], [text]).values.items()}
        for text in ("four five six\none two three", "four five six one two three", "four five six\n\n \none two three")
    )
    assert broken["rougeLsum"] == spaced["rougeLsum"] == 1.0 > joined["rougeLsum"]
    assert all(broken[kind] == joined[kind] == spaced[kind] for kind in ("rouge1", "rouge2", "rougeL"))


@pytest.mark.realdata
@pytest.mark.skipif("RLGF_REAL_DATA" not in os.environ, reason="RLGF_REAL_DATA is not set")
@pytest.mark.parametrize("stemmer", [True, False])
@pytest.mark.parametrize("lines", [False, True])
def test_real_summaries(stemmer, lines):
    """DialogSum's test set with three references each, against gpt-3.5's summaries: 1,500 pairs; as they are, and with
    a sentence per line.
    """
    folder = Path(os.environ["RLGF_REAL_DATA"]) / "dialogsum"
    examples = read_examples(folder / "test.jsonl.gz")
    answers, _ = answers_to(examples, folder / "guide_gpt-3.5.max20words.test.jsonl.gz")
    assert sum(len(a.example.references) for a in answers) == 1500

    def shown(text: str) -> str:
        return text.replace(". ", ".\n").replace(" and ", "\nand ") if lines else text

    asked = [Example(a.example.id, "p", tuple(map(shown, a.example.references))) for a in answers]
    texts = [shown(a.text) for a in answers]
    assert (sum("\n" in text for text in texts) > 200) == lines
    assert_equal(asked, texts, stemmer=stemmer)
