"""``rlgf evolve stats``: the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from rlgf_cli.section import Strict


class DrawsConfig(Strict):
    """How two sets are compared: ``count`` draws of at most ``texts`` texts of each, without replacement, and the level
    of the intervals.
    """

    count: int = Field(200, ge=20)
    texts: int = Field(500, ge=2)
    level: float = Field(0.95, gt=0, lt=1)


class EvolveStatsConfig(Strict):
    """``sets``: one or two folders of ``rlgf evolve generate``, or JSONL files of prompts; two are compared.

    ``encoder`` is a folder or hub name of a text encoder, whose space spread, Vendi score and clusters are measured in;
    null: words and pairs of words. Texts are of one cluster from the cosine ``cosine`` on; null: 0.5 with an encoder,
    0.3 without. ``output`` is a folder for stats.json and plots; null: nothing is written. ``seed`` decides the draws,
    and the order in which texts are taken for clusters.
    """

    usage: ClassVar[Mapping[str, str]] = {"sets": "rlgf evolve stats SET [SET2]"}
    sets: list[str] = Field(min_length=1, max_length=2)
    encoder: str | None = None
    cosine: float | None = Field(None, gt=0, lt=1)
    draws: DrawsConfig = Field(default_factory=DrawsConfig)
    output: str | None = None
    seed: int = Field(0, ge=0)
    device: str = "auto"
