"""BLEU and chrF equal sacrebleu's: its command line, and its API for what the command line cannot say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from test_rouge_reference import made_up

from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.artifacts.predictions import Answer, answers_to
from rlgf_cli.protocols import Example, MetricResult
from rlgf_cli.registry import load
from rlgf_cli.scorers.bleu import Bleu
from rlgf_cli.scorers.chrf import ChrfMetric
from rlgf_cli.stats.bootstrap import interval


def figure(result: MetricResult) -> float:
    """The corpus figure as ``rlgf eval`` makes it: rows, sum, aggregate."""
    found = result.corpus["score"]
    rows = np.array([row for row in found.rows if row is not None], dtype=float)
    return float(load("aggregates", found.aggregate)(rows.sum(axis=0)))


def command_line(folder: Path, references: Sequence[Sequence[str]], texts: Sequence[str], *options: str) -> list[dict]:
    """What ``sacrebleu REFERENCES... -i TEXTS -m bleu chrf`` prints, to ten places. ``references[i]``: of text i."""
    files = []
    for k, lines in enumerate([texts, *zip(*references, strict=True)]):
        files.append(folder / f"{k}.txt")
        files[-1].write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", *files[1:], "-i", files[0], "-m", "bleu", "chrf", "-w", "10"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout)


def assert_equal_to_the_command_line(folder: Path, examples: Sequence[Example], texts: Sequence[str]) -> None:
    bleu, chrf = command_line(folder, [e.references for e in examples], texts)
    ours = Bleu().compute(examples, texts), ChrfMetric().compute(examples, texts)
    assert figure(ours[0]) == pytest.approx(bleu["score"], abs=1e-9)
    assert figure(ours[1]) == pytest.approx(chrf["score"], abs=1e-9)
    for result, theirs in zip(ours, (bleu, chrf), strict=True):
        assert theirs["signature"] in result.signature
    assert 1 < bleu["score"] < 99 and 1 < chrf["score"] < 99  # no trivial agreement


def one_line(answers: Sequence[Answer], references: int) -> tuple[list[Example], list[str]]:
    """Texts as the command line's files hold them, with the first ``references`` of each example."""
    examples = [
        Example(a.example.id, "p", tuple(" ".join(r.split()) for r in a.example.references[:references]))
        for a in answers
    ]
    return examples, [" ".join(a.text.split()) for a in answers]


def test_made_up_texts_equal_the_command_line(tmp_path):
    examples, texts = made_up(200)
    three = [Example(e.id, "p", tuple((e.references * 3)[:3])) for e in examples]
    flat = [Example(e.id, "p", tuple(" ".join(r.split()) or "x" for r in e.references)) for e in three]
    assert_equal_to_the_command_line(tmp_path, flat, [" ".join(text.split()) for text in texts])


@pytest.mark.realdata
@pytest.mark.skipif("RLGF_REAL_DATA" not in os.environ, reason="RLGF_REAL_DATA is not set")
def test_real_summaries_equal_the_command_line(tmp_path):
    """DialogSum's test set with three references each, against gpt-3.5's summaries."""
    folder = Path(os.environ["RLGF_REAL_DATA"]) / "dialogsum"
    answers, _ = answers_to(read_examples(folder / "test.jsonl.gz"), folder / "guide_gpt-3.5.max20words.test.jsonl.gz")
    assert len(answers) == 500 and {len(a.example.references) for a in answers} == {3}
    assert_equal_to_the_command_line(tmp_path, *one_line(answers, 3))


@pytest.mark.realdata
@pytest.mark.skipif("RLGF_REAL_DATA" not in os.environ, reason="RLGF_REAL_DATA is not set")
def test_real_sentences_equal_the_command_line(tmp_path):
    """CommonGen's test sets and gpt-3.5-turbo's sentences; with all references of some, of any number, the API."""
    folder = Path(os.environ["RLGF_REAL_DATA"]) / "commongen"
    answers, _ = answers_to(
        read_examples(folder / "test.jsonl.gz"), folder / "guide_gpt-3.5-turbo.test400.jsonl.gz", on_missing="skip"
    )
    answers = [answer for answer in answers if answer.example.references]
    numbers = {len(answer.example.references) for answer in answers}
    assert len(answers) == 400 and len(numbers) > 1
    assert_equal_to_the_command_line(tmp_path, *one_line(answers, min(numbers)))
    assert_equal_to_the_api([a.example for a in answers[:60]], [a.text for a in answers[:60]])


