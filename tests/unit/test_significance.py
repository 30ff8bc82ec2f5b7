"""Tests of differences against their definitions, and what they promise in simulations whose truth is known."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from scipy.linalg import hadamard

from rlgf_cli.stats import significance
from rlgf_cli.stats.aggregates import mean
from rlgf_cli.stats.bootstrap import resampled
from significance_cases import (
    as_rows,
    binary_scores,
    bleu,
    bleu_rows,
    exchanged,
    excludes_zero,
    normal_scores,
    of_seeds,
    p_values,
    toy_texts,
)

TESTS = ("bootstrap", "randomisation")


def ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


class TestDefinitions:
    def test_resampled_is_the_figure_of_drawn_prompts(self):
        rows = np.random.default_rng(0).uniform(1, 2, size=(3, 7, 2))
        found = resampled(rows, ratio, resamples=50, seed=4)
        drawn = np.random.default_rng(4).integers(0, 7, size=(50, 7))
        assert found == pytest.approx(np.array([[ratio(system[d].sum(axis=0)) for d in drawn] for system in rows]))

    def test_chunks_change_nothing(self, monkeypatch):
        rows = np.random.default_rng(0).uniform(1, 2, size=(2, 9, 2))
        whole = resampled(rows, ratio, resamples=100, seed=1)
        reported: list[int] = []
        monkeypatch.setattr("rlgf_cli.stats.bootstrap._NUMBERS_AT_ONCE", 100)
        assert resampled(rows, ratio, resamples=100, seed=1, progress=reported.append) == pytest.approx(whole)
        assert len(reported) > 5 and sum(reported) == 100

    def test_the_bootstraps_p_value_step_by_step(self):
        differences, observed = np.array([0.1, 0.4, -0.2, 0.5, 0.2]), 0.25
        centre = sum(differences) / 5  # 0.2: deviations -0.1, 0.2, -0.4, 0.3, 0.0
        assert centre == pytest.approx(0.2)
        assert significance.bootstrap_p(differences, np.array(observed)) == pytest.approx((1 + 2) / (1 + 5))

    @pytest.mark.parametrize("aggregate", [mean, lambda sums: (sums[..., 0] / sums[..., 1]) ** 2])
    def test_randomisation_against_every_swap(self, aggregate):
        rng = np.random.default_rng(1)
        a, b = rng.uniform(0.2, 1, size=(2, 8, 2))
        a[:, 0] *= 1.6
        observed = aggregate(a.sum(axis=0)) - aggregate(b.sum(axis=0))
        every = []
        for sides in itertools.product([False, True], repeat=8):
            swap = np.array(sides)[:, None]
            every.append(aggregate(np.where(swap, b, a).sum(axis=0)) - aggregate(np.where(swap, a, b).sum(axis=0)))
        exact = float((np.abs(every) >= abs(observed) - 1e-12).mean())
        found = significance.p_value(
            significance.randomised(a[None], b, aggregate, resamples=20_000, seed=0), np.array([observed])
        )[0]
        assert 0.02 < exact < 0.5
        assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))

    def test_a_base_for_all_and_one_for_each_are_the_same(self):
        a, b = normal_scores(np.random.default_rng(2), 3, 20)
        base = np.broadcast_to(b[0], a.shape)
        together = significance.randomised(a, b[0], mean, resamples=50, seed=0)
        assert together == pytest.approx(significance.randomised(a, base, mean, resamples=50, seed=0))

    def test_ties_are_decided_by_no_rounding(self):
        # the prompts differ by 0.1, 0.5, -0.4, -0.1, so that each |d*| is at least |d| = 0.1 / 4
        a, b = np.array([0.7, 0.8, 0.1, 0.1]), np.array([0.6, 0.3, 0.5, 0.2])
        null = significance.randomised(as_rows(a)[None], as_rows(b), mean, resamples=500, seed=0)
        observed = mean(as_rows(a).sum(axis=0)) - mean(as_rows(b).sum(axis=0))
        assert (np.abs(null) < abs(observed)).any()  # by rounding alone
        assert significance.p_value(null, np.array([observed]))[0] == 1

    def test_memory_stays_bounded(self):
        a, b = normal_scores(np.random.default_rng(4), 1, 20_000)
        tracemalloc.start()
        significance.randomised(a, b[0], mean, resamples=1000, seed=0)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 100e6


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12), st.integers(0, 5))
def test_p_values_are_probabilities_and_know_no_order(scores, seed):
    a, b = (as_rows(np.array(side, dtype=float)) for side in zip(*scores, strict=True))
    observed = np.array([a[:, 0].mean() - b[:, 0].mean()])
    for null in (
        significance.randomised(a[None], b, mean, resamples=99, seed=seed),
        resampled(a[None], mean, resamples=99, seed=seed)
        - resampled(b[None], mean, resamples=99, seed=seed)
        - observed,
    ):
        found = significance.p_value(null, observed)[0]
        assert 1 / 100 <= found <= 1
        assert (
            found == significance.p_value(-null, -observed)[0] == significance.p_value(1000 * null, 1000 * observed)[0]
        )
        if not observed[0]:
            assert found == 1


class TestHolm:
    @given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
    def test_against_its_definition(self, p_values):
        found, count = significance.holm(p_values), len(p_values)
        by_size = sorted(range(count), key=lambda i: p_values[i])
        for rank, i in enumerate(by_size):
            steps = [(count - j) * p_values[by_size[j]] for j in range(rank + 1)]
            assert found[i] == pytest.approx(min(1.0, max(steps)), abs=1e-12)
        assert all(raw <= adjusted <= min(1, count * raw) for raw, adjusted in zip(p_values, found, strict=True))
        assert [found[i] for i in by_size] == sorted(found)

    def test_an_example(self):
        assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert significance.holm([0.2]) == [0.2] and significance.holm([]) == []

    def test_one_false_call_in_twenty_families(self):
        """Twelve true null hypotheses at once: some adjusted p below 0.05 in about 5 % of families."""
        families = np.random.default_rng(0).uniform(size=(2000, 12))
        share = np.mean([min(significance.holm(family)) < 0.05 for family in families])
        assert share == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 2000))


class TestNoDifference:
    """1,000 comparisons or more of systems that do not differ: how often is p below alpha?"""

    def test_p_values_of_means_are_uniform(self):
        found = p_values(normal_scores(np.random.default_rng(0), 1000, 100), mean, resamples=500)
        for name in TESTS:
            assert stats.kstest(found[name], "uniform").pvalue > 0.01, name

    def test_p_values_of_corpus_figures_are_uniform(self):
        a, b, references = toy_texts(300, (0.7, 0.7))
        pool = bleu_rows(a, references), bleu_rows(b, references)
        found = p_values(exchanged(np.random.default_rng(0), pool, 2000, 100), bleu, resamples=500)
        for name in TESTS:
            assert stats.kstest(found[name], "uniform").pvalue > 0.01, name

    def test_of_scores_0_and_1_p_values_are_coarse_and_not_too_small(self):
        found = p_values(binary_scores(np.random.default_rng(2), 1000, 100), mean, resamples=500)
        assert stats.kstest(found["randomisation"], "uniform").pvalue < 1e-3  # steps, and ties count
        for alpha in (0.01, 0.05, 0.1, 0.2, 0.5):
            bound = alpha + 4 * math.sqrt(alpha * (1 - alpha) / 1000)
            assert (found["randomisation"] <= alpha).mean() <= bound
            assert (found["bootstrap"] <= alpha).mean() <= bound


@pytest.mark.parametrize("name", TESTS)
def test_a_planted_difference_is_found_as_often_as_theory_says(name):
    """Against the paired z-test: P(|Z + gain / sd| > z), where the difference's sd is sqrt(2 / n)."""
    prompts, comparisons, normal = 150, 1000, NormalDist()
    for gain in (0.2, 0.35):
        pairs = normal_scores(np.random.default_rng(3), comparisons, prompts, gain)
        found = (p_values(pairs, mean, resamples=1000)[name] <= 0.05).mean()
        shift, z = gain / math.sqrt(2 / prompts), normal.inv_cdf(0.975)
        power = normal.cdf(shift - z) + normal.cdf(-shift - z)
        assert 0.2 < power < 0.95
        assert found == pytest.approx(power, abs=4 * math.sqrt(power * (1 - power) / comparisons) + 0.01)


