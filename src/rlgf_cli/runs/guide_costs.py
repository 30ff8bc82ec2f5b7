"""A guide inside ``rlgf train``: what the algorithm asks of it, what that will cost, whose texts were used."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rlgf_cli import noise
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.artifacts.jsonl import example_records
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.config.train import TrainConfig
from rlgf_cli.errors import UserError
from rlgf_cli.guides.make import check_guide, describe, make_live_guide
from rlgf_cli.guides.openai.estimate import Plan, estimate
from rlgf_cli.ledger.spend import spend_of
from rlgf_cli.models.prompts import Encoded
from rlgf_cli.protocols import Guide, GuideRequest

_LOOKED_AT = 200
"""Prompts whose length stands for all in an estimate."""


def share_of(config: GuideConfig, processes: int) -> GuideConfig:
    """The guide as one of several processes asks it: the limits are the run's, and each process keeps to its part."""

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
    """Which prompts the guide has text for: all of them for a live guide (None), some for a recorded one."""
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


def spend_row(paid: Sequence[Guide]) -> dict[str, Any]:
    """What guides elsewhere, the reward's judges among them, were asked and paid so far, for the step's row."""
    remote = [guide for guide in paid if guide.abilities.remote]
    if not remote:
        return {}
    spend, mended = spend_of(remote), sum(guide.counts.total() for guide in remote)
    row = {"guide/calls": spend["calls"], "guide/cached": spend["cached"], "guide/mended": mended}
    return row | ({} if spend["charged_usd"] is None else {"guide/usd": spend["charged_usd"]})


def merge_spend(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of the processes' rows: the books are one for all, what came from the cache and was mended is each's."""
    each = ("guide/cached", "guide/mended")
    return {**rows[0], **{name: sum(row[name] for row in rows) for name in each if name in rows[0]}}


def provenance(guide: Guide, asked: int, distinct: int) -> dict[str, Any]:
    """The guide's part of a model card."""
    found: dict[str, Any] = {
        "guide": guide.name.rpartition("/")[2] if "/" in guide.name else guide.name,
        "texts asked for": asked or None,
        "distinct texts used": distinct,
    }
    if guide.abilities.live:
        spend = guide.spend()
        models = sorted(guide.models) if guide.abilities.remote else []
        found |= {
            "models as reported": ", ".join(models) or None,
            "calls charged": spend["calls"] if guide.abilities.remote else None,
            "US dollars charged": spend["charged_usd"] if guide.abilities.remote else None,
            "terms": guide.licence,
        }
    return found


def training_estimate(config: TrainConfig) -> dict[str, Any]:
    """Guide calls, tokens and cost of a training run; no policy is loaded and nobody is asked.

    A policy that ends by itself needs no guide, and what the cache holds is not asked for again, so the calls are an
    upper bound.
    """
    spec, calls = config.algorithm.spec(), planned_calls(config)
    found: dict[str, Any] = {"steps": config.max_steps, "episodes": config.max_steps * config.rollout.episodes}
    if config.guide is None or not spec.needs_guide:
        return {**found, "guide_calls": 0}
    check_guide(config.guide, spec)
    if not describe(config.guide).live:
        return {**found, "guide_calls": 0}
    if not describe(config.guide).remote:
        return {**found, "guide_calls": calls}
    guide = make_live_guide(config.guide.model_copy(update={"mode": "replay"}), seed=config.seed)
    try:
        sample = Plan()
        records = itertools.islice(example_records(config.data, limit=config.limit), _LOOKED_AT)
        prefix = "x" * 2 * config.lengths.max_new_tokens if spec.needs_live_guide else ""  # half of it, in letters
        for count, (_, record) in enumerate(records, 1):
            sample.add(guide, GuideRequest(record.to_example(), prefix, 0, config.lengths.max_new_tokens))
            sample.requests = count
        share = calls / max(1, sample.requests)
        plan = Plan(
            requests=calls,
            prompt_bytes=round(sample.prompt_bytes * share),
            limit_tokens=round(sample.limit_tokens * share),
            reference_bytes=sample.reference_bytes,
        )
        return {**found, "guide_calls": calls, **_without_file(estimate(guide, plan))}
    finally:
        guide.close()


def planned_calls(config: TrainConfig) -> int:
    """Texts that a run asks of its guide, at most; the regimes are those that it will draw."""
    spec = config.algorithm.spec()
    regimes = [
        spec.regime_at(step, noise.uniforms(1, config.seed, "regime", step)[0]) for step in range(config.max_steps)
    ]
    return round(sum(_calls(regime, config.rollout.episodes, spec.group_size) for regime in regimes))


def _calls(regime: Regime, episodes: int, group_size: int) -> float:
    """Texts that a step asks of its guide, at most."""
    if regime.roll_out == "guide":
        return float(episodes * regime.guide_calls)
    return regime.rollin_prob * episodes / group_size if regime.roll_in == "guide" else 0.0


def _without_file(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in ("in_file", "cached", "to_ask", "requests")}
