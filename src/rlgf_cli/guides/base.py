"""LiveGuide: guides with a cache and an account. A text that is in the cache is not requested again."""

from __future__ import annotations

import hashlib
import itertools
import json
import queue
import threading
import time
import uuid
from abc import abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from rlgf_cli.config.guide import BudgetConfig, GuideConfig
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.ledger.meter import Meter
from rlgf_cli.ledger.store import Store, StoredText
from rlgf_cli.protocols import Answer, Completion, Failure, Guide, GuideRequest

LOOK_AHEAD = 512
"""Requests that are looked up at once while all of them are in the cache."""
_POLL_S = 0.25
_REPORT_S = 10.0
"""Seconds between two messages that a stream only waits for texts which another process or a batch requested."""
_WAITING = 1000
"""Requests that may wait for another process's text while others are submitted."""

Outcome = Completion | Failure
Pending = tuple[int, GuideRequest, bytes]
"""A request of a stream with its index and its cache key (empty in mode ``live``)."""


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

    def cleaned(self, request: GuideRequest, completion: Completion, *, cached: bool) -> Completion:
        """:meth:`clean`, counted. ``cached``: the completion is from the cache."""
        clean = self.clean(request, completion)
        with self._lock:
            self.counts.update(clean.repaired)
            self.models[completion.model] += 1
            self.meter.cached += cached
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

    @property
    def meter(self) -> Meter:
        if self._meter is None:
            self._meter = Meter(self.store, f"no run {uuid.uuid4().hex}")
        return self._meter

    def spend(self) -> dict[str, Any]:
        return self.meter.to_json()

    def add_cached(self, texts: int) -> None:
        self.meter.cached += texts

    def close(self) -> None:
        if self._store is not None:
            self._store.close()


