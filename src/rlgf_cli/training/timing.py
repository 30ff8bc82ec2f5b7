"""The seconds of each part of an iteration: the figures ``time/*`` of every row, and the table of ``--profile``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean, median
from typing import Any

ALWAYS = ("rollout", "guide", "reward", "annotate", "update")
"""Parts that every row has; without a request, the guide took 0 seconds."""
PARTS = (*ALWAYS, "sync", "eval", "check", "save", "other")
"""All parts, in the order in which they are shown. Together they are the whole time."""


class Clock:
    """Seconds by part. A lap ends when the step's row is made; what comes after that, saving above all, is part of the
    next lap.

    ``waited``: the seconds spent on waiting for the guide so far. Waiting inside a part is taken out of it.
    """

    def __init__(self, waited: Callable[[], float]) -> None:
        self._waited = waited
        self._seconds: dict[str, float] = {}
        self._begun: float | None = None

    def begin(self) -> None:
        """Start the first lap; later calls do nothing."""
        if self._begun is None:
            self._begun = time.perf_counter()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the block's seconds to a part."""
        before, waited_before = time.perf_counter(), self._waited()
        yield
        waited = self._waited() - waited_before
        for part, seconds in ((name, time.perf_counter() - before - waited), ("guide", waited)):
            self._seconds[part] = self._seconds.get(part, 0.0) + seconds

    def lap(self) -> dict[str, float]:
        """End the lap: ``{"time/PART": seconds}``, with the remaining time as ``other``."""
        now = time.perf_counter()
        spent = self._seconds
        other = now - (now if self._begun is None else self._begun) - sum(spent.values())
        self._seconds, self._begun = {}, now
        seconds = {**dict.fromkeys(ALWAYS, 0.0), **spent, "other": max(0.0, other)}
        return {f"time/{name}": round(seconds[name], 4) for name in PARTS if name in seconds}


HEADER = ["part", "steps", "mean s", "median s", "share", "tokens/s"]


def profile(rows: Sequence[Mapping[str, Any]], last_save: float = 0.0, *, epochs: int) -> list[list[str]]:
    """The table's rows, from rows of metrics.jsonl; mean and median over the steps in which a part took time.

    ``last_save``: seconds of the save behind the last row. ``tokens/s``: tokens that the policy wrote, that the guide
    wrote, and response tokens that the update passed over (``epochs`` times), each by its part's seconds.
    """
    laps = [{name: row.get(f"time/{name}", 0.0) for name in PARTS} for row in rows]
    laps[-1]["save"] += last_save
    whole = [sum(lap.values()) for lap in laps]
    written = [row["episodes"] * row["length/mean"] for row in rows]
    own = [n * row["tokens/policy"] for n, row in zip(written, rows, strict=True)]
    tokens = {"rollout": sum(own), "guide": sum(written) - sum(own), "update": epochs * sum(written)}
    table = []
    for name in PARTS:
        seconds = [lap[name] for lap in laps if lap[name] > 0]
        if seconds:
            rate = f"{tokens[name] / sum(seconds):.0f}" if tokens.get(name) else ""
            table.append([name, *_figures(seconds), f"{100 * sum(seconds) / sum(whole):.1f}%", rate])
    return [*table, ["all", *_figures(whole), "100.0%", f"{sum(written) / sum(whole):.0f}" if sum(whole) else ""]]


def _figures(seconds: Sequence[float]) -> list[str]:
    return [str(len(seconds)), f"{fmean(seconds):.4f}", f"{median(seconds):.4f}"]
