"""``rlgf compare``: the config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from rlgf_cli.config.eval import IntervalConfig
from rlgf_cli.section import Refused, Strict


class CompareConfig(Strict):
    """``systems``: eval folders or run folders, the first is the base; ``name=folder`` gives one a name, and
    several folders under one name (``name=folder,folder``, or the name again) are seeds of one system.

    ``metrics`` names figures (``rouge.rougeL``) or metrics (``rouge``: all of its figures); by default what
    all systems have. ``test`` says whose p-values are corrected after Holm. ``force`` compares what differs in
    signature, references or ids all the same. ``pair_seeds``: the i-th seed of every system belongs with the i-th
    of the base (the same start, the same order of data), and differences are formed within these pairs.
    """

    usage: ClassVar[Mapping[str, str]] = {"systems": "rlgf compare BASE OTHER [MORE ...]"}
    systems: list[str] = Field(min_length=2)
    metrics: list[str] | None = None
    test: Literal["bootstrap", "randomisation"] = "bootstrap"
    pair_seeds: bool = False
    force: bool = False
    output: str | None = None
    seed: int = Field(0, ge=0)
    interval: IntervalConfig = Field(default_factory=IntervalConfig)

    @model_validator(mode="after")
    def _check(self) -> CompareConfig:
        suffix = Path(self.output or "").suffix
        if suffix not in ("", ".json"):
            raise Refused(
                f"output: JSON is written, and {self.output!r} ends in {suffix}",
                hint="name it FILE.json; for Markdown: rlgf compare ... --markdown > FILE.md",
            )
        return self
