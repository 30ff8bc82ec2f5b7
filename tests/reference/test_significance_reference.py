"""The paired tests against sacrebleu's (Post 2018; `sacrebleu.significance.PairedTest`) on BLEU."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlgf_cli.stats.bootstrap import resampled
from rlgf_cli.stats.significance import bootstrap_p, p_value, randomised
from significance_cases import bleu, bleu_rows, commongen_texts, sacrebleu_says, toy_texts

SEED, RESAMPLES = 12345, 1000
CASES = [pytest.param("toy", id="made here"), pytest.param("commongen", id="CommonGen", marks=pytest.mark.realdata)]


@pytest.fixture(params=CASES)
def case(request):
    """Texts of two systems, their references, and what sacrebleu says: test -> (score, score, p)."""
    found = toy_texts(200, (0.7, 0.75)) if request.param == "toy" else commongen_texts()
    if found is None:
        pytest.skip("RLGF_REAL_DATA is not set")
    a, b, references = found
    return bleu_rows(a, references), bleu_rows(b, references), sacrebleu_says(a, b, references, RESAMPLES)


def test_sacrebleu_says_the_same(case):
    a, b, theirs = case
    scores = bleu(a.sum(axis=0)), bleu(b.sum(axis=0))
    assert scores == pytest.approx(theirs["ar"][:2])
    observed = np.array([scores[1] - scores[0]])
    settings = {"resamples": RESAMPLES, "seed": SEED}

    # the same swaps are drawn, so that the number is the same
    by_randomisation = p_value(randomised(b[None], a, bleu, **settings), observed)[0]
    assert by_randomisation == pytest.approx(theirs["ar"][2], abs=1.5 / RESAMPLES)

    # the same prompts are drawn; sacrebleu centres |d*|, where Riezler and Maxwell centre d*
    differences = resampled(b[None], bleu, **settings) - resampled(a[None], bleu, **settings)
    absolute = np.abs(differences)
    as_sacrebleu = (1 + ((absolute - absolute.mean()) > abs(observed)).sum()) / (1 + RESAMPLES)
    assert as_sacrebleu == pytest.approx(theirs["bs"][2], abs=1.5 / RESAMPLES)  # they compute in float32
    ours = bootstrap_p(differences, observed)[0]
    assert 1.4 < ours / theirs["bs"][2] < 3  # one side of two
    # two sides agree with randomisation; the two tests are not one, so this is near and not equal
    assert ours == pytest.approx(by_randomisation, abs=0.02 + 4 * math.sqrt(ours / RESAMPLES))
