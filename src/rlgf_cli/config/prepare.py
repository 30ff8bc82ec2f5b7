"""The config of ``rlgf prepare``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rlgf_cli.config.common import COMMON, RUN, StageConfig
from rlgf_cli.section import Flag, Strict

_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class MapConfig(Strict):
    """The columns that become an example. A value is a column's name (``a.b`` for a nested one) or a template.

    A template is text with columns in braces: ``{title} {post}``. Left out, the columns are named ``id``,
    ``prompt``, ``references`` and ``meta``, or as the task says.
    """

    id: str | None = None
    prompt: str | None = None
    references: Annotated[list[str] | None, BeforeValidator(_as_list)] = Field(None, min_length=1)
    meta: dict[str, str] = Field(default_factory=dict)


class PrepareConfig(StageConfig):
    """From a hub dataset or local files to checked JSONL splits in the folder ``output``."""

    panels: ClassVar[Mapping[str, str]] = {
        "": "FILES",
        "Data": "dataset task --map splits subset revision group_by drop_bad allow_no_references",
        COMMON: "output --config --set seed",
        "Splits and size": "split_from fractions limit sample",
        "Check": "--check --kind",
        RUN: "--overwrite --print-config --json",
    }
    dataset: Annotated[
        str | None,
        Flag("A hub name, a file, or a folder with train, validation and test files.", "--dataset", "--dataset-name"),
    ] = None
    """A hub name, a file, or a folder that holds train, validation and test files."""
    subset: Annotated[str | None, Flag("The hub dataset's configuration.", "--subset", "--dataset-config")] = None
    """The hub dataset's configuration, where it has several."""
    revision: Annotated[str | None, Flag("The hub dataset's branch, tag or commit.")] = None
    task: Annotated[str | None, Flag("A built-in mapping: commongen, imdb, tldr.")] = None
    """A built-in task: its dataset, its mapping, its clean-up."""
    splits: Annotated[dict[str, str], Flag("train=FILE,test=FILE, or the hub's split names.")] = Field(
        default_factory=dict
    )
    """Split to write -> file to read, or the hub's name of the split."""
    map: MapConfig = Field(default_factory=MapConfig)
    group_by: Annotated[str | None, Flag("Rows with equal values here become one example with all references.")] = None
    """Rows with equal values in this column become one example with all their references."""
    drop_bad: Annotated[bool, Flag("Drop and count bad rows instead of stopping.")] = False
    allow_no_references: Annotated[bool, Flag("Keep prompts without references.")] = False
    split_from: Annotated[str | None, Flag("The split that --fractions are taken from.")] = None
    fractions: Annotated[dict[str, Annotated[float, Field(gt=0, lt=1)]], Flag("validation=0.05,test=0.05")] = Field(
        default_factory=dict
    )
    limit: Annotated[int | None, Flag("Keep the first N examples of a split.", "--limit", "-L")] = Field(None, ge=1)
    sample: Annotated[int | None, Flag("Keep N random examples of a split.")] = Field(None, ge=1)

    @field_validator("splits", "fractions")
    @classmethod
    def _check_names(cls, value: dict) -> dict:
        for name in value:
            if not _SPLIT_NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a split: letters, digits, _ and - can")
        return value

    @model_validator(mode="after")
    def _check(self) -> PrepareConfig:
        if not (self.dataset or self.task or self.splits):
            raise ValueError("nothing to prepare: give a dataset, a task or splits")
        if self.limit is not None and self.sample is not None:
            raise ValueError("limit takes the first examples and sample random ones: give one of them")
        if bool(self.split_from) != bool(self.fractions):
            raise ValueError("split_from and fractions go together")
        if sum(self.fractions.values()) >= 1:
            raise ValueError("the fractions leave nothing of the split they are taken from")
        return self
