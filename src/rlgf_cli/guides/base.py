"""What every guide that answers new requests has in common: what is in the cache is not asked for again."""

from __future__ import annotations

import hashlib
import itertools
import json
import queue
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from rlgf_cli.config.guide import BudgetConfig, GuideConfig, Mode
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.guides.budget import NANO, Meter
from rlgf_cli.guides.store import Store, Text
from rlgf_cli.protocols import Completion, Example, GuideAbilities, GuideRequest

_LOOK_AHEAD = 512
"""Requests that are looked up at once while all of them are in the cache."""
_POLL_S = 0.25
_REFUSALS = ("refusal", "content_filter")
"""Failures that are the model's own choice."""
_WAITING = 1000
"""Requests that may wait for another process's answer while others are asked."""


@dataclass(frozen=True)
class Failure:
    """A request that brought no text.

    ``kind`` is what failures are counted by; ``message`` holds no key; ``final``: asking again would not help.
    """

    kind: str
    message: str
    final: bool = False


@dataclass(frozen=True)
class Answer:
    """What became of the ``index``-th request of a stream."""

    index: int
    request: GuideRequest
    outcome: Completion | Failure


Ask = tuple[int, GuideRequest, bytes]
"""A request of a stream with its number and its key."""


class LiveGuide(ABC):
    """A guide that writes new text: the base of the builtin kinds and of those of other packages.

    A kind says what a text is decided by (:meth:`identity`), asks (:meth:`submit`, :meth:`work`) and mends what
    came (:meth:`read`); cache, leases and modes are here. ``counts`` says what had to be mended in the answers so
    far. ``settings`` holds what decides the text (it goes into the manifest, and a collection is only resumed
    under equal settings). ``device`` is where a local model runs.
    """

    device: str | None = None
    default_mode: Mode = "live"
    lease_s = 3600.0

    def __init__(self, config: GuideConfig, *, seed: int) -> None:
        self.name = config.name
        self.abilities = self.describe(config)
        self.mode: Mode = config.mode or self.default_mode
        self.counts: Counter[str] = Counter()
        self.models: Counter[str] = Counter()
        self.settings: dict[str, Any] = {**config.settings(), "seed": seed}
        self.licence = config.licence
        self.notify: Callable[[str], None] = lambda text: None
        self._opened: Store | None = None
        self._meter: Meter | None = None
        self._identity: Any = None
        self._lock = threading.Lock()

    # what a kind says

    @classmethod
    @abstractmethod
    def describe(cls, config: GuideConfig) -> GuideAbilities:
        """What such a guide can do, without loading a model or calling a server. Raises UserError."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides a text besides the request, as JSON: guide, model, sampling."""

    @abstractmethod
    def asked(self, request: GuideRequest) -> dict[str, Any]:
        """The part of the request that decides the text, as JSON: kept with it, and part of its key."""

    @abstractmethod
    def submit(self, request: GuideRequest, key: bytes | None) -> Future[Text | Failure]:
        """Ask. The text is charged to :attr:`meter` and, under a key, kept in its store by the one transaction.

        An error in the future is one that no later request could survive: a wrong key, a spent budget.
        """

    def work(self) -> None:  # noqa: B027 - a remote guide works elsewhere
        """Let a local guide write what was submitted."""

    @abstractmethod
    def read(self, request: GuideRequest, text: Text) -> Completion:
        """The completion that an answer stands for; what had to be mended is counted."""

    def check(self, examples: Iterable[Example], max_new_tokens: int) -> None:  # noqa: B027 - nothing to check is fine
        """Refuse prompts that could not be answered, before anything is paid. Raises UserError."""

    def price(self, request: GuideRequest) -> int | None:
        """The most that an answer can cost, in billionths of a US dollar; None where no price is known."""
        return 0

    def close(self) -> None:
        """Give back connections, threads and the store."""
        if self._opened is not None:
            self._opened.close()

    # cache and books

    def charge_to(self, run: str, budget: BudgetConfig | None = None, spend: dict[str, Any] | None = None) -> None:
        """Charge this run's account from now on. ``spend``: what its manifest says was charged already."""
        if budget is not None and budget.max_cost_usd is not None and not self.has_price:
            raise UserError(
                f"a cap in US dollars needs a price, and none is known for {self.name}",
                hint="give guide.usd_per_million_input and guide.usd_per_million_output, or --max-calls",
            )
        self._meter = Meter(self.store, run, budget)
        if spend:
            self._meter.at_least(spend)

    has_price = True
    several = False
    """Whether several processes charge one account, so that its books cannot be in memory."""

    def provenance(self) -> dict[str, Any]:
        """Whose texts these are, for manifests and model cards."""
        return {"guide": self.name, "mode": self.mode, "models": dict(self.models), "licence": self.licence}

    @property
    def store(self) -> Store:
        """The cache; a guide that neither reads nor keeps texts there, and has no price, has books in memory."""
        if self._opened is None:
            local = self.mode == "live" and self.default_mode == "live" and not self.several
            self._opened = Store() if local else Store.default()
        return self._opened

    @property
    def meter(self) -> Meter:
        if self._meter is None:
            self._meter = Meter(self.store, f"no run {uuid.uuid4().hex}")
        return self._meter

    def key(self, request: GuideRequest) -> bytes:
        """SHA-256 of all that decides the text, its sample index among it."""
        if self._identity is None:
            self._identity = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode())
        digest = self._identity.copy()
        digest.update(self.request_json(request).encode())
        return digest.digest()

    def request_json(self, request: GuideRequest) -> str:
        """``asked`` as text: what is hashed is what is kept."""
        return json.dumps(self.asked(request), ensure_ascii=False)

    def lookup(self, requests: Sequence[GuideRequest]) -> list[Text | None]:
        """What the cache holds for requests."""
        keys = [self.key(request) for request in requests]
        found = self.store.texts(keys)
        return [found.get(key) for key in keys]

    def stored(self, requests: Iterable[GuideRequest]) -> Generator[Answer, None, None]:
        """As :meth:`stream`, but nobody is asked: what the cache does not hold is a failure."""
        source = enumerate(requests)
        while window := list(itertools.islice(source, _LOOK_AHEAD)):
            texts = self.lookup([request for _, request in window])
            for (index, request), text in zip(window, texts, strict=True):
                if text is None:
                    yield Answer(index, request, Failure("not_answered", "the batch brought no text", final=True))
                else:
                    yield Answer(index, request, self.completion(request, text, cached=True))

    # asking

    def stream(self, requests: Iterable[GuideRequest]) -> Generator[Answer, None, None]:
        """Answers as they arrive, in any order. Requests are drawn only as fast as they can be answered.

        A request that fails is answered with a :class:`Failure`; what no later request could survive is raised,
        after the answers that were on their way have been given.
        """
        with _Stream(self, requests) as running:
            yield from running

    def complete(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        """One completion per request, in order. Raises RlgfError where one failed."""
        found, failures = self._all(requests)
        if failures:
            raise self._failed(failures, len(requests))
        return [completion for completion in found if completion is not None]

    def attempt(self, requests: Sequence[GuideRequest]) -> list[Completion | None]:
        """As :meth:`complete`, with None for a text that the guide would not write, and for a few other failures.

        Raises RlgfError where more than half of the requests failed in another way.
        """
        found, failures = self._all(requests)
        broken = [a for a in failures if isinstance(a.outcome, Failure) and a.outcome.kind not in _REFUSALS]
        if 2 * len(broken) > len(requests):
            raise self._failed(broken, len(requests))
        return found

    def _all(self, requests: Sequence[GuideRequest]) -> tuple[list[Completion | None], list[Answer]]:
        found: list[Completion | None] = [None] * len(requests)
        failures: list[Answer] = []
        for answer in self.stream(requests):
            if isinstance(answer.outcome, Failure):
                failures.append(answer)
            else:
                found[answer.index] = answer.outcome
        return found, failures

    def _failed(self, failures: list[Answer], asked: int) -> RlgfError:
        first = failures[0]
        assert isinstance(first.outcome, Failure)
        return RlgfError(
            f"the guide {self.name} failed {len(failures)} of {asked} requests; "
            f"the first, for {first.request.example.id!r}: {first.outcome.message}"
        )

    def completion(self, request: GuideRequest, text: Text, *, cached: bool) -> Completion:
        """:meth:`read`, with what the store knows of the text."""
        completion = self.read(request, text)
        with self._lock:
            self.counts.update(completion.mended)
            self.models[text.model] += 1
            self.meter.cached += cached
        usage = {"prompt_tokens": text.prompt_tokens, "completion_tokens": text.completion_tokens}
        return replace(
            completion,
            model=text.model,
            usage={name: count for name, count in usage.items() if count is not None},
            cost_usd=None if text.nano_usd is None else text.nano_usd / NANO,
            created=_iso(text.created),
            raw=text.text if completion.mended else None,
            cached=cached,
        )

    def missed(self, request: GuideRequest) -> UserError:
        """The error of a replay for a text that the cache does not hold."""
        begun = f" going on from {request.prefix[-40:]!r}" if request.prefix else ""
        return UserError(
            f"the cache has no text of {self.name} for {request.example.id!r}, sample {request.sample_index}{begun} "
            f"(at most {request.max_new_tokens} tokens), and replay asks nobody",
            where=str(self.store.path),
            hint="record it first: --guide-mode record; RLGF_CACHE_DIR says which cache is read",
        )


class _Stream:
    """One pass over requests: looked up, claimed, asked, answered."""

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

    def __enter__(self) -> _Stream:
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
                ahead = min(_LOOK_AHEAD, 2 * max(ahead, 16)) if hits == len(window) else room
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
                ask, future = self._done.get(block=wait, timeout=_POLL_S if self._waiting else None)
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


def _iso(created: int) -> str:
    moment = datetime.fromtimestamp(created or time.time(), timezone.utc)
    return moment.isoformat(timespec="seconds")
