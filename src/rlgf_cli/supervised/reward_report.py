"""The figures of a reward model on held-out texts: per kind of bad text, and compared with the length alone.

Accuracy on held-out data says little where the classes differ in length or where one kind of failure is easy: so every
kind has figures of its own, beside those that the number of words alone would reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlgf_cli.stats import ranking

LENGTH_LIMITS = (0.35, 0.65)
"""An AUC of the length outside of these limits gives a warning (0.5: length says nothing, 0 or 1: everything). They are
this package's choice, without a source."""
_NOISE = 3.0
"""For a warning the AUC must also lie this many standard errors from 0.5: by chance that happens once in 400, so that a
dozen kinds together seldom give a false warning."""

_COLUMNS = {
    "n": "n",
    "accuracy": "accuracy",
    "auc": "AUC",
    "length_matched_auc": "AUC, equal length",
    "length_auc": "AUC of length",
    "length_accuracy": "longer chosen",
    "mean_score": "mean score",
    "flagged": "flagged",
}


@dataclass(frozen=True)
class Report:
    """``figures``: the content of evaluation.json. ``scores``: those of the texts of every kind, for the plots."""

    figures: dict[str, Any]
    scores: dict[str, np.ndarray]


def of_classifier(
    logits: np.ndarray, labels: np.ndarray, names: Sequence[str], kinds: Sequence[str], words: Sequence[int]
) -> Report:
    """A classifier's report. logits [N, C], labels [N] (ids), C names, N kinds and word counts.

    The last label is the good one, as the ``classifier`` reward has it; texts are ranked by its log odds, and their
    score is its probability.
    """
    odds, probability = ranking.good_odds(logits), ranking.good_probability(logits)
    good, predicted = labels == len(names) - 1, logits.argmax(1)
    length, every = np.array(words), np.array(kinds)
    threshold, flags = _flagging(probability[good], probability[~good])

    def of_kind(inside: np.ndarray) -> dict[str, Any]:
        bad = inside & ~good
        return {
            "n": int(inside.sum()),
            "accuracy": float((predicted == labels)[inside].mean()),
            **_against(odds[good], length[good], odds[bad], length[bad]),
            "mean_score": float(probability[inside].mean()),
            "flagged": flags(probability[inside]),
        }

    members = {kind: every == kind for kind in sorted(set(kinds))}
    figures = {
        "good": names[-1],
        **threshold,
        **of_kind(np.full(len(labels), True)),
        **_calibrated(probability, good),
        "kinds": {kind: of_kind(inside) for kind, inside in members.items()},
        "confusion": {
            "predicted": list(names),
            "kinds": {
                kind: np.bincount(predicted[inside], minlength=len(names)).tolist() for kind, inside in members.items()
            },
        },
    }
    if len(names) > 2 and (limit := threshold["threshold"]) is not None:
        taken = ranking.predicted_labels(logits, limit)
        figures["taken_for"] = {
            kind: {name: float((taken[inside] == i).mean()) for i, name in enumerate(names[:-1])}
            for kind, inside in members.items()
        }
    return Report(figures, {kind: probability[inside] for kind, inside in members.items()})


def of_pairs(
    chosen: np.ndarray,
    rejected: np.ndarray,
    texts: Sequence[str],
    kinds: Sequence[str],
    chosen_words: Sequence[int],
    rejected_words: Sequence[int],
) -> Report:
    """A reward model's report on P pairs: scores [P] and [P], the chosen texts, the rejected texts' kinds.

    Accuracy is the share of pairs in the right order, a tie counting half. A chosen text that is in several pairs
    counts once in an AUC. Calibration takes every pair in both orders: the probability that the first of the two is
    the better one is sigmoid(difference of scores).
    """
    chosen, rejected = chosen.astype(np.float64), rejected.astype(np.float64)
    once = np.unique(np.array(texts), return_index=True)[1]
    every, good_words, bad_words = np.array(kinds), np.array(chosen_words), np.array(rejected_words)
    threshold, flags = _flagging(chosen[once], rejected)

    def of_kind(inside: np.ndarray) -> dict[str, Any]:
        return {
            "n": int(inside.sum()),
            "accuracy": _in_order(chosen[inside], rejected[inside]),
            **_against(chosen[once], good_words[once], rejected[inside], bad_words[inside]),
            "length_accuracy": _in_order(good_words[inside], bad_words[inside]),
            "mean_score": float(rejected[inside].mean()),
            "flagged": flags(rejected[inside]),
        }

    sure = np.exp(-np.logaddexp(0, rejected - chosen))
    members = {kind: every == kind for kind in sorted(set(kinds))}
    figures = {
        **threshold,
        **of_kind(np.full(len(chosen), True)),
        "chosen": {
            "n": len(once),
            "mean_score": float(chosen[once].mean()),
            "flagged": flags(chosen[once]),
        },
        **_calibrated(np.concatenate([sure, 1 - sure]), np.repeat([1, 0], len(sure))),
        "kinds": {kind: of_kind(inside) for kind, inside in members.items()},
    }
    return Report(figures, {"(chosen)": chosen[once], **{k: rejected[inside] for k, inside in members.items()}})


