"""Helpers for tests of evolving instructions: a guide that answers from a function, and an environment with it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import numpy as np

from rlgf_cli.evolve.environment import Environment, RewardWeights
from rlgf_cli.evolve.novelty import Collection, NgramSpace
from rlgf_cli.evolve.operations import Operation, read_operations
from rlgf_cli.evolve.rules import Limits
from rlgf_cli.protocols import Answer, Completion, Example, Failure, Guide, GuideAbilities, GuideRequest

SEEDS = [
    Example("rain", "Write a short poem about rain."),
    Example("tax", "Explain how income tax works."),
    Example("bread", "List the steps of baking bread at home."),
]
OPERATIONS = [
    Operation(name="wide", breadth=True, prompt="Something else than this: {instruction}"),
    Operation(name="deep", prompt="Make it harder, please: {instruction}"),
    Operation(name="long", prompt="Add a condition to it: {instruction}"),
]
Reply = str | Failure | Completion


class FunctionGuide(Guide):
    """Answers from a function of the request, the last request first; stores its requests."""

    def __init__(self, answer: Callable[[GuideRequest], Reply]) -> None:
        super().__init__("function", GuideAbilities(live=True, continues=False))
        self._answer = answer
        self.asked: list[GuideRequest] = []

    def complete(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        raise NotImplementedError

    def stream(self, requests: Iterable[GuideRequest]) -> Generator[Answer, None, None]:
        for index, request in reversed(list(enumerate(requests))):
            self.asked.append(request)
            reply = self._answer(request)
            outcome = Completion(reply, "stop", "function", nano_usd=250_000_000) if isinstance(reply, str) else reply
            yield Answer(index, request, outcome)


def number_of(request: GuideRequest) -> str:
    """A text that is like no other one, fixed by the request."""
    rng = np.random.default_rng(abs(hash_of(request)))
    return "Task " + " ".join("".join(rng.choice(list("abcdefgh"), size=6)) for _ in range(8))


def hash_of(request: GuideRequest) -> int:
    import zlib

    return zlib.crc32(f"{request.example.prompt}|{request.sample_index}".encode())


def environment_of(
    answer: Callable[[GuideRequest], Reply] = number_of, *, seeds: Sequence[Example] = SEEDS, **changes: Any
) -> Environment:
    """An environment of words. ``changes``: its own arguments."""
    space = NgramSpace()
    settings: dict[str, Any] = {
        "limits": Limits(max_words=50),
        "weights": RewardWeights(),
        "min_novelty": 0.05,
        "max_new_tokens": 64,
        **changes,
    }
    collection = settings.pop("collection", None) or Collection(space.embed([seed.prompt for seed in seeds]))
    operations = settings.pop("operations", OPERATIONS)
    return Environment(FunctionGuide(answer), operations, space, collection, **settings)  # type: ignore[arg-type]


BUILTIN = read_operations(None)
