"""The iterations of a training: their chains, the rows of metrics.jsonl, and the refusal to go on without a reward."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from rlgf_cli import noise
from rlgf_cli.artifacts.records import SCHEMA_VERSION
from rlgf_cli.errors import RlgfError
from rlgf_cli.evolve.environment import KEPT, Chain
from rlgf_cli.evolve.operations import Operation
from rlgf_cli.protocols import Example

PATIENCE = 64
"""Consecutive rewrites, in whole iterations, after which training ends if none was kept."""

ROW: dict[str, str] = {
    "iteration": "counted from 1",
    "rewrites": "rewrites requested in this iteration, kept or not",
    "queries": "rewrites and verdicts requested",
    "kept": "rewrites that were kept, by rewrites",
    "reward": "mean reward of the steps that have one: the rewards that the losses used",
    "novelty": "mean novelty of the rewrites that were kept",
    "unscored": "steps without a reward: the guide gave no text, or no verdict could be read",
    "memory": "kept rewrites of this and former iterations that novelty is measured against, besides the seeds",
    "outcome/*": "rewrites with this outcome: `kept`, or why they were not",
    "operation/*": "share of the steps that chose this operation",
    "usd": "what this iteration's rewrites cost when they were bought, where that is known",
    "loss/policy": "PPO's clipped loss, mean per step",
    "loss/value": "half the squared error of the value, mean per step",
    "ppo/entropy": "mean entropy of the policy (nats per step)",
    "ppo/approx_kl": "k3 estimate of KL(old policy || policy) (nats per step)",
    "ppo/clip_fraction": "share of the steps whose ratio was clipped",
    "update/grad_norm": "mean gradient norm before clipping",
    "value/explained": "1 - Var(return - value) / Var(return) before the update",
}
"""Every figure of a training's metrics.jsonl. The table in docs/metrics.md is generated from it."""


def chains_of(iteration: int, seeds: Sequence[Example], count: int, seed: int) -> list[Chain]:
    """The chains of an iteration (from 1): the next ``count`` seeds of consecutive shuffles."""
    first = (iteration - 1) * count
    visits = range(first // len(seeds), (first + count - 1) // len(seeds) + 1)
    orders = {visit: noise.generator(seed, "seeds", visit).permutation(len(seeds)) for visit in visits}
    places = [divmod(place, len(seeds)) for place in range(first, first + count)]
    return [Chain(seeds[orders[visit][i]], visit) for visit, i in places]


def row_of(iteration: int, chains: Sequence[Chain], operations: Sequence[Operation], memory: int) -> dict[str, Any]:
    """An iteration's row without the figures of the update."""
    steps = [step for chain in chains for step in chain.steps]
    outcomes, chosen = Counter(step.outcome for step in steps), Counter(step.operation for step in steps)
    rewards = [step.reward for step in steps if step.reward is not None]
    novelties = [step.novelty for step in steps if step.outcome == KEPT and step.novelty is not None]
    costs = [step.cost_usd for step in steps if step.cost_usd is not None]
    return {
        "iteration": iteration,
        "rewrites": len(steps),
        "queries": sum(step.queries for step in steps),
        "kept": outcomes[KEPT] / len(steps),
        **({"reward": fmean(rewards)} if rewards else {}),
        **({"novelty": fmean(novelties)} if novelties else {}),
        "unscored": len(steps) - len(rewards),
        "memory": memory,
        **{f"outcome/{name}": count for name, count in sorted(outcomes.items())},
        **{f"operation/{operation.name}": chosen[operation.name] / len(steps) for operation in operations},
        **({"usd": sum(costs)} if costs else {}),
    }


def records_of(iteration: int, chains: Sequence[Chain]) -> Iterator[dict[str, Any]]:
    """The lines of ``steps.jsonl`` of an iteration: a StepRecord's fields."""
    for chain in chains:
        for row in chain.rows():
            yield {"schema_version": SCHEMA_VERSION, "iteration": iteration, **row}


def refuse_barren(rows: Sequence[Mapping[str, Any]], *, last: bool) -> None:
    """Raise RlgfError where none of the last :data:`PATIENCE` rewrites was kept, or, at the end, none at all: all
    rewards are equal then, and nothing can be learned from them.
    """
    barren = list(itertools.takewhile(lambda row: not row["kept"], reversed(rows)))
    rewrites = sum(row["rewrites"] for row in barren)
    if rewrites < PATIENCE and not (last and len(barren) == len(rows)):
        return
    why = ", ".join(f"{name}: {count}" for name, count in _outcomes(barren).most_common())
    raise RlgfError(
        f"none of the last {rewrites} rewrites was kept ({why}): there is nothing to learn from",
        hint="steps.jsonl has the guide's texts; change the guide, the operations or the limits, then train anew",
    )


def summary_of(rows: Sequence[Mapping[str, Any]], policy: str) -> dict[str, Any]:
    """The result in run.json: sums of all iterations, and means of the last tenth (``reward`` to ``operations``)."""
    tail = rows[-_tenth(rows) :]
    summary: dict[str, Any] = {"policy": policy, "iterations": len(rows)}
    summary |= {name: sum(row[name] for row in rows) for name in ("rewrites", "queries")}
    for name in ("reward", "kept", "novelty"):
        if values := [row[name] for row in tail if name in row]:
            summary[name] = fmean(values)
    return {**summary, "operations": _shares(tail), "outcomes": dict(_outcomes(rows).most_common())}


def operations_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table: the share of each operation in the first and in the last tenth."""
    first, last = _shares(rows[: _tenth(rows)]), _shares(rows[-_tenth(rows) :])
    return ["operation", "first tenth", "last tenth"], [
        [name, f"{first[name]:.1%}", f"{share:.1%}"] for name, share in last.items()
    ]


def _outcomes(rows: Sequence[Mapping[str, Any]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update({name.partition("/")[2]: n for name, n in row.items() if name.startswith("outcome/")})
    return counts


def _tenth(rows: Sequence[Any]) -> int:
    return max(1, len(rows) // 10)


def _shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = [name for name in rows[0] if name.startswith("operation/")]
    return {name.partition("/")[2]: fmean(row[name] for row in rows) for name in names}