def _flagging(
    good: np.ndarray, bad: np.ndarray
) -> tuple[dict[str, float | None], Callable[[np.ndarray], float | None]]:
    """The threshold below which a text is called bad, with the shares of all good and all bad texts below it, and the
    function that gives the share of some scores that lie below it (None: there is no threshold).
    """
    threshold = ranking.equal_error_threshold(good, bad)

    def flags(scores: np.ndarray) -> float | None:
        return None if threshold is None else float((scores < threshold).mean())

    return {"threshold": threshold, "good_flagged": flags(good), "bad_flagged": flags(bad)}, flags


def _against(good: np.ndarray, good_words: np.ndarray, bad: np.ndarray, bad_words: np.ndarray) -> dict[str, Any]:
    matched, pairs = ranking.length_matched_auc(good, good_words, bad, bad_words)
    return {
        "auc": ranking.auc(good, bad),
        "length_matched_auc": matched,
        "length_matched_pairs": pairs,
        "length_auc": ranking.auc(good_words, bad_words),
        "auc_texts": [len(good), len(bad)],
    }


def _in_order(high: np.ndarray, low: np.ndarray) -> float:
    return float(((high > low) + 0.5 * (high == low)).mean())


def _calibrated(probability: np.ndarray, outcome: np.ndarray) -> dict[str, Any]:
    bins = ranking.calibration(probability, outcome)
    return {
        "brier": ranking.brier_score(probability, outcome),
        "expected_calibration_error": ranking.expected_calibration_error(bins),
        "calibration": bins,
    }


def table(figures: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: all held-out texts, then every kind."""
    columns = {name: title for name, title in _COLUMNS.items() if name in figures}
    rows = [("all", figures), *figures["kinds"].items()]
    if "chosen" in figures:
        rows.append(("(chosen)", figures["chosen"]))
    cells = [[kind, *(_cell(row.get(name)) for name in columns)] for kind, row in rows]
    return ["kind", *columns.values()], cells


def _cell(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def length_warning(figures: Mapping[str, Any]) -> str | None:
    """The warning that the number of words alone tells good texts from bad ones, beyond chance; None where it does not.

    Without any effect the AUC of P and N texts has the variance (P + N + 1) / (12 P N) (Mann and Whitney 1947), a share
    of n pairs 1 / (4 n); ties make both smaller.
    """
    low, high = LENGTH_LIMITS
    places = {"all": figures, **{f"kind {name}": f for name, f in figures["kinds"].items()}}
    effects = []
    for place, row in places.items():
        good, bad = row["auc_texts"]
        for name, what, variance in (
            ("length_auc", "AUC", (good + bad + 1) / (12 * good * bad) if good and bad else 0.0),
            ("length_accuracy", "pairs with the longer text chosen", 1 / (4 * row["n"])),
        ):
            value = row.get(name)
            if value is None or low <= value <= high:
                continue
            if abs(value - 0.5) > _NOISE * math.sqrt(variance):
                effects.append(f"{place} {what} {value:.2f}")
    if not effects:
        return None
    return (
        f"the number of words alone tells good texts from bad ones ({'; '.join(effects)}; .50 is chance): the reward "
        "may learn length. Even out the lengths or leave such a kind out, and go by the AUC on texts of equal length"
    )
