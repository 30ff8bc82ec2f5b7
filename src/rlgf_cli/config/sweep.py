"""The config of ``rlgf sweep``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from rlgf_cli.config.common import COMMON, RUN, StageConfig
from rlgf_cli.config.eval import IntervalConfig
from rlgf_cli.section import Flag, Refused


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _flat(value: Any, prefix: str = "") -> Any:
    """``{algorithm: {rollin_prob: [..]}}`` is ``{"algorithm.rollin_prob": [..]}``, and one value a list of one."""
    if not isinstance(value, dict):
        return value
    flat: dict[str, Any] = {}
    for name, below in value.items():
        if isinstance(below, dict):
            flat.update(_flat(below, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = _as_list(below)
    return flat


Recipes = Annotated[list[str | dict[str, Any]], BeforeValidator(_as_list), Field(min_length=1)]
"""Recipes over each other: paths, or the keys themselves."""


class SweepConfig(StageConfig):
    """A grid of training runs, each of them evaluated, and the table of their figures.

    ``base`` and ``eval`` are recipes of ``rlgf train`` and ``rlgf eval``: a path, the keys themselves, or a list of
    both, later ones over earlier ones. ``grid`` maps train's keys to lists of values; ``alg`` is the algorithm, and the
    last part of a key will do where no other key ends in it (``rollin_prob``). Runs that differ in ``seed`` alone are
    one system. ``skip`` and ``only`` leave combinations out: each rule maps keys of the grid to a value or several.

    ``systems`` names what is evaluated without training: a checkpoint, a file of predictions (``.jsonl``), or a list of
    them, one per seed. Significance is tested against each of ``baselines``. ``figures`` are those of the table (null:
    all). ``budget_usd`` caps what all guides together may cost; ``jobs`` runs are at work at once. ``seed`` and
    ``interval`` are those of the comparison.
    """

    usage: ClassVar[Mapping[str, str]] = {"base": "rlgf sweep SWEEP.yaml -o FOLDER; the YAML holds it"}
    panels: ClassVar[Mapping[str, str]] = {
        "": "RECIPES",
        COMMON: "output --config --set seed",
        "Sweep options": "jobs budget_usd --table --dry-run",
        RUN: "--resume --overwrite --print-config --json",
    }
    base: Recipes
    grid: Annotated[dict[str, list[Any]], BeforeValidator(_flat), Field(min_length=1)]
    skip: list[dict[str, Any]] = Field(default_factory=list)
    only: list[dict[str, Any]] = Field(default_factory=list)
    eval: Recipes
    systems: dict[str, str | list[str]] = Field(default_factory=dict)
    baselines: list[str] = Field(default_factory=list)
    figures: list[str] | None = None
    budget_usd: Annotated[float | None, Flag("Hard cap on what all guides cost together.")] = Field(None, ge=0)
    jobs: Annotated[int, Flag("Runs at once.", "--jobs", "-j")] = Field(1, ge=1)
    interval: IntervalConfig = Field(default_factory=IntervalConfig)

    @model_validator(mode="after")
    def _check(self) -> SweepConfig:
        for name, folders in self.systems.items():
            if "=" in name or not name.strip() or not folders:
                raise Refused(f"systems: {name!r} is no name with a folder", "for example systems: {SFT: runs/sft}")
        return self
