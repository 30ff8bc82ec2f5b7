"""What the layers promise each other. Text goes in and out of guides and rewards; no torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

FinishReason = Literal["stop", "length"]
"""``stop``: the author ended the text (it gets an EOS); ``length``: it ran out of tokens (it does not)."""


CheckStatus = Literal["ok", "warn", "fail"]
"""``fail``: a truth is broken that training relies on; ``warn``: worth knowing, and stops nothing."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what was found, what it means, what to do (empty: nothing)."""

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
class Completion:
    """What a guide wrote after ``prompt + prefix``: the continuation only, never the prefix again.

    ``model`` is the model as the server reported it. ``usage`` counts tokens (``prompt_tokens``,
    ``completion_tokens``) where they are known. ``created`` is when it was written (UTC, ISO 8601), ``mended``
    what was repaired in it, and ``raw`` the text as it came, where that differs. ``cached``: nothing was asked
    or paid for it now; ``cost_usd`` is what it cost when it was bought.
    """

    text: str
    finish_reason: FinishReason
    model: str
    usage: Mapping[str, int] = field(default_factory=dict)
    cost_usd: float | None = None
    created: str = ""
    mended: tuple[str, ...] = ()
    raw: str | None = None
    cached: bool = False


@dataclass(frozen=True)
class GuideRequest:
    """One text that a guide is asked for.

    ``prefix`` is what the policy has already written (empty: the guide writes it all);
    ``max_new_tokens`` counts what may still be written after the prefix. ``sample_index`` tells several
    requests for the same text apart: equal requests with equal indices may be answered with one text.
    """

    example: Example
    prefix: str = ""
    sample_index: int = 0
    max_new_tokens: int = 64


@dataclass(frozen=True)
class GuideAbilities:
    """``live``: answers new requests. ``continues``: can go on from a prefix it did not write. ``remote``: it
    writes elsewhere, so that this process can do something else meanwhile. ``at_once``: how many texts it
    writes at a time.
    """

    live: bool
    continues: bool
    remote: bool = False
    at_once: int = 1


@runtime_checkable
class Guide(Protocol):
    """A stronger text generator that only ever gives text."""

    name: str
    abilities: GuideAbilities

    def complete(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        """One completion per request, in order. Raises instead of returning less."""
        ...


@dataclass(frozen=True)
class Score:
    """What a reward says of one finished text: the number, and the parts it was made of (for the logs)."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Reward(Protocol):
    """One score per text. ``texts[i]`` is the response to ``examples[i]``."""

    name: str

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]: ...


@dataclass(frozen=True)
class CorpusFigure:
    """A figure of a set of texts that is no mean of per-text values: ``f(sum of rows)``.

    ``rows`` are sufficient statistics, one row of equal length per example (None: skipped). ``aggregate`` names f
    among the registry's aggregates, so that whoever reads the rows from a file can form the figure of any
    selection of examples: that is how such figures get intervals and tests.
    """

    rows: Sequence[Sequence[float] | None]
    aggregate: str


@dataclass(frozen=True)
class BoundedFigure:
    """A figure of a set as one that brings its own interval: choosing other examples does not give one.

    ``bounds(level)`` are low and high at a level such as 0.95, ``method`` says in a few words how they are made, and
    ``n`` how many of the examples the figure is made of.
    """

    value: float
    bounds: Callable[[float], tuple[float, float]]
    method: str
    n: int


@dataclass(frozen=True)
class MetricResult:
    """Per-example values (``None``: the example was skipped), and the signature that says how they came about.

    ``values`` maps each figure's key to one value per example; the figure is their mean. ``corpus`` holds the
    figures that follow from summed rows, ``whole`` those of the set as one, which have no interval unless they bring
    it. A figure's full name is ``metric.key``, and the metric's name alone for the key ``score``. ``counts`` are
    things that happened and should be seen.
    """

    values: Mapping[str, Sequence[float | None]]
    signature: str
    counts: Mapping[str, int] = field(default_factory=dict)
    corpus: Mapping[str, CorpusFigure] = field(default_factory=dict)
    whole: Mapping[str, float | BoundedFigure] = field(default_factory=dict)


@runtime_checkable
class Metric(Protocol):
    """Evaluation of whole prediction sets. ``texts[i]`` is the response to ``examples[i]``.

    ``scorers.base`` says what else a metric may have.
    """

    name: str

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult: ...
