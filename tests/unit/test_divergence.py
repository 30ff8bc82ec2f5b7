"""When score and watched figure have gone apart: by hand, against other definitions, and in simulated runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from rlgf_cli.training.checkpoint import TrainerState
from rlgf_cli.training.divergence import RISK, HeldOutResult, Watched, compare_watched, sign_test


def evaluation(scores: Sequence[float], watched: Sequence[float]) -> HeldOutResult:
    named = [{f"p{i}": float(v) for i, v in enumerate(values)} for values in (scores, watched)]
    return HeldOutResult({}, *named)


def course(evaluations: Sequence[HeldOutResult], patience: int = 2) -> tuple[list[dict[str, float]], Watched]:
    """The figures of each evaluation, at steps 10, 20, ..., and what is remembered at the end."""
    state, rows = Watched(), []
    for n, now in enumerate(evaluations, 1):
        state, row = compare_watched(state, now, step=10 * n, patience=patience)
        rows.append(row)
    return rows, state


def flat(score: float, watched: float, count: int = 20) -> HeldOutResult:
    return evaluation([score] * count, [watched] * count)


def diverged(rows: Sequence[dict[str, float]]) -> list[float | None]:
    return [row.get("eval/diverged") for row in rows]


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_sign_test_is_the_binomial_one(hits: int, misses: int) -> None:
    expected = binomtest(hits, hits + misses, alternative="greater").pvalue if hits + misses else 1.0
    assert sign_test(hits, misses) == pytest.approx(expected, rel=1e-9)


def test_a_fall_while_the_score_rises_counts_when_it_comes_again() -> None:
    rows, state = course([flat(0, 0.5), flat(1, 0.6), flat(2, 0.4), flat(3, 0.3), flat(4, 0.7), flat(5, 0.1)])
    assert diverged(rows) == [None, 0, 0, 1, 0, 0]
    assert rows[0] == {"eval/watch": 0.5}
    assert rows[3] == {
        "eval/watch": pytest.approx(0.3), "eval/watch_best_step": 20, "eval/watch_change": pytest.approx(-0.3),
        "eval/score_change": 2, "eval/diverged": 1,
    }  # fmt: skip
    assert (state.step, state.evaluations, state.streak) == (50, 6, 1)
    assert state.best == pytest.approx(0.7) and state.scores["p3"] == 4


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_patience_is_evaluations_in_a_row(patience: int) -> None:
    rows, _ = course([flat(0, 0.5), *[flat(1, 0.4)] * 4], patience)
    assert diverged(rows) == [None, *[float(n >= patience) for n in range(1, 5)]]


@pytest.mark.parametrize(
    ("score", "watched"),
    [(1, 0.5), (1, 0.6), (0, 0.4), (-1, 0.4)],
    ids=["unmoved", "both rise", "the score stays", "both fall"],
)
def test_anything_else_is_no_divergence(score: float, watched: float) -> None:
    rows, _ = course([flat(0, 0.5), *[flat(score, watched)] * 5])
    assert set(diverged(rows)) == {None, 0.0}


def test_of_equal_best_ones_the_first_is_kept() -> None:
    assert course([flat(0, 0.5), flat(1, 0.5), flat(2, 0.5)])[1].step == 10


def fallen(falls: int, count: int = 20) -> HeldOutResult:
    """The watched figure is lower for some prompts and a little higher for the others; all scores rise."""
    return evaluation([1] * count, [0.0] * falls + [0.51] * (count - falls))


def test_the_more_evaluations_before_it_the_more_prompts_must_fall() -> None:
    """15 of 20 have p = 0.0207, 16 have 0.0059: below 0.05, 0.05 / 3 and 0.05 / 8, and above 0.05 / 9."""
    for before, falls, expected in [(1, 15, 1), (1, 14, 0), (2, 15, 1), (3, 15, 0), (8, 16, 1), (9, 16, 0), (9, 17, 1)]:
        rows, _ = course([*[flat(0, 0.5)] * before, fallen(falls)], patience=1)
        assert rows[-1]["eval/diverged"] == expected, (before, falls)
        assert rows[-1]["eval/watch_change"] < 0


def test_a_lower_mean_alone_is_no_fall_nor_are_lower_signs_alone() -> None:
    """One prompt that falls far; and many that fall by a hair while one rises far."""
    far = evaluation([1] * 20, [-9] + [0.5] * 19)
    hair = evaluation([1] * 20, [0.499] * 19 + [9])
    for now in (far, hair):
        assert diverged(course([flat(0, 0.5), now], patience=1)[0]) == [None, 0]


def test_a_score_that_rises_for_a_few_is_not_higher() -> None:
    now = evaluation([9] * 3 + [0] * 17, [0.1] * 20)
    assert diverged(course([flat(0, 0.5), now], patience=1)[0]) == [None, 0]


def test_a_score_that_rises_by_a_hair_and_falls_far_is_not_higher() -> None:
    now = evaluation([0.01] * 19 + [-9], [0.1] * 20)
    assert diverged(course([flat(0, 0.5), now], patience=1)[0]) == [None, 0]


def test_prompts_are_paired_by_their_names() -> None:
    """In another order, and with prompts that only one side could score."""
    now = evaluation([1] * 20, [v / 20 for v in range(20)])
    later = HeldOutResult({}, now.scores, dict(reversed([(k, v - 0.01) for k, v in now.watched.items() if k != "p19"])))
    rows, _ = course([now, later])
    assert rows[1]["eval/watch_change"] == pytest.approx(-0.01)
    assert rows[1]["eval/watch"] == pytest.approx(fmean(range(19)) / 20 - 0.01)
    assert rows[1]["eval/watch_skipped"] == 1 and "eval/watch_skipped" not in rows[0]


def test_the_best_is_chosen_on_the_prompts_that_both_have() -> None:
    """An easy prompt that one evaluation alone has a number for makes it no better, and no worse."""
    scores, ten = flat(0, 0).scores, [f"p{i}" for i in range(10)]
    before = HeldOutResult({}, scores, dict.fromkeys(ten, 0.5))
    worse = HeldOutResult({}, scores, {**dict.fromkeys(ten, 0.4), "p19": 9.0})
    assert course([before, worse])[1].step == 10
    better = HeldOutResult({}, scores, {**dict.fromkeys(ten, 0.6), "p19": -9.0})
    rows, state = course([before, better])
    assert rows[1]["eval/watch"] < rows[0]["eval/watch"]
    assert state.step == 20 and state.best == rows[1]["eval/watch"]


def test_the_state_survives_the_way_through_a_file() -> None:
    _, state = course([flat(0, 0.1 + 0.2), flat(1, 0.2)])
    saved = TrainerState(step=20, watched=state)
    assert TrainerState.from_json(json.loads(json.dumps(asdict(saved)))) == saved
    older = {key: value for key, value in asdict(saved).items() if key != "watched"}
    assert TrainerState.from_json(older).watched == Watched(), "a checkpoint from before there was a watch"


# --- simulated runs: prompts of their own difficulty, texts whose quality varies around it


def rings(rng: np.random.Generator, *, count: int, evaluations: int, fall: float, memory: float = 0.0) -> bool:
    """Whether a run rings whose score rises all the time and whose watched quality falls by ``fall`` until its end.

    ``memory``: correlation of a prompt's noise from one evaluation to the next.
    """
    difficulty, noise = rng.normal(0.5, 0.2, count), rng.normal(0, 0.15, count)
    found = []
    for n in range(evaluations):
        noise = memory * noise + (1 - memory**2) ** 0.5 * rng.normal(0, 0.15, count)
        quality = difficulty + noise - fall * n / evaluations
        found.append(evaluation(np.full(count, n), quality))
    return 1.0 in diverged(course(found)[0])


@pytest.mark.parametrize(("count", "memory"), [(40, 0.0), (40, 0.7), (100, 0.5)])
def test_noise_alone_seldom_rings(count: int, memory: float) -> None:
    """Runs of thirty evaluations, the score rising in each. One ring in twenty would be 6 of 120."""
    rng = np.random.default_rng(0)
    rung = sum(rings(rng, count=count, evaluations=30, fall=0.0, memory=memory) for _ in range(120))
    assert rung <= 2 * RISK * 120


def test_a_fall_of_one_standard_deviation_rings() -> None:
    rng = np.random.default_rng(0)
    assert sum(rings(rng, count=100, evaluations=12, fall=0.15) for _ in range(20)) >= 19
