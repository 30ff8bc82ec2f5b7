"""The config of ``rlgf compare``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from rlgf_cli.config.common import COMMON, RUN, Seed, as_names
from rlgf_cli.config.eval import IntervalConfig
from rlgf_cli.section import Argument, Flag, Refused, Strict


def _names_or_all(value: Any) -> Any:
    return as_names(value) or None  # --metrics "" is all of them


class CompareConfig(Strict):
    """``systems``: eval folders or run folders, the first is the base; ``name=folder`` gives one a name, and
    several folders under one name (``name=folder,folder``, or the name again) are seeds of one system.

    ``metrics`` names figures (``rouge.rougeL``) or metrics (``rouge``: all of its figures); by default what all systems
    have. ``test`` says whose p-values are corrected after Holm. ``force`` also compares systems that differ in
    signature, references or ids. ``pair_seeds``: the i-th seed of every system belongs with the i-th of the base (the
    same start, the same order of data), and differences are formed within these pairs. ``texts``: so many prompts,
    drawn with ``seed``, are shown with the text of every system (of its first seed).
    """

    usage: ClassVar[Mapping[str, str]] = {"systems": "rlgf compare BASE OTHER [MORE ...]"}
    panels: ClassVar[Mapping[str, str]] = {
        "": "systems",
        "Comparison options": "metrics force interval.level interval.resamples test pair_seeds texts --markdown",
        COMMON: "output --config --set seed",
        RUN: "--overwrite --print-config --json",
    }
    systems: Annotated[
        list[str],
        Argument(
            "Folders that rlgf eval wrote, or runs with eval/ in them; the first is the base. NAME=FOLDER names one; "
            "NAME=FOLDER,FOLDER, or the name again, gives its seeds."
        ),
    ] = Field(min_length=2)
    metrics: Annotated[
        list[str] | None,
        BeforeValidator(_names_or_all),
        Flag("Names with commas between: rouge, rouge.rougeL. Default: all."),
    ] = None
    test: Annotated[
        Literal["bootstrap", "randomisation"],
        Flag("Whose p-values are corrected: bootstrap or randomisation. Default: {default}."),
    ] = "bootstrap"
    pair_seeds: Annotated[
        bool, Flag("Seeds belong together in the order given: differences are formed within the pairs.")
    ] = False
    texts: Annotated[int, Flag("Prompts to show with the text of every system.")] = Field(0, ge=0)
    force: Annotated[bool, Flag("Compare in spite of different signatures, references or prompts.")] = False
    output: Annotated[str | None, Flag("Also write the comparison to this JSON file.", "--output", "-o")] = None
    seed: Seed = 0
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