class TestSeeds:
    @pytest.mark.parametrize(
        ("seeds", "share"), [((2, 2), 0.8), ((3, 3), 0.5), ((5, 3), 0.9), ((3, 3), 0.0), ((1, 4), 0.8)]
    )
    def test_intervals_hold_the_truth_as_often_as_they_say(self, seeds, share):
        trials = of_seeds(np.random.default_rng(1), seeds, share=share, trials=400, prompts=60, resamples=300)
        covered = np.mean([t.estimate.interval.low <= 0 <= t.estimate.interval.high for t in trials])
        assert 0.90 <= covered <= 0.99

    def test_resampled_seeds_would_not(self):
        """Why seeds are not resampled: three against three, and 95 % intervals that hold the truth in 4 of 5 cases."""
        rng = np.random.default_rng(2)
        covered = []
        for _, a, b, _ in of_seeds(rng, (3, 3), share=0.9, trials=300, prompts=60, resamples=300):
            drawn = [
                np.take_along_axis(g.resampled, rng.integers(0, 3, g.resampled.shape), axis=0).mean(axis=0)
                for g in (a, b)
            ]
            low, high = np.quantile(drawn[0] - drawn[1], [0.025, 0.975])
            covered.append(low <= 0 <= high)
        assert np.mean(covered) < 0.88

    def test_interval_and_p_value_say_the_same(self):
        for (interval, p), a, b, _ in of_seeds(
            np.random.default_rng(3), (3, 4), share=0.6, trials=40, prompts=50, resamples=200, level=0.9
        ):
            assert p is not None and excludes_zero(interval) == (p < 0.1)
            back = significance.estimate(b, a, prompts=50, level=0.9)
            assert back.p == pytest.approx(p)
            assert back.interval == pytest.approx((-interval.value, -interval.high, -interval.low))

    def test_many_prompts_alone_are_students_test_of_the_seeds(self):
        """Without prompt noise the interval is Welch's."""
        rng = np.random.default_rng(4)
        a, b = rng.normal(0, 1, 3), rng.normal(0.5, 2, 5)
        flat = [significance.Seeds(x, np.repeat(x[:, None], 100, axis=1)) for x in (a, b)]
        found = significance.estimate(*flat, prompts=1000, level=0.95)
        welch = stats.ttest_ind(a, b, equal_var=False)
        expected = welch.confidence_interval(0.95)
        assert found.p == pytest.approx(welch.pvalue)
        assert found.interval[1:] == pytest.approx((expected.low, expected.high))

    def test_students_t_is_that_of_scipy_stats_to_the_bit(self):
        """scipy.special's functions are used, because they are imported faster."""
        for freedom in (1, 2, 3.7, 49, 9999):
            assert special.stdtrit(freedom, 0.975) == stats.t.ppf(0.975, freedom)
            assert special.stdtr(freedom, -2.3) == stats.t.sf(2.3, freedom)

    def test_the_components_of_variance(self):
        """Noise of prompts that seeds share leaves the seeds' part whole; noise of each seed's own is taken off it."""
        figures, signs = np.array([1.0, 2.0, 4.0]), hadamard(4)[1:]  # three patterns of variance 1, orthogonal
        between, unbiased = figures.var(ddof=1), 50 / 49
        for noise, prompts, seeds in (
            (np.repeat(signs[:1], 3, axis=0), unbiased, between / 3),
            (signs, unbiased / 3, (between - unbiased) / 3),
            (3 * signs, 9 * unbiased / 3, 0.0),
        ):
            (value, low, high), _ = significance.estimate(
                significance.Seeds(figures, figures[:, None] + noise), prompts=50, level=0.9
            )
            freedom = max((prompts + seeds) ** 2 / (prompts**2 / 49 + (between / 3) ** 2 / 2), 2)
            half = stats.t.ppf(0.95, freedom) * math.sqrt(prompts + seeds)
            assert (value, low, high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half))

    def test_models_that_two_systems_share_have_no_endless_interval(self):
        """SFT and its own texts mended: the prompts' part of the difference is far smaller than the seeds' variance."""
        rng = np.random.default_rng(6)
        noise = rng.normal(0, 1, (3, 500))
        figures = np.array([0.1, 0.2, 0.3])
        a = significance.Seeds(figures, figures[:, None] + noise)
        b = significance.Seeds(figures + 0.01, figures[:, None] + 0.01 + noise + rng.normal(0, 1e-3, (3, 500)))
        (value, low, high), p = significance.estimate(b, a, prompts=50, level=0.95)
        error = np.std((b.resampled - a.resampled).mean(axis=0)) * math.sqrt(50 / 49)
        half = stats.t.ppf(0.975, 2) * error  # as few degrees of freedom as three seeds have
        assert (value, high - value, value - low) == pytest.approx((0.01, half, half))
        assert p is not None and p < 0.05

    def test_seeds_without_effect_leave_the_prompts_interval(self):
        """Equal models: the seeds' part is 0, and what is left is a normal interval over prompts."""
        a, b = normal_scores(np.random.default_rng(5), 1, 400)
        draws = [resampled(x, mean, resamples=4000, seed=0) for x in (a, b)]
        values = [mean(x.sum(axis=1)) for x in (a, b)]
        three = [
            significance.Seeds(np.repeat(v, 3), np.repeat(d, 3, axis=0)) for v, d in zip(values, draws, strict=True)
        ]
        one = [significance.Seeds(v, d) for v, d in zip(values, draws, strict=True)]
        many, single = (significance.estimate(*pair, prompts=400, level=0.95) for pair in (three, one))
        width = single.interval.high - single.interval.low
        assert many.interval == pytest.approx(single.interval, abs=0.05 * width)

    def test_equal_systems_and_constant_ones(self):
        same = significance.Seeds(np.array([0.1, 0.4]), np.array([[0.1, 0.2], [0.3, 0.5]]))
        constant = [significance.Seeds(np.full(2, value), np.full((2, 9), value)) for value in (0.3, 0.1)]
        assert significance.estimate(same, same, prompts=9, level=0.95).p == 1
        assert significance.estimate(constant[0], constant[0], prompts=9, level=0.95) == ((0.0, 0.0, 0.0), 1.0)
        sure = significance.estimate(*constant, prompts=9, level=0.95)
        assert sure.p == 1 / 10 and sure.interval == pytest.approx((0.2, 0.2, 0.2))

    def test_one_prompt_has_neither(self):
        single = significance.Seeds(np.array([0.5]), np.array([[0.5, 0.5]]))
        assert significance.estimate(single, single, prompts=1, level=0.95) == ((0.0, None, None), None)


