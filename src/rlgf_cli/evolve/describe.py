"""Totals of the rewrites of a set: by step, over time, and all together."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlgf_cli.artifacts.records import AnsweredStepRecord
from rlgf_cli.evolve.dataset import is_in_set, known_sum
from rlgf_cli.evolve.environment import KEPT
from rlgf_cli.evolve.measure import COMPLEXITY, complexity
from rlgf_cli.evolve.sets import TextSet
from rlgf_cli.scorers.coverage import words

_PARTS = 10
"""Parts of equal size into which the rewrites are divided, in order of time."""


def outcome(row: AnsweredStepRecord) -> str:
    """``kept``, or why a rewrite is not in the set: ``answer:RULE`` for a rule that its answer broke."""
    return f"answer:{row.answer}" if row.outcome == KEPT and not is_in_set(row) else row.outcome


def cost(row: AnsweredStepRecord) -> float | None:
    """The price of rewrite and answer in USD, without the reviewer's; None where neither has one."""
    return known_sum((row.cost_usd, row.answer_cost_usd))


def totals(rows: Sequence[AnsweredStepRecord]) -> dict[str, Any]:
    """Rewrites, those in the set, queries, cost, shares of the operations and counts of the outcomes.

    ``cost_usd`` is null where no rewrite has a price; it leaves out the ``unpriced`` ones, texts without a price.
    """
    in_set = [row for row in rows if is_in_set(row)]
    novelty = [row.novelty for row in in_set if row.novelty is not None]
    operations = Counter(row.operation for row in rows)
    queries = sum(row.queries for row in rows)
    return {
        "rewrites": len(rows),
        "kept": len(in_set),
        "kept_share": len(in_set) / len(rows) if rows else None,
        "novelty": float(np.mean(novelty)) if novelty else None,
        "queries": queries,
        "queries_per_kept": queries / len(in_set) if in_set else None,
        "cost_usd": known_sum(map(cost, rows)),
        "unpriced": sum(map(_unpriced, rows)),
        "operations": {name: n / operations.total() for name, n in sorted(operations.items())},
        "outcomes": dict(Counter(map(outcome, rows)).most_common()),
    }


def by_step(texts: TextSet, measures: np.ndarray) -> list[dict[str, Any]]:
    """A row per step: the number of texts of the set that it made, their means of :data:`COMPLEXITY` (``measures``
    [n, 4]), and the :func:`totals` of its rewrites where they are known. Step 0 are the seeds of the first rewrites.
    """
    steps = np.array(texts.steps)
    rows = []
    if texts.rows is not None:
        seeds = {row.seed_id: row.instruction for row in texts.rows if row.step == 1 and words(row.instruction)}
        rows.append({"step": 0, **_means(np.array([complexity(text) for text in seeds.values()]))})
    at = {*steps.tolist(), *(row.step for row in texts.rows or ())}
    for step in sorted(at):
        row = {"step": step, **_means(measures[steps == step])}
        if texts.rows is not None:
            row |= totals([rewrite for rewrite in texts.rows if rewrite.step == step])
        rows.append(row)
    return rows


def over_time(rows: Sequence[AnsweredStepRecord]) -> list[dict[str, Any]]:
    """:func:`totals` of ten equal parts of the rewrites, in order of time; ``until``: the number of its last one."""
    edges = np.unique(np.linspace(0, len(rows), _PARTS + 1).round().astype(int))
    return [{"until": int(stop), **totals(rows[start:stop])} for start, stop in itertools.pairwise(edges)]


def by_seed_totals(rows: Sequence[AnsweredStepRecord]) -> dict[str, np.ndarray]:
    """Per seed: [instructions in the set, queries, USD, rewrites without a price]."""
    by_seed: dict[str, np.ndarray] = {}
    for row in rows:
        sums = by_seed.setdefault(row.seed_id, np.zeros(4))
        sums += [is_in_set(row), row.queries, cost(row) or 0, _unpriced(row)]
    return by_seed


def per_kept(totals: Mapping[str, np.ndarray], seeds: Sequence[str]) -> dict[str, float]:
    """Queries, and cost where all of it is known, per instruction in the set that was made from ``seeds``
    (``totals``: :func:`by_seed_totals`). Empty where there is none.
    """
    kept, queries, usd, unpriced = sum((totals[seed] for seed in seeds if seed in totals), np.zeros(4)).tolist()
    if not kept:
        return {}
    return {"queries_per_kept": queries / kept, **({"cost_per_kept": usd / kept} if usd and not unpriced else {})}


def _unpriced(row: AnsweredStepRecord) -> bool:
    """Whether there is a text without a known price. A request without a text costs nothing."""
    return bool(row.text) and cost(row) is None


def _means(measures: np.ndarray) -> dict[str, Any]:
    means = measures.mean(axis=0).tolist() if len(measures) else [None] * len(COMPLEXITY)
    return {"texts": len(measures), **dict(zip(COMPLEXITY, means, strict=True))}
