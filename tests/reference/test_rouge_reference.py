"""ROUGE, metric and reward, equals rouge-score's own multi-reference call."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.artifacts.predictions import answers_to
from rlgf_cli.metrics.rouge import TYPES, RougeMetric
from rlgf_cli.protocols import Example
from rlgf_cli.rewards.rouge import RougeReward

TEXT = """running runs ran run generously generous generate cat cats the a of to, quickly. quick 42 3.5 don't
it's e-mail national nationality relational Élan naïve WORDS"""
WORDS = TEXT.split()


def made_up(count: int) -> tuple[list[Example], list[str]]:
    """Texts of one to four lines over words that the stemmer and the tokeniser treat in their own ways."""
    rng = random.Random(0)

    def text() -> str:
        lines = [" ".join(rng.choices(WORDS, k=rng.randint(0, 9))) for _ in range(rng.randint(1, 4))]
        return "\n".join(lines)

    examples = [Example(str(i), "p", tuple(text() or "x" for _ in range(rng.randint(1, 3)))) for i in range(count)]
    return examples, ["", " \n", *[text() for _ in range(count - 2)]]


def assert_equal(examples: list[Example], texts: list[str], *, stemmer: bool) -> None:
    found = RougeMetric(stemmer=stemmer).compute(examples, texts)
    scorer = RougeScorer(list(TYPES), use_stemmer=stemmer)
    rewards = RougeReward(stemmer=stemmer).score(examples, texts)
    for i, (example, text) in enumerate(zip(examples, texts, strict=True)):
        expected = scorer.score_multi(list(example.references), text)
        for kind in TYPES:
            assert found.values[kind][i] == pytest.approx(expected[kind].fmeasure, abs=1e-12), (kind, example.id)
        mean = sum(expected[kind].fmeasure for kind in ("rouge1", "rouge2", "rougeL")) / 3
        assert rewards[i].value == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("stemmer", [True, False])
def test_made_up_texts(stemmer):
    examples, texts = made_up(200)
    assert_equal(examples, texts, stemmer=stemmer)
    assert len({*RougeMetric().compute(examples, texts).values["rougeL"]}) > 50  # no trivial agreement


def test_the_best_reference_is_the_maximum():
    """Not through score_multi: the maximum over single-reference scores, for each type by itself."""
    examples, texts = made_up(100)
    found = RougeMetric().compute(examples, texts)
    scorer = RougeScorer(list(TYPES), use_stemmer=True)
    for i, (example, text) in enumerate(zip(examples, texts, strict=True)):
        singles = [scorer.score(reference, text) for reference in example.references]
        for kind in TYPES:
            assert found.values[kind][i] == pytest.approx(max(s[kind].fmeasure for s in singles), abs=1e-12)


@pytest.mark.realdata
@pytest.mark.skipif("RLGF_REAL_DATA" not in os.environ, reason="RLGF_REAL_DATA is not set")
def test_real_summaries():
    """DialogSum's test set with three references each, against gpt-3.5's summaries: 1,500 pairs."""
    folder = Path(os.environ["RLGF_REAL_DATA"]) / "dialogsum"
    examples = read_examples(folder / "test.jsonl.gz")
    answers, _ = answers_to(examples, folder / "guide_gpt-3.5.max20words.test.jsonl.gz")
    assert sum(len(a.example.references) for a in answers) == 1500
    assert_equal([a.example for a in answers], [a.text for a in answers], stemmer=True)