class TestPairedSeeds:
    def test_what_the_pairs_share_is_no_noise(self):
        """Intervals of pairs hold the truth as often as they say, and are far narrower than without the pairs."""
        held, widths = [], []
        for trial in of_seeds(
            np.random.default_rng(8), (4, 4), share=0.9, common=0.95, trials=400, prompts=60, resamples=300
        ):
            both = [
                significance.estimate(trial.first, trial.second, prompts=60, level=0.95, paired=p).interval
                for p in (True, False)
            ]
            held.append([low <= 0 <= high for _, low, high in both])
            widths.append([high - low for _, low, high in both])
        paired, unpaired = np.mean(held, axis=0)
        assert 0.92 <= paired <= 0.985 and unpaired > 0.99
        narrow, wide = np.median(widths, axis=0)
        assert narrow < 0.6 * wide

    def test_many_prompts_alone_are_students_test_of_the_pairs(self):
        rng = np.random.default_rng(4)
        b = rng.normal(0, 3, 5)
        a = b + rng.normal(0.5, 1, 5)
        flat = [significance.Seeds(x, np.repeat(x[:, None], 100, axis=1)) for x in (a, b)]
        found = significance.estimate(*flat, prompts=1000, level=0.95, paired=True)
        student = stats.ttest_rel(a, b)
        expected = student.confidence_interval(0.95)
        assert found.p == pytest.approx(student.pvalue)
        assert found.interval == pytest.approx((float(np.mean(a - b)), expected.low, expected.high))

    def test_it_is_the_estimate_of_the_differences(self):
        (trial,) = of_seeds(np.random.default_rng(9), (3, 3), share=0.5, trials=1, prompts=40, resamples=200)
        a, b = trial.first, trial.second
        expected = significance.estimate(
            significance.Seeds(a.figures - b.figures, a.resampled - b.resampled), prompts=40, level=0.9
        )
        found = significance.estimate(a, b, prompts=40, level=0.9, paired=True)
        assert [*found.interval, found.p] == pytest.approx([*expected.interval, expected.p])

    def test_one_seed_each_is_as_ever_and_rounding_is_no_difference(self):
        a, b = (significance.Seeds(np.array([x]), np.array([[x, x + 0.1, x - 0.3]])) for x in (0.5, 0.2))
        assert significance.estimate(a, b, prompts=9, level=0.95, paired=True) == significance.estimate(
            a, b, prompts=9, level=0.95
        )
        figures, noise = np.array([0.1, 0.3]), np.array([[1e-16, 0], [0, 3e-16]])
        same = significance.Seeds(figures, np.tile(figures[:, None], 2))
        moved = significance.Seeds(figures + noise[:, 0], figures[:, None] + noise)
        assert (moved.figures != figures).any()
        found = significance.estimate(moved, same, prompts=9, level=0.95, paired=True)
        assert found.interval == pytest.approx((0, 0, 0), abs=1e-15) and found.p == 1

    def test_scipy_flips_signs_the_same(self):
        rng = np.random.default_rng(2)
        for count in (3, 7):
            a, b = rng.normal(0.6, 1, count), rng.normal(0, 1, count)
            expected = stats.permutation_test(
                (a, b), lambda x, y: abs(np.mean(x - y)), alternative="greater", permutation_type="samples",
                n_resamples=np.inf,
            ).pvalue  # fmt: skip
            assert significance.pair_flip_p(a - b, resamples=1000, seed=0) == pytest.approx(expected)

    def test_few_pairs_have_a_smallest_p_and_many_are_sampled(self):
        assert (
            significance.pair_flip_p(np.array([3.0, 1, 2]), resamples=1000, seed=0)
            == 0.25
            == significance.smallest_flip_p(3)
        )
        assert significance.pair_flip_p(np.array([1.0]), resamples=1000, seed=0) is None
        differences = np.random.default_rng(3).normal(0.4, 1, 12)
        exact = significance.pair_flip_p(differences, resamples=4096, seed=0)
        sampled = significance.pair_flip_p(differences, resamples=4095, seed=0)
        assert exact is not None and 0.01 < exact < 0.9 and (exact * 4096).is_integer()
        assert sampled != exact and sampled == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4095))


