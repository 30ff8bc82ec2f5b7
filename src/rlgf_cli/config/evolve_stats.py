"""The config of ``rlgf evolve stats``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from rlgf_cli.config.common import COMMON, MODEL, RUN, Device, Seed
from rlgf_cli.section import Argument, Flag, Strict


class DrawsConfig(Strict):
    """The comparison of two sets: ``count`` draws of at most ``texts`` texts of each, without replacement, and the
    level of the intervals.
    """

    count: Annotated[int, Flag("Draws from both sets to compare. Default: {default}.", "--draws")] = Field(200, ge=20)
    texts: Annotated[int, Flag("Texts of a draw, at most. Default: {default}.")] = Field(500, ge=2)
    level: Annotated[float, Flag("Of the intervals. Default: {default}.")] = Field(0.95, gt=0, lt=1)


class EvolveStatsConfig(Strict):
    """``sets``: one or two folders of ``rlgf evolve generate``, or JSONL files of prompts; two are compared.

    ``encoder`` is a folder or hub name of a text encoder, in whose space spread, Vendi score and clusters are measured;
    null: words and pairs of words. Texts are of one cluster from the cosine ``cosine`` on; null: 0.5 with an encoder,
    0.3 without. ``output`` is a folder for stats.json and plots; null: nothing is written. ``seed`` decides the draws,
    and the order in which texts are taken for clusters.
    """

    usage: ClassVar[Mapping[str, str]] = {"sets": "rlgf evolve stats SET [SET2]"}
    panels: ClassVar[Mapping[str, str]] = {
        "": "sets",
        "Measures": "encoder cosine draws.count draws.texts draws.level",
        COMMON: "output --config --set seed",
        MODEL: "device",
        RUN: "--overwrite --print-config --json",
    }
    sets: Annotated[
        list[str],
        Argument("A folder of rlgf evolve generate or any JSONL file of prompts; a second one is compared with it."),
    ] = Field(min_length=1, max_length=2)
    encoder: Annotated[str | None, Flag("Folder or hub name of a text encoder. Default: words and pairs of words.")] = (
        None
    )
    cosine: Annotated[
        float | None, Flag("From here on, two texts are of one cluster. Default: 0.5 with an encoder, 0.3 without.")
    ] = Field(None, gt=0, lt=1)
    draws: DrawsConfig = Field(default_factory=DrawsConfig)
    output: Annotated[str | None, Flag("A folder for stats.json and plots.", "--output-dir", "-o", "--output")] = None
    seed: Seed = 0
    device: Device = "auto"
