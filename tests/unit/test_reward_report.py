"""What a trained reward is said to be worth: every figure by hand, and the warning where length gives it away."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from rlgf_cli.config.train_reward import TrainRewardConfig
from rlgf_cli.stats import ranking
from rlgf_cli.supervised import reward_data, reward_plots, reward_report
from rlgf_cli.supervised.reward_data import Sample

CONFIG = TrainRewardConfig(output="x", model={"name": "x"}, data="x", eval_fraction=0.25)


def test_a_classifier() -> None:
    """Labels bad and good; odds of good: 2, -1 (good texts), -2, 0, 1 (bad ones)."""
    logits = np.array([[0, 2], [1, 0], [0, -2], [1, 1.0], [-1, 0]], dtype=np.float32)
    kinds = ["reference", "reference", "cut", "cut", "loop"]
    report = reward_report.of_classifier(logits, np.array([1, 1, 0, 0, 0]), ["bad", "good"], kinds, [10, 9, 10, 3, 5])
    found = report.figures
    sigmoid = [1 / (1 + math.exp(-x)) for x in (2, -1, -2, 0, 1)]
    assert (found["good"], found["n"], found["accuracy"]) == ("good", 5, 3 / 5)
    assert found["auc"] == pytest.approx(4 / 6)  # 2 beats three; -1 beats -2
    assert (found["length_matched_auc"], found["length_matched_pairs"]) == (1.0, 2)  # 10 and 9 with 10
    assert found["length_auc"] == 4.5 / 6
    assert found["brier"] == pytest.approx(sum((p - t) ** 2 for p, t in zip(sigmoid, [1, 1, 0, 0, 0], strict=True)) / 5)
    assert found["mean_score"] == pytest.approx(sum(sigmoid) / 5)
    cut, loop, reference = (found["kinds"][kind] for kind in ("cut", "loop", "reference"))
    assert (cut["n"], cut["accuracy"], cut["auc"]) == (2, 1.0, 0.75)
    assert (loop["n"], loop["accuracy"], loop["auc"], loop["length_matched_auc"]) == (1, 0.0, 0.5, None)
    assert (reference["n"], reference["accuracy"], reference["auc"]) == (2, 0.5, None)
    assert reference["mean_score"] == pytest.approx((sigmoid[0] + sigmoid[1]) / 2)
    assert found["confusion"]["kinds"] == {"cut": [2, 0], "loop": [0, 1], "reference": [1, 1]}
    assert found["threshold"] == pytest.approx((sigmoid[3] + sigmoid[4]) / 2)
    assert (found["good_flagged"], found["bad_flagged"]) == (0.5, pytest.approx(2 / 3))
    assert (cut["flagged"], loop["flagged"], reference["flagged"], found["flagged"]) == (1.0, 0.0, 0.5, 3 / 5)
    assert "taken_for" not in found


def test_more_labels_than_two_are_the_last_one_against_the_rest() -> None:
    logits = np.log(np.array([[0.2, 0.3, 0.5], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7]]))
    report = reward_report.of_classifier(logits, np.array([2, 0, 1]), ["a", "b", "c"], ["c", "a", "b"], [1, 1, 1])
    assert {kind: found["mean_score"] for kind, found in report.figures["kinds"].items()} == pytest.approx(
        {"a": 0.1, "b": 0.7, "c": 0.5}
    )
    assert report.figures["auc"] == 0.5 and report.figures["accuracy"] == pytest.approx(2 / 3)
    # good: 0.5, bad: 0.1 and 0.7; cut at 0.3, or at 0.6, the errors are half apart: 0 and 1/2, or 1 and 1/2
    assert report.figures["threshold"] == pytest.approx(0.3)
    shares = {"a": {"a": 1.0, "b": 0.0}, "b": {"a": 0.0, "b": 0.0}, "c": {"a": 0.0, "b": 0.0}}
    assert report.figures["taken_for"] == shares


def test_a_text_below_the_threshold_is_taken_for_the_most_probable_bad_label() -> None:
    """Also where the good label is the most probable of all, and not where the threshold is reached."""
    logits = np.log(np.array([[0.2, 0.3, 0.5], [0.45, 0.15, 0.4], [0.1, 0.2, 0.7]]))
    assert ranking.predicted_labels(logits, 0.6).tolist() == [1, 0, 2]
    assert ranking.predicted_labels(logits, 0.35).tolist() == [2, 2, 2]


def test_texts_of_one_score_have_no_threshold() -> None:
    found = pairs_report(chosen=np.ones(3), rejected=np.ones(3))
    flagging = [found["threshold"], found["good_flagged"], found["bad_flagged"], found["chosen"]["flagged"]]
    assert flagging == [None] * 4
    assert reward_report.table(found)[1][0][-1] == "-"


def pairs_report(**changes: Any) -> dict[str, Any]:
    """Three pairs; the first two have one chosen text."""
    given: dict[str, Any] = {
        "chosen": np.array([1, 1, 0.5]), "rejected": np.array([0, 1, 2.0]), "texts": ["x", "x", "y"],
        "kinds": ["cut", "loop", "cut"], "chosen_words": [4, 4, 8], "rejected_words": [4, 6, 6],
    }  # fmt: skip
    return reward_report.of_pairs(**{**given, **changes}).figures


def test_pairs() -> None:
    found = pairs_report()
    assert (found["n"], found["accuracy"], found["length_accuracy"]) == (3, 0.5, 0.5)  # right, tie, wrong
    assert found["auc"] == pytest.approx(2.5 / 6)  # 1 and 0.5 against 0, 1, 2
    assert found["chosen"] == {"n": 2, "mean_score": 0.75, "flagged": 0.5}
    sure = [1 / (1 + math.exp(-x)) for x in (1, 0, -1.5)]
    assert found["brier"] == pytest.approx(sum((1 - p) ** 2 for p in sure) / 3)
    assert sum(b["n"] for b in found["calibration"]) == 6
    cut = found["kinds"]["cut"]
    assert (cut["n"], cut["accuracy"], cut["mean_score"], cut["length_accuracy"]) == (2, 0.5, 1.0, 0.75)
    assert found["threshold"] == 0.75  # below it are half of the chosen texts, above it two thirds of the rejected
    assert (found["good_flagged"], found["bad_flagged"]) == (0.5, pytest.approx(1 / 3))
    assert (found["flagged"], cut["flagged"], found["kinds"]["loop"]["flagged"]) == (pytest.approx(1 / 3), 0.5, 0.0)
    assert (cut["length_matched_auc"], cut["length_matched_pairs"]) == (1.0, 1)


def test_the_table_has_a_row_for_all_and_for_every_kind() -> None:
    header, rows = reward_report.table(pairs_report())
    assert header[:3] == ["kind", "n", "accuracy"] and header[-3:] == ["longer chosen", "mean score", "flagged"]
    assert rows[0] == ["all", "3", "0.500", "0.417", "1.000", "0.583", "0.500", "1.000", "0.333"]
    assert [row[0] for row in rows] == ["all", "cut", "loop", "(chosen)"]
    assert rows[3] == ["(chosen)", "2", "-", "-", "-", "-", "-", "0.750", "0.500"]


def of_lengths(chosen_words: list[int], rejected_words: list[int]) -> str | None:
    """The warning of pairs of two kinds by turns with these numbers of words."""
    count = len(chosen_words)
    kinds = [("cut", "loop")[i % 2] for i in range(count)]
    zeros, texts = np.zeros(count), [str(i) for i in range(count)]
    report = reward_report.of_pairs(zeros, zeros, texts, kinds, chosen_words, rejected_words)
    return reward_report.length_warning(report.figures)


@pytest.mark.parametrize(("good", "bad"), [([20, 30] * 10, [4, 5] * 10), ([4, 5] * 10, [20, 30] * 10)])
def test_length_that_tells_is_told(good: list[int], bad: list[int]) -> None:
    warning = of_lengths(good, bad)
    auc = "1.00" if good[0] > bad[0] else "0.00"
    assert warning is not None
    assert f"all AUC {auc}" in warning and f"kind cut AUC {auc}" in warning and "leave such a kind out" in warning


def test_length_within_pairs_is_told_even_where_it_varies_more_between_prompts() -> None:
    warning = of_lengths([5, 50, 500] * 6, [4, 49, 499] * 6)
    assert warning is not None and "pairs with the longer text chosen 1.00" in warning and "AUC 0" not in warning


def test_length_that_says_nothing_is_not_told() -> None:
    assert of_lengths([5] * 30, [5] * 30) is None


def test_few_texts_are_not_told_of_what_chance_does() -> None:
    """Outside the limits, and within three standard errors: the same shares of more texts give a warning."""
    few = [9, 9, 9, 9, 9, 1, 1, 1], [4, 4, 4, 4, 4, 4, 4, 4]  # AUC and share of longer chosen: 5 of 8
    some = [9, 9, 9, 9, 9, 9, 1, 1], few[1]
    assert of_lengths(*few) is None and of_lengths(*some) is None
    assert of_lengths(*(side * 4 for side in few)) is None, "0.625 is within the limits"
    warning = of_lengths(*(side * 4 for side in some))
    assert warning is not None and "(all AUC 0.75; .50 is chance)" in warning


def test_the_error_of_noise_is_that_of_the_wilcoxon_test() -> None:
    """Perfect separation warns from the size on at which scipy's z is 3, without its correction for continuity."""
    for good, bad in ((6, 6), (7, 7), (3, 15), (4, 40)):
        logits = np.zeros((good + bad, 2))
        words = [*range(100, 100 + good), *range(bad)]
        labels = np.repeat([1, 0], [good, bad])
        report = reward_report.of_classifier(logits, labels, ["bad", "good"], ["x"] * (good + bad), words)
        z = mannwhitneyu(words[:good], words[good:], use_continuity=False, method="asymptotic").pvalue
        warned = reward_report.length_warning(report.figures) is not None
        assert warned == (z < math.erfc(3 / math.sqrt(2))), (good, bad)


