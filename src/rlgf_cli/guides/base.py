"""LiveGuide: guides with a cache and an account. A text that is in the cache is not requested again."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
import uuid
from abc import abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlgf_cli.config.guide import BudgetConfig, GuideConfig
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.guides.cleanup import split_thinking
from rlgf_cli.guides.stream import LOOK_AHEAD, Outcome, Stream
from rlgf_cli.guides.unanswered import FirstAnswers, no_text
from rlgf_cli.ledger.meter import Meter
from rlgf_cli.ledger.store import Store, StoredText
from rlgf_cli.protocols import Answer, Completion, Failure, Guide, GuideRequest


class LiveGuide(Guide):
    """A guide that writes new text, with a cache and an account: the base class of the builtin kinds.

    A kind declares what a text depends on (:meth:`identity`, :meth:`request_fields`), sends requests (:meth:`submit`,
    :meth:`work`) and repairs completions (:meth:`clean`). Cache, leases, modes and the account are here.
    """

    lease_s = 3600.0
    has_price = True

    def __init__(self, config: GuideConfig, *, seed: int) -> None:
        super().__init__(config.name, self.describe(config))
        self.mode = config.mode or self.default_mode
        self.settings = {**config.settings(), "seed": seed}
        self.licence = config.licence
        self.first_answers = FirstAnswers()
        self._keep_thinking = config.clean == "none"
        self._store: Store | None = None
        self._meter: Meter | None = None
        self._shared = False
        self._identity: Any = None
        self._lock = threading.Lock()

    # what a kind declares

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The settings that a text depends on besides the request, as JSON: guide, model, sampling."""

    @abstractmethod
    def request_fields(self, request: GuideRequest) -> dict[str, Any]:
        """The part of the request that a text depends on, as JSON: stored with the text, and part of its key."""

    @abstractmethod
    def submit(self, request: GuideRequest, key: bytes | None) -> Future[Outcome]:
        """Send a request. The completion, before any repair, is charged to :attr:`meter` and, under a key, stored by
        the same transaction.

        An exception in the future is one that no later request could survive: a wrong key, a spent budget.
        """

    def work(self) -> None:
        """Let a local guide write the texts that were submitted."""

    @abstractmethod
    def clean(self, request: GuideRequest, completion: Completion) -> Completion:
        """The completion with its text repaired, and ``repaired`` set to the kinds of repairs."""

    # requests

    def complete(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        completions, failures = self._all(requests)
        if failures:
            raise self._error(failures, len(requests))
        return [completion for completion in completions if completion is not None]

    def attempt(self, requests: Sequence[GuideRequest]) -> list[Completion | None]:
        """As :meth:`complete`, with None for a text that the guide refused to write, and for a few other failures.

        Raises RlgfError where more than half of the requests failed in another way.
        """
        completions, failures = self._all(requests)
        broken = [(answer, failure) for answer, failure in failures if not failure.refused]
        if 2 * len(broken) > len(requests):
            raise self._error(broken, len(requests))
        return completions

    def stream(self, requests: Iterable[GuideRequest]) -> Generator[Answer, None, None]:
        """Answers as they arrive, in any order; a request that fails alone is answered with a :class:`Failure`.

        Requests are drawn only as fast as they can be answered. An error that no later request could survive is
        raised once the requests in flight are answered.
        """
        with Stream(self, requests) as running:
            yield from running

    def stored(self, requests: Iterable[GuideRequest]) -> Generator[Answer, None, None]:
        source = enumerate(requests)
        while window := list(itertools.islice(source, LOOK_AHEAD)):
            texts = self._lookup([request for _, request in window])
            for (index, request), text in zip(window, texts, strict=True):
                if text is None:
                    yield Answer(index, request, Failure("not_answered", "the batch brought no text", final=True))
                else:
                    yield Answer(index, request, self.cleaned(request, text.completion(), cached=True))

    def _all(self, requests: Sequence[GuideRequest]) -> tuple[list[Completion | None], list[tuple[Answer, Failure]]]:
        completions: list[Completion | None] = [None] * len(requests)
        failures = []
        for answer in self.stream(requests):
            if isinstance(answer.outcome, Failure):
                failures.append((answer, answer.outcome))
            else:
                completions[answer.index] = answer.outcome
        return completions, failures

    def _error(self, failures: list[tuple[Answer, Failure]], requests: int) -> RlgfError:
        answer, failure = min(failures, key=lambda pair: pair[0].index)  # they arrive in any order
        return RlgfError(
            f"the guide {self.name} failed {len(failures)} of {requests} requests; "
            f"the first, for {answer.request.example.id!r}: {failure.message}"
        )

    def without_thinking(self, completion: Completion) -> Outcome:
        """The completion; a failure where it holds thinking alone, as one that was cut off in it."""
        thinking, text = ("", "") if self._keep_thinking else split_thinking(completion.text)
        if not thinking or text.strip():
            return completion
        failure = no_text("reasoning", f"the answer is thinking alone (finish reason {completion.finish_reason!r})")
        return replace(failure, model=completion.model, usage=completion.usage)

    def cleaned(self, request: GuideRequest, completion: Completion, *, cached: bool) -> Outcome:
        """:meth:`clean`, counted; a failure where no text is left. ``cached``: the completion is from the cache."""
        outcome = self.without_thinking(completion)
        if isinstance(outcome, Failure):
            with self._lock:
                self.meter.cached += cached
            return outcome
        clean = self.clean(request, completion)
        with self._lock:
            self.counts.update(clean.repaired)
            self.models[completion.model] += 1
            self.meter.cached += cached
            self.first_answers.usable = True
        return replace(clean, raw=completion.text if clean.repaired else None, cached=cached)

    def missed(self, request: GuideRequest) -> UserError:
        """The error of a replay for a text that the cache does not hold."""
        begun = f" going on from {request.prefix[-40:]!r}" if request.prefix else ""
        return UserError(
            f"the cache has no text of {self.name} for {request.example.id!r}, sample {request.sample_index}{begun} "
            f"(at most {request.max_new_tokens} tokens), and replay sends no request",
            where=str(self.store.path),
            hint="record it first: --guide-mode record; RLGF_CACHE_DIR says which cache is read",
        )

    # cache

    @property
    def store(self) -> Store:
        """The cache's file; in memory where the guide neither reads nor stores texts there, and has no price."""
        if self._store is None:
            local = self.mode == "live" and self.default_mode == "live" and not self._shared
            self._store = Store() if local else Store.default(make=self.mode != "replay")
        return self._store

    def key(self, request: GuideRequest) -> bytes:
        """SHA-256 of all that the text depends on, its sample index among it."""
        if self._identity is None:
            self._identity = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode())
        digest = self._identity.copy()
        digest.update(self.request_json(request).encode())
        return digest.digest()

    def request_json(self, request: GuideRequest) -> str:
        """``request_fields`` as text: the same text is hashed and stored."""
        return json.dumps(self.request_fields(request), ensure_ascii=False)

    def cached(self, requests: Sequence[GuideRequest]) -> list[bool]:
        return [text is not None for text in self._lookup(requests)]

    def _lookup(self, requests: Sequence[GuideRequest]) -> list[StoredText | None]:
        keys = [self.key(request) for request in requests]
        texts = self.store.texts(keys)
        return [texts.get(key) for key in keys]

    def history(self) -> list[tuple[int, int | None, int | None, float | None]]:
        return self.store.samples(self.name)

    # account

    def check_budget(self, budget: BudgetConfig) -> None:
        """Refuse a cap in US dollars where no price is known. Raises UserError."""
        if budget.max_cost_usd is not None and not self.has_price:
            raise UserError(
                f"a cap in US dollars needs a price, and none is known for {self.name}",
                hint="give guide.usd_per_million_input and guide.usd_per_million_output, or --max-calls",
            )

    def charge_to(
        self,
        run: str,
        budget: BudgetConfig | None = None,
        spend: Mapping[str, Any] | None = None,
        *,
        shared: bool = False,
    ) -> None:
        self._shared = self._shared or shared  # an account of several guides or processes cannot be in memory
        self.check_budget(budget or BudgetConfig())
        self._meter = Meter(self.store, run, budget)
        if spend:
            self._meter.at_least(spend)

    def keep_account(self, path: Path) -> None:
        self.meter.keep_in(path)

    @property
    def meter(self) -> Meter:
        if self._meter is None:
            self._meter = Meter(self.store, f"no run {uuid.uuid4().hex}")
        return self._meter

    @property
    def begun(self) -> bool:
        """Whether the run that is charged has something to go on from."""
        return self.meter.begun

    def spend(self) -> dict[str, Any]:
        return self.meter.to_json()

    def has_texts(self) -> None:
        self.first_answers.usable = True

    def add_cached(self, texts: int) -> None:
        self.meter.cached += texts

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
