"""The estimate of a rollout's guide and reviewer calls and their cost, before a call is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from rlgf_cli.config.evolve import EvolveConfig
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.evolve import reviewer
from rlgf_cli.evolve.operations import Operation
from rlgf_cli.guides.make import describe, make_offline_guide
from rlgf_cli.guides.openai.estimate import Plan, estimate
from rlgf_cli.protocols import Example, GuideRequest
from rlgf_cli.scorers.judge_guide import fill

_SAMPLE = 200
"""Requests from whose lengths those of all are extrapolated."""
_FIGURES = ("prompt_tokens", "completion_tokens", "basis", "usd", "at_most_usd", "seconds")


def cost_estimate(
    config: EvolveConfig,
    operations: Sequence[Operation],
    seeds: Sequence[Example],
    *,
    rewrites: int,
    answer_tokens: int | None = None,
) -> dict[str, Any]:
    """Calls, tokens and US dollars of ``rewrites`` rewrites and, with a reviewer, a verdict on each; with
    ``answer_tokens``, an answer of at most that length to each of them too.

    Calls are upper bounds but for retries: cached texts are not requested, and only rewrites that break no rule are
    reviewed. Every instruction is taken to be as long as its seed and half of ``max_new_tokens``.
    """
    grown = "x" * 2 * config.max_new_tokens  # half of the longest rewrite, at four letters to a token
    texts = [seeds[i % len(seeds)].prompt + grown for i in range(_SAMPLE)]
    prompts = [operations[i % len(operations)].prompt_for(text) for i, text in enumerate(texts)]
    requests = _requests(prompts, config.max_new_tokens)
    row: dict[str, Any] = {"rewrites": rewrites, "guide_calls": rewrites}
    if answer_tokens is not None:
        requests += _requests(texts, answer_tokens)
        row |= {"answers": rewrites, "guide_calls": 2 * rewrites}
    row |= _cost(config, config.guide, requests, row["guide_calls"])
    if config.reviewer is not None:
        pairs = (fill(reviewer.TEMPLATE, {"first": text, "second": text}) for text in texts)
        verdicts = _cost(config, config.reviewer, _requests(pairs, reviewer.MAX_NEW_TOKENS), rewrites)
        row |= {"reviewer_calls": rewrites, **{f"reviewer_{name}": value for name, value in verdicts.items()}}
    return row


def _requests(prompts: Iterable[str], max_new_tokens: int) -> list[GuideRequest]:
    return [GuideRequest(Example(str(i), p), max_new_tokens=max_new_tokens) for i, p in enumerate(prompts)]


def _cost(config: EvolveConfig, writer: GuideConfig, sample: Sequence[GuideRequest], calls: int) -> dict[str, Any]:
    """The estimate of ``calls`` calls like those of the sample; nothing for a guide that is not remote. Raises
    UserError for a cap in US dollars where no price is known."""
    if not describe(writer).remote:
        return {}
    with contextlib.closing(make_offline_guide(writer, seed=config.seed)) as guide:
        guide.check_budget(config.budget)
        plan = Plan(requests=len(sample))
        for request in sample:
            plan.add(guide, request)
        return {name: value for name, value in estimate(guide, plan.scaled(calls)).items() if name in _FIGURES}
