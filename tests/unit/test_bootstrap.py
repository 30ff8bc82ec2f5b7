"""Bootstrap intervals against closed forms, and their coverage in a small simulation."""

from __future__ import annotations

import tracemalloc
from statistics import NormalDist

import numpy as np
import pytest

from rlgf_cli.stats.bootstrap import Interval
from significance_cases import excludes_zero, mean_interval


def test_large_samples_agree_with_the_normal_interval():
    data = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    for level in (0.8, 0.95, 0.99):
        half = NormalDist().inv_cdf((1 + level) / 2) * data.std() / np.sqrt(len(data))
        mean, low, high = mean_interval(data, level=level)
        assert mean == pytest.approx(data.mean(), abs=1e-12)
        assert low == pytest.approx(mean - half, abs=0.05 * half)
        assert high == pytest.approx(mean + half, abs=0.05 * half)


def test_two_values_have_a_known_distribution():
    # resampled means of {0, 1}: 0, .5, 1 with probability 1/4, 1/2, 1/4
    assert mean_interval([0.0, 1.0], level=0.95) == (0.5, 0.0, 1.0)
    assert mean_interval([0.0, 1.0], level=0.4) == (0.5, 0.5, 0.5)


def test_skewed_data_have_a_skewed_interval():
    mean, low, high = mean_interval(np.random.default_rng(1).exponential(size=30) ** 2)
    assert high - mean > mean - low > 0


def test_coverage_is_near_the_level():
    """200 samples of 40 prompts: the 90 % interval holds the true mean about as often as theory says."""
    rng = np.random.default_rng(5)
    held = 0
    for trial in range(200):
        _, low, high = mean_interval(rng.exponential(size=40), level=0.9, resamples=1000, seed=trial)
        held += low <= 1.0 <= high
    # nominal .9; a percentile bootstrap of skewed data at n = 40 has about .87; sd of the estimate is .024
    assert 0.80 <= held / 200 <= 0.94


def test_pairing_removes_what_the_systems_share():
    rng = np.random.default_rng(2)
    difficulty = rng.normal(0, 5, size=300)
    base = difficulty + rng.normal(0, 0.1, size=300)
    better = difficulty + 0.05 + rng.normal(0, 0.1, size=300)
    difference = mean_interval(better - base)
    assert excludes_zero(difference) and difference.low > 0
    assert difference.value == pytest.approx((better - base).mean())
    own = mean_interval(better)
    assert own.high - own.low > 20 * (difference.high - difference.low)
    back = mean_interval(base - better)
    assert excludes_zero(back) and back.high < 0
    assert back.value == pytest.approx(-difference.value)


def test_equal_systems_do_not_differ():
    same = np.arange(50.0)
    assert mean_interval(same - same) == (0.0, 0.0, 0.0)
    assert not excludes_zero(mean_interval(same - same))


def test_one_value_has_no_interval():
    assert mean_interval([0.7]) == Interval(0.7, None, None)


def test_seed_decides():
    data = np.random.default_rng(3).normal(size=50)
    assert mean_interval(data, seed=1) == mean_interval(data, seed=1) != mean_interval(data, seed=2)


@pytest.mark.parametrize("bad", [[1.0, float("nan")], [1.0, float("inf")]])
def test_refused(bad):
    with pytest.raises(ValueError):
        mean_interval(bad)


def test_memory_stays_bounded():
    """10,000 resamples of 20,000 values would be 1.6 GB at once."""
    data = np.random.default_rng(4).normal(size=20_000)
    tracemalloc.start()
    mean_interval(data, resamples=1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6
