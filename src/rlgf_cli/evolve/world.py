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
from rlgf_cli.guides.answers import Failure
from rlgf_cli.guides.base import REFUSALS, LiveGuide
from rlgf_cli.protocols import Completion, Example, GuideRequest

KEPT = "kept"
DUPLICATE, EQUAL = "duplicate", "equal"
LONGEST = 100
"""Steps that a chain can have."""
UNANSWERED, UNREVIEWED = "unanswered", "unreviewed"
"""Outcomes that say nothing of the operation: the guide gave no text, or no verdict could be read."""


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


class World:
    """All that a step needs. ``seen(text)``: whether a text is a copy, or nearly one, of what is there already (it is
    not asked about what was not kept); ``keep(text)`` hears of what was kept.
    """

    def __init__(
        self,
        guide: LiveGuide,
        operations: Sequence[Operation],
        space: Space,
        collection: Collection,
        *,
        limits: Limits,
        weights: RewardWeights,
        min_novelty: float,
        max_new_tokens: int,
        reviewer: Reviewer | None = None,
        seen: Callable[[str], bool] = lambda text: False,
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
        vectors = dict(zip(sound, self.space.embed([texts[i] for i in sound]), strict=True)) if sound else {}
        verdicts = self._verdicts(chains, texts, [i for i in sound if self._is_new(texts[i], vectors[i])])
        for i, (chain, operation) in enumerate(pairs):
            novelty = self.collection.novelty(vectors[i]) if i in vectors else None
            outcome = broken[i] or self._judged(texts[i], vectors[i], verdicts.get(i))
            if outcome == KEPT:
                self.collection.add(vectors[i])
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

    def _broken(self, outcome: Completion | Failure, text: str, chain: Chain, operation: Operation) -> str | None:
        if isinstance(outcome, Failure):
            return "refusal" if outcome.kind in REFUSALS else UNANSWERED
        return broken_by_rewrite(
            text, outcome.finish_reason, instruction=chain.instruction, prompt=operation.prompt, limits=self.limits
        )

    def _is_new(self, text: str, vector: np.ndarray) -> bool:
        return self.collection.novelty(vector) >= self.min_novelty and not self.seen(text)

    def _verdicts(self, chains: Sequence[Chain], texts: Sequence[str], new: Sequence[int]) -> dict[int, bool | None]:
        if self.reviewer is None or not new:
            return {}
        found = self.reviewer.different([(chains[i].instruction, texts[i]) for i in new])
        return dict(zip(new, found, strict=True))

    def _judged(self, text: str, vector: np.ndarray, different: bool | None) -> str:
        if not self._is_new(text, vector):
            return DUPLICATE
        if self.reviewer is None:
            return KEPT
        return UNREVIEWED if different is None else KEPT if different else EQUAL

    def _reward(self, outcome: str, novelty: float | None, different: bool | None) -> float | None:
        if outcome in (UNANSWERED, UNREVIEWED):
            return None
        if outcome != KEPT or novelty is None:
            return -self.weights.penalty
        return self.weights.novelty * novelty + self.weights.different * bool(different)


def ask(guide: LiveGuide, requests: Sequence[GuideRequest]) -> list[Completion | Failure]:
    """What the guide gave for each request, in order. What failed for a passing reason is asked for once more.

    A failure that asking again would not mend is an outcome. Raises RlgfError where one that it might is left.
    """
    found: dict[int, Completion | Failure] = {}
    for _ in range(2):
        left = [i for i in range(len(requests)) if i not in found or _passing(found[i])]
        for answer in guide.stream([requests[i] for i in left]):
            found[left[answer.index]] = answer.outcome
    failed = [outcome for outcome in found.values() if isinstance(outcome, Failure) and _passing(outcome)]
    if failed:
        kinds = ", ".join(f"{kind}: {n}" for kind, n in Counter(f.kind for f in failed).most_common())
        raise RlgfError(
            f"the guide {guide.name} did not answer {len(failed)} of {len(requests)} requests ({kinds}); the first: "
            f"{failed[0].message}",
            hint="what it wrote is in the cache: the same command with --resume asks for the rest",
        )
    return [found[i] for i in range(len(requests))]


def _passing(outcome: Completion | Failure) -> bool:
    return isinstance(outcome, Failure) and not outcome.final and outcome.kind not in REFUSALS
