"""The environment: chains of instructions, and what an operation makes of them.

A step asks the guide for a rewrite of each chain's instruction. A rewrite that breaks no rule, is new and, where there
is a reviewer, changes what is asked for, is kept: it is the chain's instruction from then on. Every rewrite is a query,
kept or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rlgf_cli.errors import RlgfError
from rlgf_cli.evolve.novelty import Collection, Space
from rlgf_cli.evolve.operations import Operation
from rlgf_cli.evolve.rules import Limits, broken_by_rewrite
from rlgf_cli.protocols import Completion, Example, Failure, Guide, GuideRequest

KEPT = "kept"
DUPLICATE, EQUAL = "duplicate", "equal"
LONGEST = 100
"""Steps that a chain can have."""
UNANSWERED, UNREVIEWED = "unanswered", "unreviewed"
"""Outcomes that say nothing of the operation: the guide gave no text, or no verdict could be read."""
NO_TEXT = ("malformed", "finish_reason")
"""Failures of an answer that came: there is no text in it, or it ended as no text does."""


@dataclass(frozen=True)
class Step:
    """What came of one operation on ``instruction``.

    ``outcome`` is ``kept`` or why the rewrite was not: a rule (:mod:`.rules`), ``duplicate``, ``equal`` (the reviewer's
    verdict), ``unanswered`` or ``unreviewed``. ``novelty`` in [0, 1]; None where nobody looked. ``reward`` None: this
    step says nothing of its operation. ``queries``: rewrites and verdicts asked for; ``cost_usd``: what the rewrite
    cost when it was bought.
    """

    operation: str
    instruction: str
    text: str
    outcome: str
    novelty: float | None
    different: bool | None
    reward: float | None
    queries: int
    cost_usd: float | None


@dataclass
class Chain:
    """A seed and what became of it. ``visit`` tells several chains of one seed apart: each has its own texts. No chain
    has more than :data:`LONGEST` steps.
    """

    seed: Example
    visit: int = 0
    steps: list[Step] = field(default_factory=list)

    @property
    def instruction(self) -> str:
        """The last rewrite that was kept, or the seed's own text."""
        return next((step.text for step in reversed(self.steps) if step.outcome == KEPT), self.seed.prompt)

    def request(self, operation: Operation, max_new_tokens: int) -> GuideRequest:
        """The next rewrite. The same operation on the same instruction, asked again, is another sample."""
        now = self.instruction
        again = sum((step.operation, step.instruction) == (operation.name, now) for step in self.steps)
        asked = Example(self.seed.id, operation.ask(now))
        return GuideRequest(asked, sample_index=self.visit * LONGEST + again, max_new_tokens=max_new_tokens)


