"""Data that all rooms share: examples, checks, tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlgf_cli.protocols.messages import Message, Prompt, last_words

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
    """One prompt with its references. ``prompt`` is raw: no template is applied to it yet.

    Where the data has a conversation, ``messages`` holds it and ``prompt`` its last message, the user's: what a scorer
    reads that counts words. Whatever is rendered, matched or stored is :attr:`given`.
    """

    id: str
    prompt: str
    references: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()

    @classmethod
    def of(
        cls, id: str, given: Prompt, references: Sequence[str] = (), meta: Mapping[str, Any] | None = None
    ) -> Example:
        """The example of a prompt that is a text or a conversation."""
        messages = () if isinstance(given, str) else given
        return cls(id, last_words(given), tuple(references), meta or {}, messages)

    @property
    def given(self) -> Prompt:
        """The prompt as the data gives it: the conversation, or the text."""
        return self.messages or self.prompt


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
