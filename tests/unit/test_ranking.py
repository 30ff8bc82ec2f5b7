"""AUC, length-matched AUC, calibration: against their definitions, and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, roc_auc_score, roc_curve

from rlgf_cli.metrics import ranking

SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12).map(np.array)  # ties are common
WORDS = st.integers(0, 40)
TEXTS = st.lists(st.tuples(st.integers(-3, 3).map(float), WORDS), min_size=1, max_size=15)


@given(SCORES, SCORES)
def test_auc_is_scikit_learns(positive, negative):
    truth = [1] * len(positive) + [0] * len(negative)
    assert ranking.auc(positive, negative) == pytest.approx(roc_auc_score(truth, [*positive, *negative]), abs=1e-12)


@given(SCORES, SCORES)
def test_auc_turns_with_the_sides_and_keeps_under_what_rises(positive, negative):
    value = ranking.auc(positive, negative)
    assert ranking.auc(negative, positive) == pytest.approx(1 - value)
    assert ranking.auc(-positive, -negative) == pytest.approx(1 - value)
    assert ranking.auc(np.exp(positive), np.exp(negative)) == value
    assert ranking.auc(positive, positive) == 0.5


def test_auc_of_one_side_is_no_number():
    assert ranking.auc(np.array([]), np.array([1.0])) is None
    assert ranking.auc(np.array([1.0]), np.array([])) is None


@given(SCORES, SCORES)
def test_the_threshold_has_the_most_equal_errors_of_all_cuts(good, bad):
    threshold = ranking.equal_error_threshold(good, bad)
    if len({*good, *bad}) < 2:
        assert threshold is None
        return
    truth, scores = [1] * len(good) + [0] * len(bad), np.array([*good, *bad])
    # scikit-learn's rates are those of score >= cut, the first of which lets none pass and the last all
    passed, found, _ = roc_curve(truth, scores, drop_intermediate=False)
    gap = abs(passed - (1 - found))[1:-1]
    alarms, missed = (good < threshold).mean(), (bad >= threshold).mean()
    assert threshold not in scores
    assert abs(alarms - missed) == pytest.approx(gap.min(), abs=1e-12)
    ties = np.isclose(gap, gap.min(), atol=1e-9)
    assert alarms + missed == pytest.approx((passed + 1 - found)[1:-1][ties].min(), abs=1e-12)


def test_the_threshold_lies_in_the_middle_of_a_gap():
    assert ranking.equal_error_threshold(np.array([3.0, 9.0]), np.array([1.0, -4.0])) == 2.0
    assert ranking.equal_error_threshold(np.array([1.0]), np.array([])) is None


@given(TEXTS, TEXTS)
def test_the_length_matched_auc_is_that_of_the_pairs_that_match(positive, negative):
    matching = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for p, a in positive
        for n, b in negative
        if 10 * abs(a - b) <= max(a, b)
    ]
    columns = [np.array(column) for texts in (positive, negative) for column in zip(*texts, strict=True)]
    value, pairs = ranking.length_matched_auc(*columns)
    assert pairs == len(matching)
    assert value == (pytest.approx(sum(matching) / pairs) if pairs else None)


@given(SCORES, SCORES, st.integers(0, 50))
def test_texts_of_one_length_all_match(positive, negative, words):
    same = [np.full(len(side), words) for side in (positive, negative)]
    value, pairs = ranking.length_matched_auc(positive, same[0], negative, same[1])
    assert pairs == len(positive) * len(negative)
    assert value == pytest.approx(ranking.auc(positive, negative))


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40))
def test_calibration_is_scikit_learns(rows):
    probability = np.array([p for p, _ in rows])
    truth = np.array([t for _, t in rows], dtype=int)
    assume(not np.isclose(probability * 10, np.round(probability * 10), atol=1e-9).any())  # edges go either way
    assert ranking.brier_score(probability, truth) == pytest.approx(brier_score_loss(truth, probability, pos_label=1))
    bins = ranking.calibration(probability, truth)
    observed, predicted = (
        calibration_curve(truth, probability, n_bins=10) if 0 < truth.sum() < len(truth) else (None, None)
    )
    used = [b for b in bins if b["n"]]
    assert sum(b["n"] for b in bins) == len(rows) and all(b["low"] <= b["probability"] <= b["high"] for b in used)
    if observed is not None:
        assert [b["observed"] for b in used] == pytest.approx(list(observed))
        assert [b["probability"] for b in used] == pytest.approx(list(predicted))
    by_hand = sum(
        abs(sum(p - t for p, t in rows if b["low"] <= p < b["high"])) for b in bins
    ) / len(rows)  # fmt: skip
    assert ranking.expected_calibration_error(bins) == pytest.approx(by_hand)


def test_what_is_sure_and_right_is_calibrated():
    probability = np.array([0.0, 1.0, 1.0])
    bins = ranking.calibration(probability, np.array([0, 1, 1]))
    assert (bins[0]["n"], bins[9]["n"]) == (1, 2)
    assert ranking.expected_calibration_error(bins) == 0.0
    wrong = ranking.calibration(probability, np.array([1, 0, 0]))
    assert ranking.expected_calibration_error(wrong) == 1.0 == ranking.brier_score(probability, np.array([1, 0, 0]))
