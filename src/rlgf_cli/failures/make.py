"""From examples to labelled texts: which kinds each good text gets, and what is dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlgf_cli import noise
from rlgf_cli.failures.kinds import Case, Corpus
from rlgf_cli.protocols import Example

Kind = Callable[[Case, np.random.Generator], str | None]
GOOD, ON_POLICY = "reference", "on_policy"
_TRIES = 4


@dataclass(frozen=True)
class Spoiler:
    """A kind under its name, its weight among the kinds, and its range of severity."""

    name: str
    make: Kind
    weight: float = 1.0
    severity: tuple[float, float] = (0.3, 1.0)


@dataclass
class Tally:
    """What was made of each kind, and what was dropped: kinds that do not apply, and texts equal to a reference."""

    made: Counter[str] = field(default_factory=Counter)
    not_applicable: Counter[str] = field(default_factory=Counter)
    equal_to_reference: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Mapping[str, int]]:
        return {name: dict(sorted(counter.items())) for name, counter in vars(self).items()}


def spoil(
    examples: Sequence[Example], spoilers: Sequence[Spoiler], *, per_reference: int, seed: int, tally: Tally
) -> Iterator[tuple[Example, int, str, str, str]]:
    """``(example, index of the reference, good text, kind, bad text)``, ``per_reference`` kinds for each good text.

    Kinds come in an order drawn by their weights; one that does not apply, or gives a reference's own text
    four times, is counted and the next one takes its place. What an example gets depends on the seed, its id and
    reference, and the corpus, not on the order of the data.
    """
    corpus = Corpus(examples)
    for example in examples:
        own = {_plain(reference) for reference in example.references}
        for k, good in enumerate(example.references):
            made = 0
            for spoiler in _order(spoilers, noise.generator(seed, "kinds", example.id, k)):
                if made == per_reference:
                    break
                text = _spoiled(
                    spoiler, example, good, corpus, own, noise.generator(seed, spoiler.name, example.id, k), tally
                )
                if text is not None:
                    made += 1
                    tally.made[spoiler.name] += 1
                    yield example, k, good, spoiler.name, text


def _spoiled(
    spoiler: Spoiler,
    example: Example,
    good: str,
    corpus: Corpus,
    own: set[str],
    rng: np.random.Generator,
    tally: Tally,
) -> str | None:
    for _ in range(_TRIES):
        text = spoiler.make(Case(example, good, corpus, float(rng.uniform(*spoiler.severity))), rng)
        if text is None or not text.strip():
            tally.not_applicable[spoiler.name] += 1
            return None
        if _plain(text) not in own:
            return text
    tally.equal_to_reference[spoiler.name] += 1
    return None


def _order(spoilers: Sequence[Spoiler], rng: np.random.Generator) -> list[Spoiler]:
    """Drawn without replacement, in proportion to the weights (Efraimidis and Spirakis 2006)."""
    keys = rng.exponential(size=len(spoilers)) / np.array([spoiler.weight for spoiler in spoilers])
    return [spoilers[int(i)] for i in np.argsort(keys)]


def _plain(text: str) -> str:
    """What makes two texts the same one: their words."""
    return " ".join(text.split())
