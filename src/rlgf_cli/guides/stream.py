"""One pass over requests: looked up, claimed, asked, answered."""

from __future__ import annotations

import itertools
import queue
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING

from rlgf_cli.errors import RlgfError
from rlgf_cli.ledger.store import Text
from rlgf_cli.protocols import Answer, Failure, GuideRequest

if TYPE_CHECKING:
    from rlgf_cli.guides.base import LiveGuide

LOOK_AHEAD = 512
"""Requests that are looked up at once while all of them are in the cache."""
_POLL_S = 0.25
_TELL_S = 10.0
"""How often it is said that nothing happens but waiting."""
_WAITING = 1000
"""Requests that may wait for another process's answer while others are asked."""

Ask = tuple[int, GuideRequest, bytes]
"""A request of a stream with its number and its key."""


class Stream:
    """A guide's answers to requests, in the order in which they come.

    What the cache holds is answered at once. What somebody asks already, another process or this stream itself, is
    waited for. The rest is claimed and submitted.
    """

    def __init__(self, guide: LiveGuide, requests: Iterable[GuideRequest]) -> None:
        self._guide = guide
        self._source = enumerate(requests)
        self._done: queue.SimpleQueue[tuple[Ask, Future[Text | Failure]]] = queue.SimpleQueue()
        self._flying: dict[bytes | int, Future[Text | Failure]] = {}
        self._misses: deque[Ask] = deque()
        self._waiting: dict[bytes, list[Ask]] = {}  # somebody asks already: another process, or this stream
        self._claimed: set[bytes] = set()
        self._fatal: RlgfError | None = None
        self._polled = 0.0
        self._renewed = self._told = time.monotonic()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        for future in self._flying.values():
            future.cancel()
        if self._claimed:
            self._guide.store.release(self._claimed)

    def __iter__(self) -> Iterator[Answer]:
        while True:
            if self._fatal is None:
                yield from self._fill()
            if not self._flying and (self._fatal is not None or not self._waiting):
                break
            self._guide.work()
            self._renew()
            yield from self._take()
            if self._waiting and self._fatal is None:
                yield from self._poll()
        if self._fatal is not None:
            raise self._fatal

    def _fill(self) -> Iterator[Answer]:
        """Draw requests until as many are under way as the guide takes; what the cache has is answered at once."""
        room, ahead = self._guide.abilities.at_once, self._guide.abilities.at_once
        while (free := room - len(self._flying)) > 0 and len(self._waiting) < _WAITING:
            if not self._misses:
                window = list(itertools.islice(self._source, free if ahead <= room else ahead))
                if not window:
                    return
                hits = yield from self._look_up(window)
                ahead = min(LOOK_AHEAD, 2 * max(ahead, 16)) if hits == len(window) else room
                continue
            yield from self._ask([self._misses.popleft() for _ in range(min(free, len(self._misses)))])

    def _look_up(self, window: list[tuple[int, GuideRequest]]) -> Generator[Answer, None, int]:
        guide = self._guide
        if guide.mode == "live":
            self._misses.extend((index, request, b"") for index, request in window)
            return 0
        asks = [(index, request, guide.key(request)) for index, request in window]
        found = guide.store.texts([key for _, _, key in asks])
        for ask in asks:
            index, request, key = ask
            if (text := found.get(key)) is not None:
                yield Answer(index, request, guide.completion(request, text, cached=True))
            elif guide.mode == "replay":
                raise guide.missed(request)
            else:
                self._misses.append(ask)
        return len(found)

    def _ask(self, asks: list[Ask]) -> Iterator[Answer]:
        """Submit what nobody has asked yet; the rest waits for whoever has."""
        guide = self._guide
        if guide.mode == "live":
            for ask in asks:
                self._submit(ask, None)
            return
        fresh: dict[bytes, Ask] = {}
        for ask in asks:
            key = ask[2]
            if key in fresh or key in self._claimed or key in self._waiting:
                self._waiting.setdefault(key, []).append(ask)
            else:
                fresh[key] = ask
        found, ours = guide.store.claim(list(fresh), guide.lease_s) if fresh else ({}, set())
        self._claimed |= ours
        for key, ask in fresh.items():
            if key in found:
                yield Answer(ask[0], ask[1], guide.completion(ask[1], found[key], cached=True))
            elif key in ours:
                self._submit(ask, key)
            else:
                self._waiting.setdefault(key, []).insert(0, ask)

    def _submit(self, ask: Ask, key: bytes | None) -> None:
        future = self._guide.submit(ask[1], key)
        self._flying[key if key is not None else ask[0]] = future
        future.add_done_callback(lambda answered: self._done.put((ask, answered)))

    def _take(self) -> Iterator[Answer]:
        """Wait for an answer, then take all that are there."""
        wait = True
        while True:
            try:
                ask, future = self._done.get(block=wait, timeout=_POLL_S if self._waiting else self._guide.lease_s / 3)
            except queue.Empty:
                return
            wait = False
            yield from self._answer(ask, future)

    def _answer(self, ask: Ask, future: Future[Text | Failure]) -> Iterator[Answer]:
        """Give an answer to all who asked for it."""
        index, request, key = ask
        self._flying.pop(key if self._guide.mode != "live" else index)
        self._claimed.discard(key)  # a text that is kept ends its lease
        try:
            outcome = future.result()
        except RlgfError as error:
            self._release(key)
            self._fatal = self._fatal or error  # no new requests; what is on its way may be paid for: it is awaited
            return
        if isinstance(outcome, Failure):
            self._release(key)
            yield Answer(index, request, outcome)
            for number, waiting, _ in self._waiting.pop(key, []):
                yield Answer(number, waiting, outcome)
            return
        yield Answer(index, request, self._guide.completion(request, outcome, cached=False))
        for number, waiting, _ in self._waiting.pop(key, []):
            yield Answer(number, waiting, self._guide.completion(waiting, outcome, cached=True))

    def _renew(self) -> None:
        """Keep the leases of requests that wait: for a rate limit, or for a server that is down."""
        now = time.monotonic()
        if self._claimed and now - self._renewed > self._guide.lease_s / 3:
            self._guide.store.renew(self._claimed, self._guide.lease_s)
            self._renewed = now

    def _release(self, key: bytes) -> None:
        if key:
            self._guide.store.release([key])

    def _poll(self) -> Iterator[Answer]:
        """See whether other processes have answered, or have given up, what this stream waits for."""
        foreign = [key for key in self._waiting if key not in self._claimed]
        if not foreign or time.monotonic() - self._polled < _POLL_S:
            return
        found, ours = self._guide.store.claim(foreign, self._guide.lease_s)
        self._polled = time.monotonic()
        if not (found or ours) and self._polled - self._told > _TELL_S:
            self._told = self._polled
            self._guide.notify(f"waiting for {len(foreign)} texts that another process, or a batch, has asked for")
        self._claimed |= ours
        for key in foreign:
            asks = self._waiting[key]
            if key in found:
                del self._waiting[key]
                for index, request, _ in asks:
                    yield Answer(index, request, self._guide.completion(request, found[key], cached=True))
            elif key in ours:
                self._submit(asks.pop(0), key)
                if not asks:
                    del self._waiting[key]