def assert_equal_to_the_api(examples: Sequence[Example], texts: Sequence[str]) -> None:
    """sacrebleu takes None for a reference that an example does not have."""
    width = max(len(example.references) for example in examples)
    streams = [[e.references[k] if k < len(e.references) else None for e in examples] for k in range(width)]
    for metric, theirs, single in (
        (Bleu(), BLEU(), BLEU(effective_order=True)),
        (Bleu(tokenize="char", lowercase=True), BLEU(tokenize="char", lowercase=True), None),
        (ChrfMetric(), CHRF(), CHRF()),
        (ChrfMetric(word_order=2, lowercase=True, whitespace=True), CHRF(6, 2, 2, True, True), None),
    ):
        found = metric.compute(examples, texts)
        assert figure(found) == pytest.approx(theirs.corpus_score(texts, streams).score, abs=1e-9)
        assert theirs.get_signature().format() in found.signature
        if single is not None:
            sentences = [single.sentence_score(t, e.references).score for e, t in zip(examples, texts, strict=True)]
            assert found.values["sentence"] == pytest.approx(sentences, abs=1e-9)


def test_made_up_texts_with_any_number_of_references():
    examples, texts = made_up(200)
    written = [(e, t) for e, t in zip(examples, texts, strict=True) if all(r.strip() for r in e.references)]
    assert len({len(e.references) for e, _ in written}) == 3 and not all(t.strip() for _, t in written)
    assert_equal_to_the_api(*zip(*written, strict=True))


WORDS = st.lists(st.sampled_from(["a", "b", "cat", "cats", "dog.", "é", "(x)"]), max_size=8).map(" ".join)
WRITTEN = WORDS.filter(bool)


@settings(max_examples=30)
@given(st.lists(st.tuples(WORDS, st.lists(WRITTEN, min_size=1, max_size=3)), min_size=1, max_size=6))
def test_any_texts(pairs):
    """Few words and short texts: orders without a match and without an n-gram, empty texts, no match at all."""
    assert_equal_to_the_api([Example("x", "p", tuple(group)) for _, group in pairs], [text for text, _ in pairs])


@settings(max_examples=30)
@given(st.lists(st.tuples(WORDS, st.lists(WRITTEN, min_size=1, max_size=2)), min_size=2, max_size=5), st.data())
def test_an_aggregate_of_many_sums_is_that_of_each(pairs, data):
    examples, texts = [Example("x", "p", tuple(group)) for _, group in pairs], [text for text, _ in pairs]
    for metric in (Bleu(), ChrfMetric(word_order=1)):
        found = metric.compute(examples, texts).corpus["score"]
        aggregate, rows = load("aggregates", found.aggregate), np.array(found.rows, dtype=float)
        weights = data.draw(st.lists(st.tuples(*[st.integers(0, 3)] * len(rows)), min_size=4, max_size=4))
        sums = (np.array(weights, dtype=float) @ rows).reshape(2, 2, -1)
        with np.errstate(all="raise"):
            together = aggregate(sums)
        assert together.shape == (2, 2)
        for i, j in np.ndindex(2, 2):
            assert together[i, j] == pytest.approx(float(aggregate(sums[i, j])), abs=1e-9)


def test_long_texts_without_any_match():
    assert_equal_to_the_api([Example("x", "p", ("a b c d e",)), Example("y", "p", ("a b",))], ["1 2 3 4 5 6", "7 8"])


@pytest.mark.parametrize("other", [(3, 0, 0), (0, 3, 0), (0, 0, 0), (3, 3, 0), (4, 3, 2)])
def test_orders_that_text_or_reference_lacks_do_not_count_in_chrf(other):
    row = [5, 4, 2, *other] * 3
    assert float(load("aggregates", "chrf")(np.array(row))) == pytest.approx(CHRF()._compute_f_score(row))


def test_an_interval_is_that_of_sacrebleu_on_resampled_texts():
    """A bootstrap over rows is a bootstrap over texts: each resample scored whole by sacrebleu."""
    examples, texts = made_up(40)
    examples = [Example(e.id, "p", (e.references[0] + " x",)) for e in examples]
    rows = np.array(Bleu().compute(examples, texts).corpus["score"].rows, dtype=float)
    found = interval(rows, load("aggregates", "bleu"), resamples=100, seed=3)
    drawn = np.random.default_rng(3).integers(0, 40, size=(100, 40))
    scores = [
        BLEU(force=True).corpus_score([texts[i] for i in draw], [[examples[i].references[0] for i in draw]]).score
        for draw in drawn
    ]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(scores, [0.025, 0.975])))
