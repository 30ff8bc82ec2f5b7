"""Stream: one pass over a guide's requests, through the cache, the leases and the guide."""

from __future__ import annotations

import itertools
import queue
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import Literal, Protocol

from rlgf_cli.errors import RlgfError, StoppedEarly, UserError
from rlgf_cli.ledger.store import Store
from rlgf_cli.protocols import Answer, Completion, Failure, GuideAbilities, GuideRequest

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


class Unusable(UserError):
    """The guide can answer no request: a refused key, a spent quota, a wrong address."""

    def of_run(self, *, begun: bool) -> RlgfError:
        """This error for a run: StoppedEarly where it has answers (``begun``), so that it is saved and resumed."""
        if not begun:
            return self
        return StoppedEarly(self.message, where=self.where, hint=f"{self.hint}; --resume goes on from there")


def in_groups(answers: Iterable[Answer], size: int) -> Iterator[list[Answer]]:
    """Answers in groups of ``size``; those that came before an error are a group before it is raised."""
    group: list[Answer] = []
    failed: RlgfError | None = None
    try:
        for answer in answers:
            group.append(answer)
            if len(group) == size:
                yield group
                group = []
    except RlgfError as error:
        failed = error
    if group:
        yield group
    if failed is not None:
        raise failed


class Backend(Protocol):
    """What a stream needs of a guide with a cache; :class:`rlgf_cli.guides.base.LiveGuide` documents each member."""

    lease_s: float
    mode: Literal["live", "record", "replay"]
    abilities: GuideAbilities
    notify: Callable[[str], None]

    @property
    def store(self) -> Store: ...
    @property
    def begun(self) -> bool: ...
    def key(self, request: GuideRequest) -> bytes: ...
    def submit(self, request: GuideRequest, key: bytes | None) -> Future[Outcome]: ...
    def work(self) -> None: ...
    def cleaned(self, request: GuideRequest, completion: Completion, *, cached: bool) -> Outcome: ...
    def missed(self, request: GuideRequest) -> UserError: ...


class Stream:
    """One pass over requests: looked up in the cache, claimed, submitted, answered.

    A text in the cache is the answer at once. A request that another process or this stream itself has submitted
    already waits for that one's completion. The rest is claimed and submitted.
    """

    def __init__(self, guide: Backend, requests: Iterable[GuideRequest]) -> None:
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
            # only now: an answer that was in flight makes a run that can be resumed
            raise self._fatal.of_run(begun=self._guide.begun) if isinstance(self._fatal, Unusable) else self._fatal

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
