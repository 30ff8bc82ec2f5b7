"""Every algorithm of the catalogue ends where it should, on a task where that is known exactly (tests/learning.py).

Nothing is random from run to run, but other processors round otherwise. The limits were therefore chosen with seeds 0
to 4, of which the tests run the first; what the five gave is said beside them.
"""

from __future__ import annotations

from statistics import fmean, median
from typing import Any

import pytest

from algorithms import NAMES
from learning import BEST, GUIDE, IMPROVED, START, learned, start, value_of
from rlgf_cli.models.loaded import Loaded

MC: dict[str, Any] = {"advantage": "guide_mc", "mc_samples": 4}


@pytest.fixture(scope="module")
def beginner() -> Loaded:
    return start()


def value_after(beginner: Loaded, algorithm: str, seed: int = 0, **parameters: Any) -> float:
    (value,), _ = learned(beginner, algorithm, seed, **parameters)
    return value


def test_the_start_is_what_was_meant(beginner: Loaded) -> None:
    """And the levels are apart: what follows can tell them from each other."""
    assert value_of(beginner) == pytest.approx(START, abs=0.01)
    assert START + 0.1 < GUIDE < IMPROVED - 0.3 < BEST - 0.6


OWN: dict[str, dict[str, Any]] = {
    "ppo": {},
    "ppo++": {"rollin_prob": 0.5},
    "lols": {"rollin_prob": 0.5},
    "d2lols": {"rollin_prob": 0.5, "switch_step": 5},
    "grpo": {},
    "rloo": {},
    "grpo++": {"rollin_prob": 0.5},
    "rloo++": {"rollin_prob": 0.5},
    "luffy": {},
    "mix": {},
    "chord-phi": {"guide_coef_decay": 20},
    "hpt": {},
    "on-failure": {},
    "pope": {},
}
HELD = {"chord": {"guide_coef_decay": 20}, "uft": {"hint_steps": 20}, "prefix-rft": {"hint_steps": 20}}
"""What learns from its own roll-outs, and is held near the guide's texts by their likelihood, or begins behind them."""


def test_every_algorithm_is_held_to_its_level() -> None:
    assert {*OWN, *HELD, "aggrevated", "bc-guide", "dagger"} == set(NAMES)


@pytest.mark.parametrize("algorithm", OWN)
def test_whoever_learns_from_its_own_roll_outs_finds_the_optimum(beginner: Loaded, algorithm: str) -> None:
    assert value_after(beginner, algorithm, **OWN[algorithm]) > 0.9  # five seeds of each: 0.932 to 0.973


@pytest.mark.parametrize("algorithm", HELD)
def test_whoever_mixes_the_guides_likelihood_with_its_own_roll_outs_passes_the_guide(
    beginner: Loaded, algorithm: str
) -> None:
    assert value_after(beginner, algorithm, **HELD[algorithm]) > GUIDE + 0.1  # two seeds: 0.571 to 0.948


@pytest.mark.parametrize("algorithm", ["bc-guide", "dagger"])
def test_whoever_imitates_the_guide_ends_at_its_level(beginner: Loaded, algorithm: str) -> None:
    # the guide 0.356, the start 0.220; five seeds: bc-guide 0.347 to 0.398, dagger 0.348 to 0.426
    assert value_after(beginner, algorithm) == pytest.approx(GUIDE, abs=0.09)


@pytest.mark.parametrize("parameters", [{}, {"credit": "cut"}, MC], ids=["prefix", "cut", "guide_mc"])
def test_aggrevated_passes_the_guide(beginner: Loaded, parameters: dict[str, Any]) -> None:
    """By the guide's values alone (credit: cut, guide_mc) to the best that one step over it can do, and no further.

    Under credit: prefix, roll-ins that end by themselves are scored as they are, so that it may find more than that.
    """
    value = value_after(beginner, "aggrevated", **parameters)
    # five seeds: prefix 0.959 to 0.966, cut 0.655 to 0.668, guide_mc 0.661 to 0.667
    assert value > GUIDE + 0.15
    assert value < IMPROVED or not parameters


@pytest.mark.slow
def test_aggrevateds_variants_over_five_seeds(beginner: Loaded) -> None:
    """What holds in every seed, and no order of variants that are close. benchmarks/learning.py prints the table."""

    def over_seeds(**parameters: Any) -> tuple[list[float], list[dict[str, Any]]]:
        found = [learned(beginner, "aggrevated", seed, **parameters) for seed in range(5)]
        return [values[-1] for values, _ in found], [row for _, rows in found for row in rows[-10:]]

    first, _ = over_seeds()
    inner, rows = over_seeds(cut="inner")
    at_cut, _ = over_seeds(credit="cut")
    once, _ = over_seeds(advantage="guide_mc")
    four, _ = over_seeds(**MC)
    # cut: inner shortens its roll-ins and falls behind, and the logged score, which is the guide's, hides it
    assert max(inner) < min(first) - 0.2  # 0.177 to 0.668, the default 0.959 to 0.966
    assert fmean(row["score/mean"] for row in rows) > GUIDE - 0.1
    assert fmean(row["rollin/tokens"] for row in rows) < 1.5
    # everything else passes the guide; by the guide's values alone no further than they lead
    assert min(first) > GUIDE + 0.15
    assert all(GUIDE + 0.15 < value < IMPROVED for value in at_cut + four)
    # one text on each side is noisy: a seed may settle on a wrong word, but not most of them
    assert median(once) > GUIDE + 0.15 and max(once) < IMPROVED  # 0.654 0.501 0.658 0.607 0.664
