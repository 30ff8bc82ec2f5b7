"""What became of the rewrites that a set was made with: by step, over time, and all together."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlgf_cli.artifacts.records import AnsweredStepRecord
from rlgf_cli.evolve.dataset import is_in_set
from rlgf_cli.evolve.environment import KEPT
from rlgf_cli.evolve.measure import COMPLEXITY, complexity
from rlgf_cli.evolve.sets import TextSet
from rlgf_cli.scorers.coverage import words

_PARTS = 10
"""Parts that the rewrites are divided into, in order of time."""


def outcome(row: AnsweredStepRecord) -> str:
    """Why a rewrite is not in the set, or ``kept``; rules that the answer broke begin with ``answer:``."""
    return f"answer:{row.answer}" if row.outcome == KEPT and not is_in_set(row) else row.outcome


def cost(row: AnsweredStepRecord) -> float | None:
    """What rewrite and answer cost, in USD; None where neither has a price. A reviewer's part is not in it."""
    known = [part for part in (row.cost_usd, row.answer_cost_usd) if part is not None]
    return sum(known) if known else None


def totals(rows: Sequence[AnsweredStepRecord]) -> dict[str, Any]:
    """Rewrites, those in the set, queries, cost, and how often each operation was chosen and each outcome met.

    ``cost_usd`` is null where no rewrite has a price; ``unpriced`` ones gave a text without one and are not in it.
    """
    kept = [row for row in rows if is_in_set(row)]
    prices = [cost(row) for row in rows]
    known = [price for price in prices if price is not None]
    novelty = [row.novelty for row in kept if row.novelty is not None]
    queries = sum(row.queries for row in rows)
    return {
        "rewrites": len(rows),
        "kept": len(kept),
        "kept_share": len(kept) / len(rows) if rows else None,
        "novelty": float(np.mean(novelty)) if novelty else None,
        "queries": queries,
        "queries_per_kept": queries / len(kept) if kept else None,
        "cost_usd": sum(known) if known else None,
        "unpriced": sum(map(_unpriced, rows)),
        "operations": _shares(row.operation for row in rows),
        "outcomes": dict(Counter(map(outcome, rows)).most_common()),
    }


def by_step(found: TextSet, measures: np.ndarray) -> list[dict[str, Any]]:
    """A row per step: the set's texts that were made at it, their means of :data:`COMPLEXITY` (``measures`` [n, 4]),
    and the :func:`totals` of its rewrites where they are known. Step 0 are the seeds, as the first rewrites had them.
    """
    steps = np.array(found.steps)
    rows = []
    if found.rows is not None:
        seeds = {row.seed_id: row.instruction for row in found.rows if row.step == 1 and words(row.instruction)}
        rows.append({"step": 0, **_means(np.array([complexity(text) for text in seeds.values()]))})
    at = {*steps.tolist(), *(row.step for row in found.rows or ())}
    for step in sorted(at):
        row = {"step": step, **_means(measures[steps == step])}
        if found.rows is not None:
            row |= totals([one for one in found.rows if one.step == step])
        rows.append(row)
    return rows


def over_time(rows: Sequence[AnsweredStepRecord]) -> list[dict[str, Any]]:
    """:func:`totals` of ten equal parts of the rewrites, in order of time; ``until``: the last rewrite of the part."""
    edges = np.unique(np.linspace(0, len(rows), _PARTS + 1).round().astype(int))
    return [{"until": int(stop), **totals(rows[start:stop])} for start, stop in itertools.pairwise(edges)]


def by_seed_totals(rows: Sequence[AnsweredStepRecord]) -> dict[str, np.ndarray]:
    """Per seed: [instructions in the set, queries, USD, rewrites without a price]."""
    found: dict[str, np.ndarray] = {}
    for row in rows:
        of = found.setdefault(row.seed_id, np.zeros(4))
        of += [is_in_set(row), row.queries, cost(row) or 0, _unpriced(row)]
    return found


def per_kept(totals: Mapping[str, np.ndarray], seeds: Sequence[str]) -> dict[str, float]:
    """Queries, and cost where all of it is known, per instruction of the set, of some seeds (:func:`by_seed_totals`).
    Nothing where none of theirs is in the set.
    """
    kept, queries, usd, unpriced = sum((totals[seed] for seed in seeds if seed in totals), np.zeros(4)).tolist()
    if not kept:
        return {}
    return {"queries_per_kept": queries / kept, **({"cost_per_kept": usd / kept} if usd and not unpriced else {})}


def _unpriced(row: AnsweredStepRecord) -> bool:
    """Whether there is a text whose price is not known. What gave none is not paid for."""
    return bool(row.text) and cost(row) is None


def _means(measures: np.ndarray) -> dict[str, Any]:
    means = measures.mean(axis=0).tolist() if len(measures) else [None] * len(COMPLEXITY)
    return {"texts": len(measures), **dict(zip(COMPLEXITY, means, strict=True))}


def _shares(names: Any) -> dict[str, float]:
    counts = Counter(names)
    return {name: counts[name] / counts.total() for name in sorted(counts)}