class Stream:
    """One pass over requests: looked up in the cache, claimed, submitted, answered.

    A text in the cache is the answer at once. A request that another process or this stream itself has submitted
    already waits for that one's completion. The rest is claimed and submitted.
    """

    def __init__(self, guide: LiveGuide, requests: Iterable[GuideRequest]) -> None:
        self._guide = guide
        self._source = enumerate(requests)
        self._done: queue.SimpleQueue[tuple[Pending, Future[Outcome]]] = queue.SimpleQueue()
        self._in_flight: dict[bytes | int, Future[Outcome]] = {}
        self._misses: deque[Pending] = deque()
        self._waiting: dict[bytes, list[Pending]] = {}  # submitted already: by another process, or by this stream
        self._claimed: set[bytes] = set()
        self._fatal: RlgfError | None = None
        self._polled = 0.0
        self._renewed = self._reported = time.monotonic()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        for future in self._in_flight.values():
            future.cancel()
        if self._claimed:
            self._guide.store.release(self._claimed)

    def __iter__(self) -> Iterator[Answer]:
        while True:
            if self._fatal is None:
                yield from self._fill()
            if not self._in_flight and (self._fatal is not None or not self._waiting):
                break
            self._guide.work()
            self._renew()
            yield from self._take()
            if self._waiting and self._fatal is None:
                yield from self._poll()
        if self._fatal is not None:
            raise self._fatal

    def _fill(self) -> Iterator[Answer]:
        """Draw requests until as many are in flight as the guide takes; those in the cache are answered at once."""
        room, ahead = self._guide.abilities.at_once, self._guide.abilities.at_once
        while (free := room - len(self._in_flight)) > 0 and len(self._waiting) < _WAITING:
            if not self._misses:
                window = list(itertools.islice(self._source, free if ahead <= room else ahead))
                if not window:
                    return
                hits = yield from self._look_up(window)
                ahead = min(LOOK_AHEAD, 2 * max(ahead, 16)) if hits == len(window) else room
                continue
            yield from self._claim([self._misses.popleft() for _ in range(min(free, len(self._misses)))])

    def _look_up(self, window: list[tuple[int, GuideRequest]]) -> Generator[Answer, None, int]:
        guide = self._guide
        if guide.mode == "live":
            self._misses.extend((index, request, b"") for index, request in window)
            return 0
        keyed = [(index, request, guide.key(request)) for index, request in window]
        texts = guide.store.texts([key for _, _, key in keyed])
        for pending in keyed:
            if (text := texts.get(pending[2])) is not None:
                yield self._answer(pending, text.completion(), cached=True)
            elif guide.mode == "replay":
                raise guide.missed(pending[1])
            else:
                self._misses.append(pending)
        return len(texts)

    def _claim(self, batch: list[Pending]) -> Iterator[Answer]:
        """Submit the requests that nobody has submitted yet; the others wait."""
        guide = self._guide
        if guide.mode == "live":
            for pending in batch:
                self._submit(pending, None)
            return
        fresh: dict[bytes, Pending] = {}
        for pending in batch:
            key = pending[2]
            if key in fresh or key in self._claimed or key in self._waiting:
                self._waiting.setdefault(key, []).append(pending)
            else:
                fresh[key] = pending
        texts, ours = guide.store.claim(list(fresh), guide.lease_s) if fresh else ({}, set())
        self._claimed |= ours
        for key, pending in fresh.items():
            if key in texts:
                yield self._answer(pending, texts[key].completion(), cached=True)
            elif key in ours:
                self._submit(pending, key)
            else:
                self._waiting.setdefault(key, []).insert(0, pending)

    def _submit(self, pending: Pending, key: bytes | None) -> None:
        future = self._guide.submit(pending[1], key)
        self._in_flight[key if key is not None else pending[0]] = future
        future.add_done_callback(lambda done: self._done.put((pending, done)))

    def _take(self) -> Iterator[Answer]:
        """Wait for a request in flight, then take all that are done."""
        wait = True
        while True:
            try:
                done = self._done.get(block=wait, timeout=_POLL_S if self._waiting else self._guide.lease_s / 3)
            except queue.Empty:
                return
            wait = False
            yield from self._settle(*done)

    def _settle(self, pending: Pending, future: Future[Outcome]) -> Iterator[Answer]:
        """Answer all requests that an outcome is for."""
        index, _, key = pending
        self._in_flight.pop(key if self._guide.mode != "live" else index)
        self._claimed.discard(key)  # a text that is stored ends its lease
        try:
            outcome = future.result()
        except RlgfError as error:
            self._release(key)
            self._fatal = self._fatal or error  # no new requests; those in flight may be charged, so they are awaited
            return
        if isinstance(outcome, Failure):
            self._release(key)
        yield self._answer(pending, outcome)
        for waiting in self._waiting.pop(key, []):
            yield self._answer(waiting, outcome, cached=True)

    def _answer(self, pending: Pending, outcome: Outcome, *, cached: bool = False) -> Answer:
        index, request, _ = pending
        if isinstance(outcome, Completion):
            outcome = self._guide.cleaned(request, outcome, cached=cached)
        return Answer(index, request, outcome)

    def _renew(self) -> None:
        """Renew the leases of requests that wait for a rate limit, or for a server that is down."""
        now = time.monotonic()
        if self._claimed and now - self._renewed > self._guide.lease_s / 3:
            self._guide.store.renew(self._claimed, self._guide.lease_s)
            self._renewed = now

    def _release(self, key: bytes) -> None:
        if key:
            self._guide.store.release([key])

    def _poll(self) -> Iterator[Answer]:
        """See whether other processes have stored, or have given up, the texts that this stream waits for."""
        foreign = [key for key in self._waiting if key not in self._claimed]
        if not foreign or time.monotonic() - self._polled < _POLL_S:
            return
        texts, ours = self._guide.store.claim(foreign, self._guide.lease_s)
        self._polled = time.monotonic()
        if not (texts or ours) and self._polled - self._reported > _REPORT_S:
            self._reported = self._polled
            self._guide.notify(f"waiting for {len(foreign)} texts that another process, or a batch, has requested")
        self._claimed |= ours
        for key in foreign:
            pending = self._waiting[key]
            if key in texts:
                del self._waiting[key]
                for waiting in pending:
                    yield self._answer(waiting, texts[key].completion(), cached=True)
            elif key in ours:
                self._submit(pending.pop(0), key)
                if not pending:
                    del self._waiting[key]
