"""The environment of a policy over operations: chains of instructions, the guide's rewrites, and their rewards.

A step asks the guide for a rewrite of each chain's instruction. A rewrite is kept if it breaks no rule, is new and,
with a reviewer, asks for something else than the instruction; it is the chain's instruction from then on. Every rewrite
is a query, kept or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from rlgf_cli.evolve.novelty import Collection, Space
from rlgf_cli.evolve.operations import Operation
from rlgf_cli.evolve.rules import Limits, broken_by_rewrite
from rlgf_cli.guides.unanswered import unanswered
from rlgf_cli.ledger.meter import usd
from rlgf_cli.protocols import Completion, Example, Failure, Guide, GuideRequest

KEPT = "kept"
DUPLICATE, EQUAL = "duplicate", "equal"
MAX_STEPS = 100
"""The largest number of steps of a chain."""
UNANSWERED, UNREVIEWED = "unanswered", "unreviewed"
"""Outcomes without a reward: the guide gave no text, or the reviewer's verdict could not be read."""


@dataclass(frozen=True)
class Step:
    """One rewrite of ``instruction`` by an operation, and its outcome.

    ``outcome`` is ``kept`` or the reason for which the rewrite was rejected: a rule (:mod:`.rules`), ``duplicate``,
    ``equal`` (the reviewer's verdict), ``unanswered`` or ``unreviewed``. ``novelty`` in [0, 1] is None for a text that
    broke a rule; ``different`` (the verdict) is None where the reviewer was not asked; ``reward`` is None for
    ``unanswered`` and ``unreviewed``. ``queries``: rewrites and verdicts requested; ``cost_usd``: the price of the
    rewrite when it was bought.
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
    """A seed and the steps from it. ``visit`` numbers the chains of one seed: each samples its own rewrites. A chain
    has at most :data:`MAX_STEPS` steps.
    """

    seed: Example
    visit: int = 0
    steps: list[Step] = field(default_factory=list)

    @property
    def instruction(self) -> str:
        """The last rewrite that was kept, or the seed's own text."""
        return next((step.text for step in reversed(self.steps) if step.outcome == KEPT), self.seed.prompt)

    def request(self, operation: Operation, max_new_tokens: int) -> GuideRequest:
        """The next rewrite. The same operation on the same instruction again is another sample."""
        now = self.instruction
        repeats = sum((step.operation, step.instruction) == (operation.name, now) for step in self.steps)
        example = Example(self.seed.id, operation.prompt_for(now))
        return GuideRequest(example, sample_index=self.visit * MAX_STEPS + repeats, max_new_tokens=max_new_tokens)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The steps with their places, as ``steps.jsonl`` has them; steps count from 1."""
        for number, step in enumerate(self.steps, 1):
            yield {"seed_id": self.seed.id, "visit": self.visit, "step": number, **asdict(step)}


class Reviewer(Protocol):
    """Judges whether a rewrite asks for something else: in its constraints, depth or breadth."""

    def different(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """One verdict per (instruction, rewrite); None where none could be read."""
        ...


@dataclass(frozen=True)
class RewardWeights:
    """The reward of a kept rewrite is ``novelty`` times its novelty, plus ``different`` if the reviewer found it
    different; that of a rejected one is minus ``penalty``.
    """

    novelty: float = 1.0
    different: float = 0.0
    penalty: float = 0.5


@dataclass
class Environment:
    """Everything that a step needs. ``collection`` holds the vectors of the seeds and of kept rewrites.

    ``find_copy(text)``: the outcome of a text that is a copy, or nearly one, of an earlier text; None for another.
    ``on_kept(text)`` is called with every rewrite that is kept.
    """

    guide: Guide
    operations: Sequence[Operation]
    space: Space
    collection: Collection
    _: KW_ONLY
    limits: Limits
    weights: RewardWeights
    min_novelty: float
    max_new_tokens: int
    reviewer: Reviewer | None = None
    find_copy: Callable[[str], str | None] = lambda text: None
    on_kept: Callable[[str], None] = lambda text: None

    def step(self, chains: Sequence[Chain], chosen: Sequence[int]) -> None:
        """Add a step to each chain; ``chosen[i]`` is the index of chain i's operation. Each rewrite is compared with
        those that earlier chains of this step kept. Raises RlgfError where the guide failed; no chain is changed then.
        """
        pairs = [(chain, self.operations[index]) for chain, index in zip(chains, chosen, strict=True)]
        completions = complete_all(
            self.guide, [chain.request(operation, self.max_new_tokens) for chain, operation in pairs]
        )
        texts = [answer.text.strip() if isinstance(answer, Completion) else "" for answer in completions]
        broken = [self._broken(completions[i], texts[i], *pair) for i, pair in enumerate(pairs)]
        valid = [i for i, rule in enumerate(broken) if rule is None]
        novelties = _StepNovelties(self.collection, valid, self.space.embed([texts[i] for i in valid]))
        new = [i for i in valid if self._duplicate(texts[i], novelties[i]) is None]
        verdicts: dict[int, bool | None] = {}
        if self.reviewer is not None and new:
            reviewed = [(chains[i].instruction, texts[i]) for i in new]
            verdicts = dict(zip(new, self.reviewer.different(reviewed), strict=True))
        for i, (chain, operation) in enumerate(pairs):
            novelty, different, completion = None, verdicts.get(i), completions[i]
            if (outcome := broken[i]) is None:
                novelty = novelties[i]
                outcome = self._duplicate(texts[i], novelty) or self._reviewed(different)
            if outcome == KEPT:
                novelties.keep(i)
                self.on_kept(texts[i])
            step = Step(
                operation=operation.name,
                instruction=chain.instruction,
                text=texts[i],
                outcome=outcome,
                novelty=novelty,
                different=different,
                reward=self._reward(outcome, novelty, different),
                queries=1 + (i in verdicts),
                cost_usd=usd(completion.nano_usd) if isinstance(completion, Completion) else None,
            )
            chain.steps.append(step)

    def recall(self, texts: Sequence[str], kept: Sequence[bool]) -> None:
        """Take over a step of an earlier session: the texts that broke no rule, in order, and which of them were kept.
        Texts that were embedded together then are embedded together now, and so get the same vectors.
        """
        for text, was_kept, vector in zip(texts, kept, self.space.embed(texts), strict=True):
            if was_kept:
                self.collection.add(vector)
                self.on_kept(text)

    def _broken(self, answer: Completion | Failure, text: str, chain: Chain, operation: Operation) -> str | None:
        if isinstance(answer, Failure):
            return "refusal" if answer.refused else UNANSWERED
        return broken_by_rewrite(
            text, answer.finish_reason, instruction=chain.instruction, prompt=operation.prompt, limits=self.limits
        )

    def _duplicate(self, text: str, novelty: float) -> str | None:
        """The outcome of a text that is not new, or None."""
        return self.find_copy(text) or (DUPLICATE if novelty < self.min_novelty else None)

    def _reviewed(self, different: bool | None) -> str:
        return KEPT if different or self.reviewer is None else UNREVIEWED if different is None else EQUAL

    def _reward(self, outcome: str, novelty: float | None, different: bool | None) -> float | None:
        if outcome in (UNANSWERED, UNREVIEWED):
            return None
        if outcome != KEPT or novelty is None:
            return -self.weights.penalty
        return self.weights.novelty * novelty + self.weights.different * bool(different)


class _StepNovelties:
    """Novelties of the texts of one step: to the collection and to the texts that earlier chains added to it."""

    def __init__(self, collection: Collection, which: Sequence[int], vectors: np.ndarray) -> None:
        self._collection, self._vectors = collection, vectors
        self._row = {i: row for row, i in enumerate(which)}
        self._novelties = collection.novelty(vectors)

    def __getitem__(self, i: int) -> float:
        return round(float(self._novelties[self._row[i]]), 6)

    def keep(self, i: int) -> None:
        """Add text i to the collection."""
        vector = self._vectors[self._row[i]]
        self._collection.add(vector)
        self._novelties = np.minimum(self._novelties, np.clip(1 - self._vectors @ vector, 0, 1))


def complete_all(guide: Guide, requests: Sequence[GuideRequest]) -> list[Completion | Failure]:
    """The guide's completion or failure for each request, in order. Transient failures are requested once more.

    A permanent failure is an answer, and so is a second answer without a text. Raises RlgfError for other failures.
    """
    answers: dict[int, Completion | Failure] = {}
    for _ in range(2):
        left = [i for i in range(len(requests)) if i not in answers or _is_transient(answers[i])]
        for answer in guide.stream([requests[i] for i in left]):
            answers[left[answer.index]] = answer.outcome
    failed = [f for f in answers.values() if isinstance(f, Failure) and not f.settled]
    if failed:
        raise unanswered(f"the guide {guide.name}", failed, f"{len(requests)} requests")
    return [answers[i] for i in range(len(requests))]


def _is_transient(outcome: Completion | Failure) -> bool:
    return isinstance(outcome, Failure) and not outcome.final and not outcome.refused
