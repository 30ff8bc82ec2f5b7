"""What goes wrong in a run whose logged score still looks fine."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

_FIRST = 10
"""Rows that the later ones are held against."""


class Alarm:
    """Sees the policy's roll-ins shrink: the guide writes ever more, and the score is its own. Says so once."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._warned = False

    def __call__(self, row: Mapping[str, Any]) -> str | None:
        """The warning that this row of metrics.jsonl calls for, if any."""
        if self._warned or "length/horizon" not in row or "rollin/tokens" not in row:
            return None
        if len(self._first) < _FIRST:
            self._first.append(row["rollin/tokens"])
            return None
        if row["rollin/tokens"] >= 0.5 * fmean(self._first):
            return None
        self._warned = True
        return (
            f"step {row['step']}: the policy's roll-ins shrank from {fmean(self._first):.1f} to "
            f"{row['rollin/tokens']:.1f} tokens; the guide writes almost everything, and the score is the guide's. "
            "Look at eval/score; with cut: inner this is expected (docs/algorithms.md)"
        )
