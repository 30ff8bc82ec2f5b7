"""Data that all rooms share: examples, checks, tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

CheckStatus = Literal["ok", "warn", "fail"]
"""``fail``: an invariant that training relies on does not hold; ``warn``: worth knowing, and stops nothing."""


@dataclass(frozen=True)
class Check:
    """One check: its finding, what that means, and the remedy (empty: none is needed)."""

    name: str
    status: CheckStatus
    finding: str
    explanation: str
    remedy: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True)
class Example:
    """One prompt with its references. ``prompt`` is raw: no template is applied to it yet."""

    id: str
    prompt: str
    references: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ColumnMap:
    """The columns, or templates over columns (``"{title} {text}"``), that make an example."""

    prompt: str = "prompt"
    references: Sequence[str] = ("references",)
    id: str | None = None
    """None: the column ``id`` where there is one. Empty: ids are made."""
    meta: Mapping[str, str] | None = None
    """Key in ``Example.meta`` -> column. None: the column ``meta`` where there is one."""


@dataclass(frozen=True)
class Task:
    """A named mapping from a dataset's rows to examples. Files that hold prompts and references are taken as they
    are."""

    name: str
    summary: str
    dataset: str
    """A hub name or a path; ``--dataset`` replaces it."""
    needs: tuple[str, ...]
    """Columns that every row must have."""
    columns: ColumnMap
    preprocess: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] | None = None
    """From a row with the columns it ``needs`` to one with those of the mapping; None: no example is made of it."""
    skips: str = ""
    """The rows that ``preprocess`` leaves out, in words for messages."""
    group_by: str | None = None
    """Rows with equal values in this column are one example with several references."""
    no_references: frozenset[str] = frozenset()
    """Splits whose examples may lack references."""
