"""Builds an environment from its config, and names the guides that it pays for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlgf_cli.config.evolve import EvolveConfig, NoveltyConfig
from rlgf_cli.evolve.environment import Environment, RewardWeights
from rlgf_cli.evolve.novelty import Collection, NgramSpace, Space
from rlgf_cli.evolve.operations import Operation
from rlgf_cli.evolve.reviewer import GuideReviewer
from rlgf_cli.evolve.rules import Limits
from rlgf_cli.guides.make import make_live_guide, refuse_recorded
from rlgf_cli.protocols import Example, Guide


def make_space(config: NoveltyConfig, device: str) -> Space:
    """The vector space of instructions: that of an encoder, or of word n-grams."""
    if config.encoder is None:
        return NgramSpace()
    from rlgf_cli.evolve.encoder import EncoderSpace

    return EncoderSpace(config.encoder, device=device)


def make_environment(
    config: EvolveConfig,
    operations: Sequence[Operation],
    seeds: Sequence[Example],
    *,
    weights: RewardWeights,
    capacity: int | None = None,
    **callbacks: Any,
) -> Environment:
    """An environment whose collection holds the seeds, and at most ``capacity`` kept rewrites (None: all of them).

    ``callbacks``: ``find_copy`` and ``on_kept`` of the environment.
    """
    space = make_space(config.novelty, config.device)
    reviewer = None
    if config.reviewer is not None:
        reviewer = GuideReviewer(config.reviewer.model_dump(exclude_unset=True), device=config.device)
    return Environment(
        make_live_guide(config.guide, seed=config.seed),
        operations,
        space,
        Collection(space.embed([seed.prompt for seed in seeds]), capacity),
        limits=Limits(config.limits.max_words, config.limits.max_answer_words),
        weights=weights,
        min_novelty=config.novelty.least,
        max_new_tokens=config.max_new_tokens,
        reviewer=reviewer,
        **callbacks,
    )


def billed_guides(environment: Environment) -> dict[str, Guide]:
    """The environment's guide, and the reviewer's where there is one, by their names in the manifest."""
    reviewer = environment.reviewer
    own = {"reviewer": reviewer.judge.guide} if isinstance(reviewer, GuideReviewer) else {}
    return {"guide": environment.guide, **own}


def refuse_recorded_guides(config: EvolveConfig) -> None:
    """Raise UserError where the guide or the reviewer has recorded text alone; nothing is loaded."""
    for guide in filter(None, (config.guide, config.reviewer)):
        refuse_recorded(guide)
