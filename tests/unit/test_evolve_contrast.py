"""The difference of two sets: what a draw holds, and that an interval is as wide as theory says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rlgf_cli.evolve.contrast import Draw, Draws, by_seed, difference, draw


def a_set(name: str, seeds: int, texts: int) -> dict[str, list[int]]:
    return by_seed([f"{name}{i}" for i in range(seeds) for _ in range(texts)])


@given(st.integers(2, 12), st.integers(1, 4), st.integers(1, 4), st.integers(2, 30), st.integers(0, 99))
def test_a_draw_has_the_same_seeds_and_as_many_texts_of_both_without_a_copy(seeds, first, second, most, seed):
    sets = a_set("s", seeds, first), a_set("s", seeds, second)
    of = draw(*sets, most=most, count=5, seed=seed)
    assert of.paired and of.seed_counts == (seeds, seeds)
    assert of.seeds <= max(1, seeds // 2) and of.texts <= most
    for one in of.each:
        assert one.seeds[0] == one.seeds[1] and len(set(one.seeds[0])) == of.seeds
        for side in (0, 1):
            texts = one.texts[side].tolist()
            assert len(set(texts)) == len(texts) == of.texts
            assert set(texts) <= {i for name in one.seeds[side] for i in sets[side][name]}


def test_a_draw_is_half_of_the_seeds_or_as_many_as_the_texts_need():
    sets = a_set("s", 40, 3), a_set("s", 40, 5)
    half, few = (draw(*sets, most=most, count=3, seed=0) for most in (500, 30))
    assert (half.seeds, half.texts) == (20, 60)
    assert (few.seeds, few.texts) == (10, 30)


def test_sets_of_other_seeds_are_drawn_apart():
    of = draw(a_set("a", 10, 2), a_set("b", 30, 2), most=500, count=50, seed=0)
    assert not of.paired and of.seed_counts == (10, 30) and of.seeds == 5
    same = draw(a_set("a", 10, 2), a_set("b", 10, 2), most=500, count=9, seed=0)
    assert any([name[1:] for name in one.seeds[0]] != [name[1:] for name in one.seeds[1]] for one in same.each)


def test_a_seed_that_gave_nothing_is_a_seed():
    first = by_seed(["x", "y"], requested=["x", "y", "z", "w"])
    of = draw(first, a_set("s", 4, 2), most=9, count=20, seed=0)
    assert of.seed_counts == (4, 4) and of.texts == 0  # some draw has z and w


def test_draws_do_not_depend_on_the_order_of_the_records():
    names = [f"s{i // 2}" for i in range(12)]
    forward = draw(by_seed(names), by_seed(names), most=9, count=4, seed=1)
    backward = draw(by_seed(names[::-1]), by_seed(names[::-1]), most=9, count=4, seed=1)
    assert [one.seeds for one in forward.each] == [one.seeds for one in backward.each]


def test_one_seed_is_too_few():
    with pytest.raises(ValueError, match="two seeds"):
        draw(by_seed(["a", "a"]), a_set("s", 4, 1), most=9, count=3, seed=0)


@pytest.mark.parametrize(("seeds", "most"), [(40, 500), (40, 8), (6, 500)])
@pytest.mark.parametrize("paired", [True, False])
def test_of_a_mean_the_interval_is_students(seeds, most, paired):
    """Of means the truth is known: the variance of a mean over seeds, whether half of the seeds are drawn or a few."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(1, 1, seeds), rng.normal(0, 2, seeds)
    names = [[f"{'' if paired else side}{i}" for i in range(seeds)] for side in "ab"]
    of = draw(by_seed(names[0]), by_seed(names[1]), most=most, count=1500, seed=0)
    drawn = [
        np.array([values[one.texts[side]].mean() for one in of.each]) for side, values in ((0, first), (1, second))
    ]
    found = difference(*drawn, of, 0.95)
    variance = (first - second).var(ddof=1) if paired else first.var(ddof=1) + second.var(ddof=1)
    half = stats.t.ppf(0.975, seeds - 1) * math.sqrt(variance / seeds)
    assert found.value == pytest.approx((first - second).mean(), abs=0.1)
    assert found.high - found.value == pytest.approx(half, rel=0.06)
    assert found.value - found.low == pytest.approx(half, rel=0.06)


def test_of_a_count_the_interval_is_that_of_a_count_of_a_draw():
    """A sum over the drawn seeds grows with their number; its interval is that of as many seeds, not of all."""
    seeds = 60
    values = np.random.default_rng(1).poisson(4, seeds).astype(float)
    names = [f"s{i}" for i in range(seeds)]
    of = draw(by_seed(names), by_seed([f"t{i}" for i in range(seeds)]), most=500, count=1500, seed=0)
    drawn = np.array([values[one.texts[0]].sum() for one in of.each])
    found = difference(drawn, np.zeros(len(drawn)), of, 0.95)
    half = stats.t.ppf(0.975, seeds - 1) * (seeds / 2) * math.sqrt(values.var(ddof=1) / seeds)
    assert found.value == pytest.approx(values.mean() * seeds / 2, rel=0.02)
    assert found.high - found.value == pytest.approx(half, rel=0.06)


def test_sets_without_a_difference_have_one_of_zero():
    of = Draws([Draw((np.arange(2), np.arange(2)), (["a"], ["a"]))] * 3, 2, 1, (4, 4), True)
    same = np.array([1.0, 2.0, 5.0])
    assert difference(same, same, of, 0.9) == (0, 0, 0)
