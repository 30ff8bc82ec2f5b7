"""What a walk will ask of its guide and its reviewer, and what that costs, said before a call is made."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from rlgf_cli.config.evolve import EvolveConfig
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.evolve import reviewer
from rlgf_cli.evolve.operations import Operation
from rlgf_cli.guides.make import describe, make_live_guide
from rlgf_cli.guides.openai.estimate import Plan, estimate
from rlgf_cli.protocols import Example, GuideRequest
from rlgf_cli.scorers.asking import fill

_LOOKED_AT = 200
"""Requests whose length stands for all."""


def cost_estimate(
    config: EvolveConfig,
    operations: Sequence[Operation],
    seeds: Sequence[Example],
    *,
    rewrites: int,
    answer_tokens: int | None = None,
) -> dict[str, Any]:
    """Calls, tokens and US dollars of ``rewrites`` rewrites and, with a reviewer, a verdict on each; with
    ``answer_tokens``, an answer of that length at most to each of them too.

    Calls are upper bounds but for failures that are asked again: what the cache holds is not asked for, and only what
    breaks no rule is reviewed. Every instruction is taken to be as long as its seed and half of ``max_new_tokens``.
    """
    grown = "x" * 2 * config.max_new_tokens  # half of the longest rewrite, at four letters to a token
    asked = [(i, operations[i % len(operations)], seeds[i % len(seeds)]) for i in range(_LOOKED_AT)]
    requests = [
        GuideRequest(Example(str(i), operation.ask(seed.prompt + grown)), max_new_tokens=config.max_new_tokens)
        for i, operation, seed in asked
    ]
    found: dict[str, Any] = {"rewrites": rewrites, "guide_calls": rewrites}
    if answer_tokens is not None:
        requests += [
            GuideRequest(Example(str(i), seed.prompt + grown), max_new_tokens=answer_tokens) for i, _, seed in asked
        ]
        found |= {"answers": rewrites, "guide_calls": 2 * rewrites}
    found |= _cost(config.guide, requests, found["guide_calls"], config.seed)
    if config.reviewer is not None:
        verdicts = [
            GuideRequest(
                Example(str(i), fill(reviewer.TEMPLATE, {"first": seed.prompt + grown, "second": seed.prompt + grown})),
                max_new_tokens=reviewer.MAX_NEW_TOKENS,
            )
            for i, _, seed in asked
        ]
        found["reviewer_calls"] = rewrites
        costs = _cost(config.reviewer, verdicts, rewrites, config.seed)
        found |= {f"reviewer_{name}": value for name, value in costs.items()}
    return found


def _cost(config: GuideConfig, requests: Sequence[GuideRequest], calls: int, seed: int) -> dict[str, Any]:
    """The estimate of ``calls`` calls like the given requests; nothing for a guide that has no price."""
    if not describe(config).remote:
        return {}
    with contextlib.closing(make_live_guide(config.model_copy(update={"mode": "replay"}), seed=seed)) as guide:
        sample = Plan(requests=len(requests))
        for request in requests:
            sample.add(guide, request)
        share = calls / len(requests)
        plan = Plan(
            requests=calls,
            prompt_bytes=round(sample.prompt_bytes * share),
            limit_tokens=round(sample.limit_tokens * share),
        )
        told = ("prompt_tokens", "completion_tokens", "basis", "usd", "at_most_usd", "seconds")
        return {name: value for name, value in estimate(guide, plan).items() if name in told}
