"""What every guide that answers new requests has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.errors import RlgfError
from rlgf_cli.protocols import Completion, Example, GuideAbilities, GuideRequest


@dataclass(frozen=True)
class Failure:
    """A request that brought no text. ``kind`` is what failures are counted by; ``message`` holds no key."""

    kind: str
    message: str


@dataclass(frozen=True)
class Answer:
    """What became of the ``index``-th request of a stream."""

    index: int
    request: GuideRequest
    outcome: Completion | Failure


class LiveGuide(ABC):
    """A guide that writes new text: the base of the builtin kinds and of those of other packages.

    ``counts`` says what had to be mended in the answers so far. ``settings`` holds what decides the text
    (it goes into the manifest, and a collection is only resumed under equal settings). ``device`` is where a
    local model runs.
    """

    device: str | None = None

    def __init__(self, config: GuideConfig, *, seed: int) -> None:
        self.name = config.name
        self.abilities = self.describe(config)
        self.counts: Counter[str] = Counter()
        self.settings: dict[str, Any] = {**config.settings(), "seed": seed}

    @classmethod
    @abstractmethod
    def describe(cls, config: GuideConfig) -> GuideAbilities:
        """What such a guide can do, without loading a model or calling a server. Raises UserError."""

    @abstractmethod
    def stream(self, requests: Iterable[GuideRequest]) -> Generator[Answer, None, None]:
        """Answers as they arrive, in any order. Requests are drawn only as fast as they can be asked.

        A request that fails is answered with a :class:`Failure`; what no later request could survive (a
        wrong key, an unknown model) is raised, after the answers that were on their way have been given.
        """

    def complete(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        """One completion per request, in order. Raises RlgfError where one failed."""
        found: list[Completion | None] = [None] * len(requests)
        failures: list[Answer] = []
        for answer in self.stream(requests):
            if isinstance(answer.outcome, Failure):
                failures.append(answer)
            else:
                found[answer.index] = answer.outcome
        if failures:
            first = failures[0]
            assert isinstance(first.outcome, Failure)
            raise RlgfError(
                f"the guide {self.name} failed {len(failures)} of {len(requests)} requests; "
                f"the first, for {first.request.example.id!r}: {first.outcome.message}"
            )
        return [completion for completion in found if completion is not None]

    def check(self, examples: Sequence[Example], max_new_tokens: int) -> None:  # noqa: B027 - nothing to check is fine
        """Refuse prompts that could not be answered, before anything is paid. Raises UserError."""

    def close(self) -> None:  # noqa: B027 - most guides hold nothing
        """Give back connections and threads."""
