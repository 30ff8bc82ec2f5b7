"""The keys that the configs of ``rlgf evolve train`` and ``rlgf evolve generate`` share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlgf_cli.config.common import Device, Limit, StageConfig
from rlgf_cli.config.guide import TRANSPORT, BudgetConfig, GuideConfig
from rlgf_cli.section import Flag, Strict


class NoveltyConfig(Strict):
    """The measure of novelty. ``encoder``: folder or hub name of a text encoder; null: words and pairs of words.

    The novelty of a rewrite is 1 - the cosine to the nearest instruction so far, seeds included; below
    ``least`` it is a duplicate.
    """

    encoder: Annotated[str | None, Flag("Text encoder for novelty; else words.")] = None
    least: float = Field(0.05, ge=0, lt=1)


class LimitsConfig(Strict):
    """Limits of the rules: words of a rewrite, and of an answer."""

    max_words: int = Field(300, ge=1)
    max_answer_words: int = Field(1000, ge=1)


class EvolveConfig(StageConfig):
    """``data`` holds the seed instructions: the prompts of JSONL records. ``operations`` is a YAML file of ways to
    rewrite; null: the built-in six. A chain takes ``steps`` steps from its seed; ``batch_size`` chains go side by side.
    ``max_new_tokens`` is for a rewrite. ``reviewer`` is a guide that judges whether a rewrite asks for something else.
    ``budget`` holds for guide and reviewer together.
    """

    data: Annotated[str, Flag("JSONL with the seed instructions.")]
    limit: Limit = None
    operations: Annotated[str | None, Flag("YAML of ways to rewrite; else six of them.")] = None
    guide: Annotated[GuideConfig, Flag("Who rewrites: hf:PATH, openai:MODEL, alias.")]
    reviewer: Annotated[GuideConfig | None, Flag("Guide that says whether a rewrite differs.")] = None
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    steps: Annotated[int, Flag("Rewrites of a chain. Default: {default}.")] = Field(6, ge=1, le=100)
    batch_size: Annotated[int, Flag("Chains side by side.")] = Field(32, ge=1)
    max_new_tokens: Annotated[int, Flag("Longest rewrite, in tokens.")] = Field(512, ge=1)
    novelty: NoveltyConfig = Field(default_factory=NoveltyConfig)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    device: Device = "auto"


FREE_WHILE_EVOLVING = {
    "budget.max_cost_usd",
    "budget.max_calls",
    *(f"{section}.{key}" for section in ("guide", "reviewer") for key in TRANSPORT),
}
"""Keys that may differ when a run is resumed: they do not change which rewrites are kept."""