def test_names_that_look_like_formulas_are_drawn(tmp_path: Any) -> None:
    logits = np.array([[0, 1], [1, 0.0]])
    report = reward_report.of_classifier(logits, np.array([1, 0]), ["$a_", "$b^"], [r"$\frac$", "$x"], [1, 2])
    reward_plots.write(tmp_path / "plots", report)
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["calibration.png", "confusion.png", "scores.png"]


def sample(label: str, group: str) -> Sample:
    return Sample("", ("x",), label, label, group, False, "x:1")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 8)), min_size=2, max_size=60), st.integers(0, 3))
def test_a_group_is_never_on_both_sides(rows: list[tuple[str, int]], seed: int) -> None:
    samples = [sample(label, str(group)) for label, group in rows]
    try:
        train, held_out = reward_data.split(samples, CONFIG.model_copy(update={"seed": seed}))
    except reward_data.UserError:
        return
    assert not {s.split_key for s in train} & {s.split_key for s in held_out}
    assert {s.label for s in train} == {s.label for s in samples}
    assert held_out and len(train) + len(held_out) == len(samples)


@given(st.integers(1, 30), st.integers(2, 30))
def test_groups_of_one_are_held_out_by_class(first: int, second: int) -> None:
    samples = [sample("a", str(i)) for i in range(first)] + [sample("b", f"b{i}") for i in range(second)]
    _, held_out = reward_data.split(samples, CONFIG)
    wanted = {"a": min(max(1, round(first / 4)), first - 1), "b": min(max(1, round(second / 4)), second - 1)}
    assert {label: sum(s.label == label for s in held_out) for label in wanted} == wanted
