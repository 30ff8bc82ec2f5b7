"""Error rates and coverage of the tests of `rlgf compare`, in simulations with a known truth (docs/significance.md).

    python benchmarks/significance.py                        all parts (some ten minutes of a core)
    python benchmarks/significance.py --parts null,power     some of them: null, power, sacrebleu, seeds, pairs

Texts of two real systems are read where RLGF_REAL_DATA names a folder with CommonGen; else such as are made here.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from scipy import stats

from rlgf_cli.console import table
from rlgf_cli.stats.aggregates import mean
from rlgf_cli.stats.bootstrap import resampled
from rlgf_cli.stats.significance import Seeds, bootstrap_p, estimate, p_value, pair_flip_p, randomised
from significance_cases import (
    Pairs,
    binary_scores,
    bleu,
    bleu_rows,
    commongen_texts,
    exchanged,
    normal_scores,
    of_seeds,
    p_values,
    sacrebleu_says,
    toy_texts,
)

_BATCH = 250
"""Comparisons that are simulated at a time."""
_ALPHAS = (0.01, 0.05, 0.1)


def show(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n\n{table(header, rows)}", flush=True)


def batches(count: int) -> range:
    return range(0, count, _BATCH)


def pooled(make, aggregate, comparisons: int, resamples: int) -> dict[str, np.ndarray]:
    """p-values of many comparisons; ``make(rng, count)`` gives rows. Each batch has resamples of its own."""
    found = [
        p_values(make(np.random.default_rng([7, start]), _BATCH), aggregate, resamples=resamples, seed=start)
        for start in batches(comparisons)
    ]
    return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}


def null(comparisons: int, resamples: int, pool: Pairs, source: str) -> None:
    """Systems that do not differ: p should be below alpha in a share alpha of comparisons."""
    rows = []
    for prompts in (20, 50, 200, 500):
        cases = {
            "mean of normal scores": (lambda rng, v, n=prompts: normal_scores(rng, v, n), mean),
            "mean of 0/1 scores": (lambda rng, v, n=prompts: binary_scores(rng, v, n), mean),
            f"BLEU ({source})": (lambda rng, v, n=prompts: exchanged(rng, pool, v, n), bleu),
        }
        for name, (make, aggregate) in cases.items():
            if aggregate is bleu and prompts < 50:
                continue  # without smoothing there is a resample without a 4-gram that matches
            for test, p in pooled(make, aggregate, comparisons, resamples).items():
                ks = stats.kstest(p, "uniform")
                shares = [f"{(p <= alpha).mean():.3f}" for alpha in _ALPHAS]
                rows.append([name, str(prompts), test, *shares, f"{ks.statistic:.3f}", f"{ks.pvalue:.3f}"])
    header = ["figure", "prompts", "test", *(f"p <= {alpha}" for alpha in _ALPHAS), "KS distance", "KS p"]
    show(f"No difference: {comparisons} comparisons, {resamples} resamples", header, rows)


def power(comparisons: int, resamples: int) -> None:
    """A planted difference of mean scores, against the paired z-test with the variance known."""
    rows, normal, prompts = [], NormalDist(), 200
    for gain in (0.1, 0.2, 0.3, 0.4):
        found = pooled(lambda rng, v, g=gain: normal_scores(rng, v, prompts, g), mean, comparisons, resamples)
        shift, z = gain / math.sqrt(2 / prompts), normal.inv_cdf(0.975)
        expected = normal.cdf(shift - z) + normal.cdf(-shift - z)
        rows.append(
            [f"{gain / math.sqrt(2):.2f}", f"{expected:.3f}", *(f"{(p <= 0.05).mean():.3f}" for p in found.values())]
        )
    header = ["difference (standard deviations)", "z-test", "bootstrap", "randomisation"]
    show(f"Power at 0.05, {prompts} prompts: {comparisons} comparisons, {resamples} resamples", header, rows)


def sacrebleu(texts, source: str) -> None:
    """One comparison by both programs, with the same draws."""
    a, b, references = texts
    first, second = bleu_rows(a, references), bleu_rows(b, references)
    resamples, rows = 10_000, []
    theirs = sacrebleu_says(a, b, references, resamples)
    settings = {"resamples": resamples, "seed": 12345}
    observed = np.array([bleu(second.sum(axis=0)) - bleu(first.sum(axis=0))])
    differences = resampled(second[None], bleu, **settings) - resampled(first[None], bleu, **settings)
    ours = {
        "bs": bootstrap_p(differences, observed)[0],
        "ar": p_value(randomised(second[None], first, bleu, **settings), observed)[0],
    }
    for test, name in (("bs", "paired bootstrap"), ("ar", "approximate randomisation")):
        score_a, score_b, p = theirs[test]
        rows.append([name, f"{score_a:.4f}", f"{score_b:.4f}", f"{observed[0]:+.4f}", f"{p:.4f}", f"{ours[test]:.4f}"])
    header = ["test", "sacrebleu, first", "second", "rlgf, difference", "sacrebleu, p", "rlgf, p"]
    show(f"BLEU of two systems on {len(a)} prompts ({source}), {resamples} resamples", header, rows)


def covered(seeds: tuple[int, int], share: float, trials: int, prompts: int, resamples: int) -> list[float]:
    """Coverage of the 95 % interval, of one that resamples seeds, and of one over prompts alone; and the width of the
    first by that of an interval with the variance known."""
    held, relative = [], []
    rng = np.random.default_rng(3)
    for start in batches(trials):
        simulated = of_seeds(
            np.random.default_rng([5, start]), seeds, share=share, trials=_BATCH, prompts=prompts, resamples=resamples
        )
        for trial in simulated:
            _, low, high = trial.estimate.interval
            both = (trial.first, trial.second)
            by_seeds = [drawn_seeds(rng, system) for system in both]
            by_prompts = [system.resampled.mean(axis=0) for system in both]
            others = [np.quantile(x - y, [0.025, 0.975]) for x, y in (by_seeds, by_prompts)]
            held.append([low <= 0 <= high, *(o[0] <= 0 <= o[1] for o in others)])
            relative.append((high - low) / (2 * 1.96 * trial.sd))
    return [*np.mean(held, axis=0), float(np.median(relative))]


def drawn_seeds(rng: np.random.Generator, system: Seeds) -> np.ndarray:
    """The hierarchical bootstrap as it is often done: seeds drawn with replacement, over resampled prompts."""
    seeds, resamples = system.resampled.shape
    return np.take_along_axis(system.resampled, rng.integers(0, seeds, (seeds, resamples)), axis=0).mean(axis=0)


def over_seeds(trials: int, resamples: int) -> None:
    rows = []
    for seeds in ((2, 2), (3, 3), (5, 5), (10, 10), (2, 5), (1, 3)):
        for prompts in (200, 500):
            for share in (0.0, 0.5, 0.9):
                ours, drawn, prompts_alone, width = covered(seeds, share, trials, prompts, resamples)
                shown = [f"{value:.3f}" for value in (ours, drawn, prompts_alone)]
                rows.append([f"{seeds[0]} and {seeds[1]}", str(prompts), f"{share:.0%}", *shown, f"{width:.2f}"])
    header = ["seeds", "prompts", "variance by seeds", "rlgf", "seeds resampled", "prompts alone", "relative width"]
    show(f"Coverage of 95 % intervals: {trials} comparisons, {resamples} resamples", header, rows)


def with_pairs(pairs: int, share: float, common: float, trials: int, prompts: int, resamples: int) -> list[str]:
    """Coverage of the 95 % interval with and without the pairs, their widths by that of an interval with the variance
    known, and how often randomisation over pairs has p <= 0.1."""
    held, relative, small = [], [], []
    for start in batches(trials):
        simulated = of_seeds(
            np.random.default_rng([6, start]), (pairs, pairs), share=share, common=common, trials=_BATCH,
            prompts=prompts, resamples=resamples,
        )  # fmt: skip
        for trial in simulated:
            both = (trial.first, trial.second)
            found = [estimate(*both, prompts=prompts, level=0.95, paired=paired).interval for paired in (True, False)]
            held.append([low <= 0 <= high for _, low, high in found])
            relative.append([(high - low) / (2 * 1.96 * trial.sd) for _, low, high in found])
            small.append(pair_flip_p(trial.first.figures - trial.second.figures, resamples=10_000, seed=0) <= 0.1)
    shares = [f"{value:.3f}" for value in (*np.mean(held, axis=0), np.mean(small))]
    return [*shares[:2], *(f"{value:.2f}" for value in np.median(relative, axis=0)), shares[2]]


def over_pairs(trials: int, resamples: int) -> None:
    rows, prompts = [], 200
    for pairs, share, common in itertools.product((2, 3, 5, 10), (0.5, 0.9), (0.0, 0.5, 0.9)):
        shown = with_pairs(pairs, share, common, trials, prompts, resamples)
        rows.append([str(pairs), f"{share:.0%}", f"{common:.0%}", *shown])
    header = ["pairs", "variance by seeds", "of it in common", "paired", "unpaired"]
    header += ["width, paired", "width, unpaired", "randomisation, p <= 0.1"]
    show(f"Seeds in pairs, {prompts} prompts: {trials} comparisons, {resamples} resamples", header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="null,power,sacrebleu,seeds,pairs")
    parser.add_argument("--comparisons", type=int, default=4000, help="simulated per row, in steps of 250")
    parser.add_argument("--resamples", type=int, default=1000)
    asked = parser.parse_args()
    texts, source = commongen_texts(), "CommonGen, gpt-3.5 and gpt-4"
    if texts is None:
        texts, source = toy_texts(400, (0.7, 0.75)), "made here"
    a, b, references = texts
    parts = {
        "null": lambda: null(
            asked.comparisons, asked.resamples, (bleu_rows(a, references), bleu_rows(b, references)), source
        ),
        "power": lambda: power(asked.comparisons, asked.resamples),
        "sacrebleu": lambda: sacrebleu(texts, source),
        "seeds": lambda: over_seeds(asked.comparisons, asked.resamples),
        "pairs": lambda: over_pairs(asked.comparisons, asked.resamples),
    }
    for name in asked.parts.split(","):
        if name not in parts:
            parser.error(f"no part {name!r}: {', '.join(parts)}")
        parts[name]()


if __name__ == "__main__":
    main()
