"""Simulated comparisons with a known truth, and BLEU from rows, for the tests of significance and their benchmark."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from conftest import toy_examples
from rlgf_cli.stats.aggregates import mean
from rlgf_cli.stats.bootstrap import Aggregate, Interval, interval, resampled
from rlgf_cli.stats.significance import Estimate, Seeds, bootstrap_p, estimate, p_value, randomised

Pairs = tuple[np.ndarray, np.ndarray]
"""Rows of two systems in v comparisons, each [v, n, k]."""


def normal_scores(rng: np.random.Generator, comparisons: int, prompts: int, gain: float = 0.0) -> Pairs:
    """Scores with a difficulty that both systems share; the paired differences have mean ``gain`` and variance 2."""
    difficulty = rng.normal(0, 2, (comparisons, prompts))
    a, b = difficulty + rng.normal(size=(2, comparisons, prompts))
    return as_rows(a + gain), as_rows(b)


def binary_scores(rng: np.random.Generator, comparisons: int, prompts: int) -> Pairs:
    """Right or wrong, with the same chance for both systems."""
    chance = rng.beta(2, 2, (comparisons, prompts))
    a, b = rng.random((2, comparisons, prompts)) < chance
    return as_rows(a.astype(float)), as_rows(b.astype(float))


def as_rows(values: np.ndarray) -> np.ndarray:
    return np.stack([values, np.ones_like(values)], axis=-1)


def mean_interval(values: Sequence[float] | np.ndarray, **settings: float) -> Interval:
    """The bootstrap interval of a mean: that of rows ``[value, 1]``."""
    return interval(as_rows(np.asarray(values, dtype=float)), mean, **settings)  # type: ignore[arg-type]


def excludes_zero(of: Interval) -> bool:
    assert of.low is not None and of.high is not None
    return of.low > 0 or of.high < 0


def exchanged(rng: np.random.Generator, pool: Pairs, comparisons: int, prompts: int) -> Pairs:
    """Prompts drawn from a pool of two systems' rows [m, k], each with sides changed at random: no difference."""
    drawn = rng.integers(0, len(pool[0]), (comparisons, prompts))
    swap = rng.integers(0, 2, (comparisons, prompts, 1), dtype=bool)
    a, b = pool[0][drawn], pool[1][drawn]
    return np.where(swap, b, a), np.where(swap, a, b)


