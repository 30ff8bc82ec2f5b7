"""The guide of a training run: the prompts that it covers, shares of its limits, estimates, spend and provenance."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rlgf_cli import noise
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.artifacts.jsonl import example_records
from rlgf_cli.artifacts.rundir import RunDir
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.config.train import TrainConfig
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.guides.make import check_guide, describe, make_offline_guide
from rlgf_cli.guides.openai.estimate import Plan, estimate
from rlgf_cli.ledger.spend import record_spend, spend_of
from rlgf_cli.models.prompts import Encoded
from rlgf_cli.protocols import Guide, GuideRequest
from rlgf_cli.training.parallel.processes import Processes, concluded

_SAMPLED = 200
"""Prompts from whose lengths those of all are estimated."""
_OF_COLLECTIONS = ("in_file", "cached", "to_ask", "requests")


def share_of(config: GuideConfig, processes: int) -> GuideConfig:
    """The guide's config for one of several processes: each gets an equal part of the run's limits."""

    def part(limit: float | None) -> float | None:
        return None if limit is None else limit / processes

    return config.model_copy(
        update={
            "concurrency": max(1, config.concurrency // processes),
            "requests_per_minute": part(config.requests_per_minute),
            "tokens_per_minute": part(config.tokens_per_minute),
        }
    )


def covered_prompts(
    prompts: list[Encoded], guide: Guide | None, on_uncovered: str
) -> tuple[list[Encoded], frozenset[str] | None]:
    """The prompts to train on, and the ids of those that a recorded guide has a text for; None for a live guide."""
    if guide is None or guide.abilities.live:
        return prompts, None
    covered = frozenset(p.example.id for p in prompts if guide.samples(p.example))
    if not covered:
        raise UserError(
            f"the guide file covers none of the {len(prompts)} prompts",
            where=guide.name,
            hint="its id or prompt must be that of the training data; rlgf collect-guide makes such a file",
        )
    if on_uncovered == "drop":
        prompts = [p for p in prompts if p.example.id in covered]
    return prompts, covered


def spend_row(billed: Sequence[Guide]) -> dict[str, Any]:
    """Calls and spend of the remote guides so far, the reward's judges among them, for the step's row."""
    remote = [guide for guide in billed if guide.abilities.remote]
    if not remote:
        return {}
    spend, repaired = spend_of(remote), sum(guide.counts.total() for guide in remote)
    row = {"guide/calls": spend["calls"], "guide/cached": spend["cached"], "guide/mended": repaired}
    return row | ({} if spend["charged_usd"] is None else {"guide/usd": spend["charged_usd"]})


def merge_spend(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of the processes' rows: they share one account, and each counts its own cached and repaired texts."""
    each = ("guide/cached", "guide/mended")
    return {**rows[0], **{name: sum(row[name] for row in rows) for name in each if name in rows[0]}}


@contextmanager
def recorded_spend(
    billed: Sequence[Guide], guide: Guide | None, folder: RunDir | None, processes: Processes
) -> Iterator[None]:
    """Record in run.json, however the block ends, the guide and the judges that were used, and their cost."""

    def write(together: Processes) -> None:
        for writer in billed:
            for rank, cached, models in together.gather((processes.rank, writer.spend()["cached"], writer.models)):
                if rank != processes.rank:
                    writer.add_cached(cached)
                    writer.models.update(models)
        if billed and folder is not None:
            own = guide if guide is not None and guide.abilities.live else None
            record_spend(folder.manifest, guide=own, judges=[judge for judge in billed if judge is not guide])

    with concluded(processes, write):
        yield


def is_unguided(summary: Mapping[str, Any]) -> bool:
    """Whether the run requested texts of its guide and got no usable one."""
    return bool(summary.get("guide/requests")) and not summary["guide/usable"]


def refuse_unguided(summary: Mapping[str, Any], guide: Guide | None, folder: Path) -> None:
    """Raise RlgfError (exit 1) where the run was trained without its guide. What it saved stays."""
    if guide is not None and is_unguided(summary):
        raise RlgfError(
            f"the guide {guide.name} gave no usable text to any of {summary['guide/requests']} requests: the policy "
            "was trained without it. The model is saved, and its card says so",
            where=str(folder),
            hint="rlgf doctor --guide shows what it answers; the same algorithm without a guide is the plain one",
        )


def provenance(guide: Guide, requests: int, distinct: int, *, unguided: bool = False) -> dict[str, Any]:
    """The guide's part of a model card."""
    row: dict[str, Any] = {
        "guide": guide.name.rpartition("/")[2] if "/" in guide.name else guide.name,
        "texts asked for": requests or None,
        "distinct texts used": distinct,
        "unguided": "the guide gave no usable text, and the policy was trained without it" if unguided else None,
    }
    if guide.abilities.live:
        spend = guide.spend()
        models = sorted(guide.models) if guide.abilities.remote else []
        row |= {
            "models as reported": ", ".join(models) or None,
            "calls charged": spend["calls"] if guide.abilities.remote else None,
            "US dollars charged": spend["charged_usd"] if guide.abilities.remote else None,
            "terms": guide.licence,
        }
    return row


def training_estimate(config: TrainConfig) -> dict[str, Any]:
    """Guide calls, tokens and price of a training run; no policy is loaded and no request is sent.

    The calls are an upper bound: a policy that ends by itself needs no guide, and cached texts are not requested again.
    """
    spec, calls = config.algorithm.spec(), planned_calls(config)
    totals: dict[str, Any] = {"steps": config.max_steps, "episodes": config.max_steps * config.rollout.episodes}
    if config.guide is None or not spec.needs_guide:
        return {**totals, "guide_calls": 0}
    check_guide(config.guide, spec)
    if not describe(config.guide).live:
        return {**totals, "guide_calls": 0}
    if not describe(config.guide).remote:
        return {**totals, "guide_calls": calls}
    with closing(make_offline_guide(config.guide, seed=config.seed)) as guide:
        guide.check_budget(config.budget)
        sample = Plan()
        records = itertools.islice(example_records(config.data, limit=config.limit), _SAMPLED)
        prefix = "x" * 2 * config.lengths.max_new_tokens if spec.needs_live_guide else ""  # half of the tokens
        for count, (_, record) in enumerate(records, 1):
            sample.add(guide, GuideRequest(record.to_example(), prefix, 0, config.lengths.max_new_tokens))
            sample.requests = count
        figures = estimate(guide, sample.scaled(calls))
        return {**totals, "guide_calls": calls, **{n: v for n, v in figures.items() if n not in _OF_COLLECTIONS}}


def planned_calls(config: TrainConfig) -> int:
    """The most texts that a run requests of its guide, for the regimes that it will draw."""
    spec = config.algorithm.spec()
    regimes = [
        spec.regime_at(step, noise.uniforms(1, config.seed, "regime", step)[0]) for step in range(config.max_steps)
    ]
    return round(sum(_calls(regime, config.rollout.episodes, spec.group_size) for regime in regimes))


def _calls(regime: Regime, episodes: int, group_size: int) -> float:
    """The most texts that a step requests of its guide."""
    if regime.roll_out == "guide":
        return float(episodes * regime.guide_calls)
    if regime.adds_texts or regime.on_failure is not None:
        return episodes / group_size
    return regime.rollin_prob * episodes / group_size if regime.roll_in == "guide" else 0.0
