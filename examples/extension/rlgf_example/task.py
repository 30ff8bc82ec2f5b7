"""The task ``headlines``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlgf_cli.protocols import ColumnMap, Task


def _without_adverts(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return None if row["section"] == "advert" else {**row, "story": row["body"].strip()}


HEADLINES = Task(
    name="headlines",
    summary="a news story to its headline",
    dataset="example/headlines",
    needs=("section", "body", "headline"),
    columns=ColumnMap(prompt="story", references=("headline",), meta={"section": "section"}),
    preprocess=_without_adverts,
    skips="adverts",
)
