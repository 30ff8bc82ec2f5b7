"""Makes failures of several kinds from the references of examples, and counts those that were dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from rlgf_cli import noise
from rlgf_cli.failures.kinds import Case, Corpus
from rlgf_cli.protocols import Example

Kind = Callable[[Case, np.random.Generator], str | None]
GOOD, ON_POLICY = "reference", "on_policy"
_TRIES = 4


@dataclass(frozen=True)
class WeightedKind:
    """A kind of failure with its name, its weight among the kinds, and its range of severity."""

    name: str
    make: Kind
    weight: float = 1.0
    severity: tuple[float, float] = (0.3, 1.0)


@dataclass
class Tally:
    """Counts by kind: texts made, cases that the kind does not apply to, and texts equal to a reference (dropped)."""

    made: Counter[str] = field(default_factory=Counter)
    not_applicable: Counter[str] = field(default_factory=Counter)
    equal_to_reference: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Mapping[str, int]]:
        return {name: dict(sorted(counter.items())) for name, counter in vars(self).items()}


class MadeFailure(NamedTuple):
    """A bad text of a kind, made from the good text that is the ``reference_index``-th reference of the example."""

    example: Example
    reference_index: int
    good: str
    kind: str
    text: str


def make_failures(
    examples: Sequence[Example], kinds: Sequence[WeightedKind], *, per_reference: int, seed: int, tally: Tally
) -> Iterator[MadeFailure]:
    """Failures of ``per_reference`` kinds for each good text.

    The order of kinds is drawn by their weights. A kind that does not apply, or returns a reference's text four times,
    is counted and replaced by the next. The result for an example depends on the seed, its id and reference, and the
    corpus, not on the order of the data.
    """
    corpus = Corpus(examples)
    for example in examples:
        own = {_plain(reference) for reference in example.references}
        for k, good in enumerate(example.references):
            made = 0
            for kind in _order(kinds, noise.generator(seed, "kinds", example.id, k)):
                if made == per_reference:
                    break
                text = _failure(
                    kind, example, good, corpus, own, noise.generator(seed, kind.name, example.id, k), tally
                )
                if text is not None:
                    made += 1
                    tally.made[kind.name] += 1
                    yield MadeFailure(example, k, good, kind.name, text)


def _failure(
    kind: WeightedKind,
    example: Example,
    good: str,
    corpus: Corpus,
    own: set[str],
    rng: np.random.Generator,
    tally: Tally,
) -> str | None:
    for _ in range(_TRIES):
        text = kind.make(Case(example, good, corpus, float(rng.uniform(*kind.severity))), rng)
        if text is None or not text.strip():
            tally.not_applicable[kind.name] += 1
            return None
        if _plain(text) not in own:
            return text
    tally.equal_to_reference[kind.name] += 1
    return None


def _order(kinds: Sequence[WeightedKind], rng: np.random.Generator) -> list[WeightedKind]:
    """Drawn without replacement, in proportion to the weights (Efraimidis and Spirakis 2006)."""
    keys = rng.exponential(size=len(kinds)) / np.array([kind.weight for kind in kinds])
    return [kinds[int(i)] for i in np.argsort(keys)]


def _plain(text: str) -> str:
    """The text with single spaces: texts with equal words are equal."""
    return " ".join(text.split())
