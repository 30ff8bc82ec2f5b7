"""What advantages are divided by, lambda by length, and the running moments, each against its definition."""

from __future__ import annotations

import math
from statistics import fmean, pvariance, stdev
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlgf_cli.functional import advantages as adv
from rlgf_cli.functional.stats import MEMORY, running_moments, spread_of


def numbers(low: float = -3.0, high: float = 3.0) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False).map(lambda x: round(x, 3))


GROUPS = st.lists(st.lists(numbers(), min_size=2, max_size=5), min_size=1, max_size=4)


def shuffled(groups: list[list[float]], random: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores in any order, with the numbers of their groups, which are only names."""
    flat = [(5 * g - 4, value) for g, group in enumerate(groups) for value in group]
    random.shuffle(flat)
    return torch.tensor([v for _, v in flat], dtype=torch.float64), torch.tensor([g for g, _ in flat])


# --- divided by what the run has seen


@given(arrays(np.float64, (3, 5), elements=numbers()), arrays(np.bool_, (3, 5)), st.sampled_from([0.0, 0.4, 30.0]))
def test_divide_centres_over_the_mask_and_divides_by_the_given_spread(
    values: np.ndarray, mask: np.ndarray, spread: float
) -> None:
    found = adv.divide(torch.from_numpy(values), torch.from_numpy(mask), spread)
    chosen = values[mask].tolist()
    expected = [(v - fmean(chosen)) / (spread or 1.0) for v in chosen]
    assert found[torch.from_numpy(mask)].tolist() == pytest.approx(expected, abs=1e-9)
    assert not found[~torch.from_numpy(mask)].any()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_divide_takes_nothing_from_outside_the_mask(garbage: float) -> None:
    mask = torch.tensor([[True, False], [True, False]])
    found = adv.divide(torch.tensor([[1.0, garbage], [2.0, garbage]]), mask, 0.5)
    assert found.tolist() == [[-1.0, 0.0], [1.0, 0.0]]


# --- within a group


@given(GROUPS, st.randoms(), st.booleans(), st.sampled_from([-7.0, 0.0, 40.0]))
def test_group_advantages_by_definition_divided_or_not(
    groups: list[list[float]], random: Any, scaled: bool, shift: float
) -> None:
    scores, names = shuffled(groups, random)
    found = adv.group_advantages(scores + shift, names, scaled=scaled)
    for i, name in enumerate(names.tolist()):
        members = [float(s) for s, other in zip(scores, names, strict=True) if other == name]
        divisor = stdev(members) + 1e-4 if scaled else 1.0
        assert float(found[i]) == pytest.approx((float(scores[i]) - fmean(members)) / divisor, abs=1e-6)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("size", [3, 5, 6, 7, 11])
@pytest.mark.parametrize("score", [0.1, 0.3, 0.7, 1 / 3, 123.4])
def test_equal_scores_are_worth_exactly_nothing(score: float, size: int, scaled: bool) -> None:
    """The mean of seven times 0.1 is not 0.1 in float32; what is left over would be divided by 1e-4."""
    scores = torch.tensor([score] * size + [0.0, 1.0])
    groups = torch.tensor([4] * size + [2, 2])
    found = adv.group_advantages(scores, groups, scaled=scaled)
    assert found[:size].tolist() == [0.0] * size
    assert found[size] < 0 < found[size + 1]


# --- lambda by length


@given(st.lists(st.integers(0, 500), min_size=1, max_size=5), st.sampled_from([0.05, 0.5, 2.0]))
def test_lambda_by_length_is_vapos(lengths: list[int], alpha: float) -> None:
    found = adv.length_adaptive_lambdas(torch.tensor(lengths), alpha)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([max(0.0, 1 - 1 / (alpha * max(n, 1))) for n in lengths])


# --- moments of the run


@given(st.lists(st.lists(numbers(), min_size=1, max_size=4), min_size=1, max_size=8))
def test_the_first_batches_weigh_the_same_whatever_their_sizes(batches: list[list[float]]) -> None:
    moments: list[float] | None = None
    for batch in batches:
        moments = running_moments(moments, batch)
    assert moments is not None and moments[0] == len(batches)
    mean = fmean(fmean(batch) for batch in batches)
    square = fmean(fmean(v * v for v in batch) for batch in batches)
    assert moments[1:] == pytest.approx([mean, square], abs=1e-9)
    assume(square - mean * mean > 1e-6)
    assert spread_of(moments) == pytest.approx(math.sqrt(square - mean * mean), abs=1e-6)


def test_one_batch_has_its_own_standard_deviation() -> None:
    values = [0.2, 0.9, -4.0, 1.5]
    assert spread_of(running_moments(None, values)) == pytest.approx(math.sqrt(pvariance(values)))


def test_old_batches_are_forgotten() -> None:
    """The first hundred are averaged; from then on each new one weighs a hundredth."""
    moments: list[float] | None = None
    expected = 0.0
    for i in range(3 * MEMORY):
        value = float(i >= MEMORY)
        moments = running_moments(moments, [value])
        expected = expected if i < MEMORY else 0.99 * expected + 0.01 * value
        assert moments[1] == pytest.approx(expected)
    assert MEMORY == 100 and moments is not None
    assert moments[1] == pytest.approx(1 - 0.99 ** (2 * MEMORY))


@pytest.mark.parametrize("value", [0.0, 0.1, -0.7, 1 / 3, 1e6 / 3, -1e-6 / 7])
def test_equal_scores_have_no_spread_not_even_that_of_rounding(value: float) -> None:
    moments: list[float] | None = None
    for size in (3, 7, 5, 11, 64):
        moments = running_moments(moments, [value] * size)
        assert spread_of(moments) == 0.0


@pytest.mark.parametrize(("shift", "spread"), [(1.0, 1e-3), (1000.0, 0.1), (0.0, 1e-9)])
def test_a_small_spread_is_found_beside_a_large_mean(shift: float, spread: float) -> None:
    assert spread_of(running_moments(None, [shift - spread, shift + spread])) == pytest.approx(spread, rel=1e-3)