class TestPermutationOfSeeds:
    def test_three_against_three_cannot_be_below_a_tenth(self):
        apart = significance.seed_permutation_p(np.array([9.0, 8, 7]), np.array([1.0, 2, 3]), resamples=1000, seed=0)
        assert apart == pytest.approx(0.1) == significance.smallest_seed_p(3, 3)
        assert significance.smallest_seed_p(2, 3) == 0.1 and significance.smallest_seed_p(5, 5) == pytest.approx(
            2 / 252
        )

    def test_scipy_counts_the_same(self):
        rng = np.random.default_rng(0)
        a, b = rng.normal(0.8, 1, 4), rng.normal(0, 1, 5)
        expected = stats.permutation_test(
            (a, b), lambda x, y: abs(x.mean() - y.mean()), alternative="greater", n_resamples=np.inf
        ).pvalue
        assert significance.seed_permutation_p(a, b, resamples=10_000, seed=0) == pytest.approx(expected)

    def test_too_many_ways_are_sampled(self):
        rng = np.random.default_rng(1)
        a, b = rng.normal(0.7, 1, 8), rng.normal(0, 1, 8)
        exact = significance.seed_permutation_p(a, b, resamples=20_000, seed=0)
        assert math.comb(16, 8) == 12870 and exact is not None and 0.01 < exact < 0.9
        sampled = significance.seed_permutation_p(a, b, resamples=10_000, seed=0)
        assert sampled != exact and sampled == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000))

    def test_one_model_is_no_sample_of_trainings(self):
        assert significance.seed_permutation_p(np.array([1.0]), np.array([1.0, 2.0]), resamples=100, seed=0) is None
