"""Asks a guide to continue responses during training, and encodes its completions as the policy's tokens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property

from rlgf_cli import noise
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.protocols import Completion, Example, Guide, GuideRequest
from rlgf_cli.training.guide_use import GuideUse


@dataclass(frozen=True)
class Continuation:
    """A response that the guide is asked to continue behind ``prefix_ids``.

    ``sample_draw`` in [0, 1) picks one of the samples that a recorded guide has.
    """

    example: Example
    prefix_ids: list[int]
    sample_draw: float


@dataclass(frozen=True)
class PendingCompletions:
    """A batch of requests that was sent; ``starts``: tokens of each response before the guide's."""

    requests: list[GuideRequest]
    starts: list[int]
    completions: Future[list[Completion | None]]


class GuideWriter:
    """The guide as an author of token ids. ``seconds``: time spent on waiting for it."""

    def __init__(self, loaded: Loaded, guide: Guide | None, use: GuideUse, max_new_tokens: int) -> None:
        self.loaded, self.guide, self.use, self.max_new_tokens = loaded, guide, use, max_new_tokens
        self.seconds = 0.0
        self._in_flight: list[Future[list[Completion | None]]] = []

    @property
    def remote(self) -> bool:
        """Whether the guide writes elsewhere, so that the policy can write meanwhile."""
        return self.guide is not None and self.guide.abilities.remote

    def submit(self, continuations: Sequence[Continuation]) -> PendingCompletions:
        """Send one batch of requests. A remote guide answers in a thread; any other answers before this returns."""
        completions: Future[list[Completion | None]] = Future()
        requests = [self._request(c) for c in continuations]
        starts = [len(c.prefix_ids) for c in continuations]
        if not requests:
            completions.set_result([])
            return PendingCompletions(requests, starts, completions)
        assert self.guide is not None
        if self.remote:
            completions = self._threads.submit(self.guide.attempt, requests)
            self._in_flight = [*(future for future in self._in_flight if not future.done()), completions]
        else:
            before = time.perf_counter()
            completions.set_result(self.guide.attempt(requests))
            self.seconds += time.perf_counter() - before
        return PendingCompletions(requests, starts, completions)

    def settle(self) -> None:
        """Wait for the batches in flight: their texts are paid for, and the cache has them once they are received."""
        wait(self._in_flight)

    def collect(self, pending: PendingCompletions, counts: Counter[str]) -> list[list[int] | None]:
        """Wait for a batch; the ids of each completion, None where the guide refused that request."""
        before = time.perf_counter()
        completions = pending.completions.result()
        self.seconds += time.perf_counter() - before
        for request, completion in zip(pending.requests, completions, strict=True):
            if completion is not None:
                key = f"{request.example.id}\x1f{noise.short_hash(request.prefix + completion.text)}"
                self.use.count_text(key)
        counts["guide_requests"] += len(completions)
        counts["guide_failed"] += sum(completion is None for completion in completions)
        counts["guide_empty"] += sum(
            completion is not None and not completion.text.strip() for completion in completions
        )
        return [
            None if completion is None else completion_ids(self.loaded, completion, start, self.max_new_tokens, counts)
            for completion, start in zip(completions, pending.starts, strict=True)
        ]

    def _request(self, c: Continuation) -> GuideRequest:
        assert self.guide is not None
        # recorded text: one of the samples at random per use; live: a fresh sample per use of the prompt
        live = self.guide.abilities.live
        index = self.use.next_index(c.example.id) if live else int(c.sample_draw * (1 << 30))
        prefix = self.loaded.text.decode_response(self.loaded.tokenizer, c.prefix_ids, strip=False)
        return GuideRequest(c.example, prefix, index, self.max_new_tokens - len(c.prefix_ids))

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        """Threads that wait for a remote guide, one per batch of requests."""
        return ThreadPoolExecutor(max_workers=8, thread_name_prefix="rlgf-ask")


def completion_ids(
    loaded: Loaded, completion: Completion, start: int, max_new_tokens: int, counts: Counter[str]
) -> list[int]:
    """Ids of a guide's completion behind ``start`` tokens of the response, at most as many as there is room for.

    EOS is appended where the guide stopped by itself or spelled an ending. Unlike ``models.prompts.encode_target``, an
    empty completion has no ids, not even those of ``response_prefix``: the guide wrote nothing.
    """
    text, tokenizer = loaded.text, loaded.tokenizer
    # tokens decide, not their text: a response prefix that the policy wrote decodes to nothing
    encode = text.encode_continuation if start else text.encode_response
    words = text.without_ending(tokenizer, completion.text)
    spelled = words != completion.text
    counts["guide_endings"] += spelled
    ids = encode(tokenizer, words) if words else []
    if spelled or completion.finish_reason == "stop":
        ids = [*ids, loaded.eos_id]
    room = max_new_tokens - start
    counts["guide_capped"] += len(ids) > room
    return ids[:room]
