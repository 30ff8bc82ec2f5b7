"""Rewards and metrics: the base classes and what they return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

from rlgf_cli.protocols.data import Example
from rlgf_cli.protocols.guides import Guide


@dataclass(frozen=True)
class Score:
    """A reward's score of one finished text, and the parts that it is made of (for the logs)."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


def _no_progress(texts: int) -> None:
    """The default of ``on_rows``: do nothing."""


class Scorer:
    """The members that rewards and metrics share; a class can be both, as ``scorers.rouge`` is.

    The registry makes one as ``cls(target, **params)``: ``target`` is the text behind the colon of ``name:target``
    (None: there is none), and the annotated keyword parameters are the keys of ``params``. A parameter ``device`` gets
    the run's device.
    """

    name: str = ""
    """Its name in figures and logs. Empty: the name that it is registered under."""
    guides: Sequence[Guide] = ()
    """The guides that it sends requests to (a judge's). The run is charged, closes them, and names them in run.json."""
    reports_rows: bool = False
    """Whether it calls :attr:`on_rows` with the number of further texts that are done, while it works."""
    on_rows: Callable[[int], None] = staticmethod(_no_progress)
    """The function that shows the progress; set by the stage."""
    reward_only: ClassVar[frozenset[str]] = frozenset()
    """For a class that is both: parameters that it takes as a reward and refuses as a metric."""
    metric_only: ClassVar[frozenset[str]] = frozenset()
    """For a class that is both: parameters that it takes as a metric and refuses as a reward."""

    def stop_when(self, stop: Callable[[], bool]) -> None:
        """Where ``stop()`` is true, send the guides no further request and raise Interrupted."""


class Reward(Scorer, ABC):
    """One score per text, for training. ``texts[i]`` is the response to ``examples[i]``."""

    signature: str = ""
    """Everything that decides the scores (version, settings): scores are comparable where it is equal. Empty: the
    name.
    """
    counts: Mapping[str, int] = MappingProxyType({})
    """Counts so far that the user should see, such as truncated texts."""
    moves: bool = False
    """Whether a text's score depends on the iteration; then :meth:`at` gives the reward of one."""
    prefetches: bool = False
    """Whether :meth:`prefetch` begins to score texts."""

    def check(self, examples: Sequence[Example]) -> None:
        """Raise UserError where an example lacks what the reward needs. Called before a run starts: keep it cheap."""

    @abstractmethod
    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> Sequence[Score | None]:
        """One finite score per text, an empty text included. A failure is raised, never turned into a number.

        None: the reward has no score for a text and says so in :attr:`counts`, as a judge that gave no rating. Training
        leaves the episode out, and an evaluation skips the example.
        """

    def at(self, step: int) -> Reward:
        """The reward as it is in iteration ``step``, counted from 0."""
        return self

    def prefetch(self, examples: Sequence[Example], texts: Sequence[str]) -> None:
        """Begin to score texts that the next call of :meth:`score` will have, and return at once."""


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
    """Per-example values (``None``: the example was skipped), and the signature of their computation.

    ``values`` maps each figure's key to one value per example; the figure is their mean. ``corpus`` holds the figures
    that follow from summed rows, ``whole`` those of the set as one, which have no interval unless they bring it. A
    figure's full name is ``metric.key``, and the metric's name alone for the key ``score``. ``counts`` are counts that
    the user should see.
    """

    values: Mapping[str, Sequence[float | None]]
    signature: str
    counts: Mapping[str, int] = field(default_factory=dict)
    corpus: Mapping[str, CorpusFigure] = field(default_factory=dict)
    whole: Mapping[str, float | BoundedFigure] = field(default_factory=dict)


class Metric(Scorer, ABC):
    """Figures of whole sets of predictions, for evaluation. ``texts[i]`` is the response to ``examples[i]``."""

    reads_texts: bool = True
    """False: it needs no texts. Where no metric does, ``rlgf eval`` generates none."""
    reads_tokens: bool = False
    """True: it needs the tokens of the evaluated model's texts, which :meth:`take_tokens` gives."""

    def check_set(self, examples: Sequence[Example]) -> None:
        """Raise UserError where no example has what the metric needs. Called before a run starts: keep it cheap."""

    @abstractmethod
    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        """The figures of the set. Examples that lack what the metric needs are skipped: their values are None."""

    def take_model(self, loaded: Any, lengths: Any) -> None:
        """For metrics of the evaluated model: the model (``models.loaded.Loaded``) and the lengths of its prompts and
        responses. Raises UserError where the metric cannot use it; never called where texts are read from a file.
        """

    def take_decoding(self, decoding: Any) -> None:
        """For metrics that hold for some ways of decoding alone: how the model's texts are generated
        (``config.common.DecodingConfig``). Raises UserError for another way; called before :meth:`take_model`.
        """

    def take_tokens(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> None:
        """Where :attr:`reads_tokens`: the ids that the model read as each prompt, and those that it generated, EOS
        included where it ended the text. Called before :meth:`compute`, with one of each per text.
        """