class Reviewer(Protocol):
    """Says whether a rewrite asks for something else: in its constraints, depth or breadth."""

    def different(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """One verdict per (instruction, rewrite); None where none could be read."""
        ...


@dataclass(frozen=True)
class RewardWeights:
    """Reward of a kept rewrite: ``novelty`` times its novelty, and ``different`` where a reviewer said so. Of one that
    was not kept: minus ``penalty``.
    """

    novelty: float = 1.0
    different: float = 0.0
    penalty: float = 0.5


class Environment:
    """All that a step needs. ``seen(text)``: the outcome of a text that is a copy, or nearly one, of what is there
    already, else None (nothing is there that was not kept); ``keep(text)`` hears of what was kept.
    """

    def __init__(
        self,
        guide: Guide,
        operations: Sequence[Operation],
        space: Space,
        collection: Collection,
        *,
        limits: Limits,
        weights: RewardWeights,
        min_novelty: float,
        max_new_tokens: int,
        reviewer: Reviewer | None = None,
        seen: Callable[[str], str | None] = lambda text: None,
        keep: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.guide, self.operations, self.space, self.collection = guide, operations, space, collection
        self.limits, self.weights, self.min_novelty = limits, weights, min_novelty
        self.max_new_tokens, self.reviewer, self.seen, self.keep = max_new_tokens, reviewer, seen, keep

    def step(self, chains: Sequence[Chain], chosen: Sequence[int]) -> None:
        """Add a step to each chain; ``chosen[i]`` is the index of chain i's operation. Each rewrite is held against
        what the chains before it kept. Raises RlgfError where the guide failed; no chain is changed then.
        """
        operations = [self.operations[index] for index in chosen]
        pairs = list(zip(chains, operations, strict=True))
        requests = [chain.request(operation, self.max_new_tokens) for chain, operation in pairs]
        outcomes = ask(self.guide, requests)
        texts = [outcome.text.strip() if isinstance(outcome, Completion) else "" for outcome in outcomes]
        broken = [self._broken(outcomes[i], texts[i], *pair) for i, pair in enumerate(pairs)]
        sound = [i for i, rule in enumerate(broken) if rule is None]
        novel = _Novelty(self.collection, sound, self.space.embed([texts[i] for i in sound]))
        new = [i for i in sound if self._known(texts[i], novel[i]) is None]
        verdicts = self._verdicts(chains, texts, new)
        for i, (chain, operation) in enumerate(pairs):
            novelty = novel[i] if broken[i] is None else None
            outcome = broken[i] or self._judged(texts[i], novel[i], verdicts.get(i))
            if outcome == KEPT:
                novel.keep(i)
                self.keep(texts[i])
            completion = outcomes[i]
            chain.steps.append(
                Step(
                    operation=operation.name,
                    instruction=chain.instruction,
                    text=texts[i],
                    outcome=outcome,
                    novelty=novelty,
                    different=verdicts.get(i),
                    reward=self._reward(outcome, novelty, verdicts.get(i)),
                    queries=1 + (i in verdicts),
                    cost_usd=completion.cost_usd if isinstance(completion, Completion) else None,
                )
            )

    def recall(self, texts: Sequence[str], kept: Sequence[bool]) -> None:
        """Know of a step that was taken earlier: of the texts that broke no rule, in order, some were kept. What was
        embedded together then is embedded together now, and so gets the same vectors.
        """
        for text, was_kept, vector in zip(texts, kept, self.space.embed(texts), strict=True):
            if was_kept:
                self.collection.add(vector)
                self.keep(text)

    def _broken(self, outcome: Completion | Failure, text: str, chain: Chain, operation: Operation) -> str | None:
        if isinstance(outcome, Failure):
            return "refusal" if outcome.refused else UNANSWERED
        return broken_by_rewrite(
            text, outcome.finish_reason, instruction=chain.instruction, prompt=operation.prompt, limits=self.limits
        )

    def _known(self, text: str, novelty: float) -> str | None:
        """Why a text is nothing new, or None."""
        return self.seen(text) or (DUPLICATE if novelty < self.min_novelty else None)

    def _verdicts(self, chains: Sequence[Chain], texts: Sequence[str], new: Sequence[int]) -> dict[int, bool | None]:
        if self.reviewer is None or not new:
            return {}
        found = self.reviewer.different([(chains[i].instruction, texts[i]) for i in new])
        return dict(zip(new, found, strict=True))

    def _judged(self, text: str, novelty: float, different: bool | None) -> str:
        if (known := self._known(text, novelty)) is not None:
            return known
        if self.reviewer is None:
            return KEPT
        return UNREVIEWED if different is None else KEPT if different else EQUAL

    def _reward(self, outcome: str, novelty: float | None, different: bool | None) -> float | None:
        if outcome in (UNANSWERED, UNREVIEWED):
            return None
        if outcome != KEPT or novelty is None:
            return -self.weights.penalty
        return self.weights.novelty * novelty + self.weights.different * bool(different)


class _Novelty:
    """How new the texts of one step are: against what was there before it, and what its earlier chains kept."""

    def __init__(self, collection: Collection, which: Sequence[int], vectors: np.ndarray) -> None:
        self._collection, self._vectors = collection, vectors
        self._place = {i: at for at, i in enumerate(which)}
        self._found = collection.novelty(vectors)

    def __getitem__(self, i: int) -> float:
        return round(float(self._found[self._place[i]]), 6)

    def keep(self, i: int) -> None:
        """Text i is there from now on."""
        vector = self._vectors[self._place[i]]
        self._collection.add(vector)
        self._found = np.minimum(self._found, np.clip(1 - self._vectors @ vector, 0, 1))


def ask(guide: Guide, requests: Sequence[GuideRequest]) -> list[Completion | Failure]:
    """What the guide gave for each request, in order. What failed for a passing reason is asked for once more.

    A failure that asking again would not mend is an outcome, and so is a second answer that holds no text. Raises
    RlgfError where another one is left.
    """
    found: dict[int, Completion | Failure] = {}
    for _ in range(2):
        left = [i for i in range(len(requests)) if i not in found or _passing(found[i])]
        for answer in guide.stream([requests[i] for i in left]):
            found[left[answer.index]] = answer.outcome
    left_over = [outcome for outcome in found.values() if isinstance(outcome, Failure) and _passing(outcome)]
    failed = [failure for failure in left_over if failure.kind not in NO_TEXT]
    if failed:
        kinds = ", ".join(f"{kind}: {n}" for kind, n in Counter(f.kind for f in failed).most_common())
        raise RlgfError(
            f"the guide {guide.name} did not answer {len(failed)} of {len(requests)} requests ({kinds}); the first: "
            f"{failed[0].message}",
            hint="what it wrote is in the cache: the same command with --resume asks for the rest",
        )
    return [found[i] for i in range(len(requests))]


def _passing(outcome: Completion | Failure) -> bool:
    return isinstance(outcome, Failure) and not outcome.final and not outcome.refused