def p_values(pairs: Pairs, aggregate: Aggregate, *, resamples: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The p-value of every comparison by both tests."""
    a, b = pairs
    settings = {"resamples": resamples, "seed": seed}
    observed = aggregate(a.sum(axis=1)) - aggregate(b.sum(axis=1))
    differences = resampled(a, aggregate, **settings) - resampled(b, aggregate, **settings)
    return {
        "bootstrap": bootstrap_p(differences, observed),
        "randomisation": p_value(randomised(a, b, aggregate, **settings), observed),
    }


class OfSeeds(NamedTuple):
    """A simulated comparison of two ways of training that are equally good, and its difference's standard deviation."""

    estimate: Estimate
    first: Seeds
    second: Seeds
    sd: float


def of_seeds(
    rng: np.random.Generator,
    seeds: tuple[int, int],
    *,
    share: float,
    trials: int,
    prompts: int,
    resamples: int,
    level: float = 0.95,
    common: float = 0.0,
) -> list[OfSeeds]:
    """Comparisons of two equally good ways of training. Seeds have ``share`` of the difference's variance.

    A figure is a ratio of sums (texts have different weights). Besides the seeds' own effect there are one of prompts
    that is shared by all, one of prompts per system, and noise of its own for every text. A single seed is a given
    model, and has no effect that varies. ``common``: the share of the seeds' variance that the i-th seeds of both have
    in common, and that is not in their difference.
    """
    first, second = seeds
    per_system, per_text = 0.5, 0.7  # standard deviations
    by_prompts = (2 * per_system**2 + per_text**2 * (1 / first + 1 / second)) / prompts
    vary = np.array([count > 1 for count in seeds])
    seed_sd = vary * np.sqrt(share / (1 - share) * by_prompts / (vary / seeds).sum())
    system = np.repeat([0, 1], seeds)
    scores = (
        rng.normal(0, 1, (trials, 1, prompts))
        + rng.normal(0, per_system, (trials, 2, prompts))[:, system]
        + rng.normal(0, per_text, (trials, len(system), prompts))
        + rng.normal(0, 1, (trials, len(system), 1)) * math.sqrt(1 - common) * seed_sd[system][:, None]
    )
    if common:
        shared = np.tile(rng.normal(0, 1, (trials, first, 1)), (1, 2, 1))
        scores += shared * math.sqrt(common) * seed_sd[system][:, None]
    rows = as_rows(scores) * rng.uniform(0.8, 1.2, (trials, len(system), prompts, 1))
    flat = rows.reshape(trials * len(system), prompts, 2)
    draws = resampled(flat, mean, resamples=resamples, seed=0).reshape(trials, len(system), resamples)
    figures = mean(rows.sum(axis=2))
    found = []
    for i in range(trials):
        a, b = Seeds(figures[i, :first], draws[i, :first]), Seeds(figures[i, first:], draws[i, first:])
        sd = float(np.sqrt(by_prompts * (1 + share / (1 - share) * (1 - common))))
        found.append(OfSeeds(estimate(a, b, prompts=prompts, level=level), a, b, sd))
    return found


def bleu_rows(texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """sacrebleu's statistics: lengths of text and reference, n-grams that match, n-grams; n = 1 to 4. [n, 10]"""
    return np.asarray(BLEU(force=True)._extract_corpus_statistics(texts, streams_of(references)), dtype=float)


def bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU (Papineni et al. 2002) of such sums [..., 10], without smoothing: no sum of matches may be 0."""
    length, reference, matches, ngrams = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:]
    precision = np.exp(np.log(matches / ngrams).mean(axis=-1))
    return np.asarray(100 * precision * np.exp(np.minimum(0, 1 - reference / length)))


def streams_of(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """References as sacrebleu takes them: the first of every text, the second, ..."""
    return [[row[i] if i < len(row) else None for row in references] for i in range(max(map(len, references)))]


def sacrebleu_says(
    a: Sequence[str], b: Sequence[str], references: Sequence[Sequence[str]], resamples: int
) -> dict[str, tuple[float, float, float]]:
    """Its paired tests (seed 12345): "bs" and "ar" -> both scores and the p-value."""
    found = {}
    for test in ("bs", "ar"):
        metric = BLEU(force=True)  # the texts end in " .", and that is meant
        named = [("a", a), ("b", b)]
        _, scores = PairedTest(named, {"BLEU": metric}, streams_of(references), test, n_samples=resamples)()
        first, second = scores["BLEU"]
        found[test] = (first.score, second.score, second.p_value)
    return found


def toy_texts(count: int, keep: tuple[float, float]) -> tuple[list[str], list[str], list[list[str]]]:
    """Two systems that write the reference with each word kept or replaced, and the references."""
    examples = toy_examples(count, seed=5)
    references = [row["references"] for row in examples]
    systems = []
    for seed, chance in enumerate(keep):
        rng = random.Random(seed)
        systems.append(
            [" ".join(word if rng.random() < chance else "it" for word in refs[0].split()) for refs in references]
        )
    return systems[0], systems[1], references


def commongen_texts() -> tuple[list[str], list[str], list[list[str]]] | None:
    """gpt-3.5-turbo and gpt-4 on CommonGen's 400 test sets; None where there is no real data."""
    folder = Path(os.environ.get("RLGF_REAL_DATA", "/nowhere")) / "commongen"
    if not folder.is_dir():
        return None
    references = {row["id"]: row["references"] for row in _rows(folder / "test.jsonl.gz")}
    guides = [
        {row["id"]: row["completion"] for row in _rows(folder / f"guide_{name}.test400.jsonl.gz")}
        for name in ("gpt-3.5-turbo", "gpt-4-0613")
    ]
    ids = [name for name in guides[0] if name in guides[1]]
    return [guides[0][i] for i in ids], [guides[1][i] for i in ids], [references[i] for i in ids]


def _rows(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
