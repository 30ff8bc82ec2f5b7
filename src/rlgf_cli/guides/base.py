"""What every guide that answers new requests has in common: what is in the cache is not asked for again."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
import time
import uuid
from abc import abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from rlgf_cli.config.guide import BudgetConfig, GuideConfig
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.guides.stream import LOOK_AHEAD, Stream
from rlgf_cli.ledger.meter import NANO, Meter
from rlgf_cli.ledger.store import Store, Text
from rlgf_cli.protocols import Answer, Completion, Failure, Guide, GuideAbilities, GuideRequest


class LiveGuide(Guide):
    """A guide that writes new text, with a cache and an account: the base class of the builtin kinds.

    A kind says what a text is decided by (:meth:`identity`), asks (:meth:`submit`, :meth:`work`) and mends what
    came (:meth:`read`); cache, leases and modes are here. ``counts`` says what had to be mended in the answers so
    far.
    """

    lease_s = 3600.0

    def __init__(self, config: GuideConfig, *, seed: int) -> None:
        super().__init__(config.name, self.describe(config))
        self.mode = config.mode or self.default_mode
        self.settings = {**config.settings(), "seed": seed}
        self.licence = config.licence
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

    def work(self) -> None:
        """Let a local guide write what was submitted."""

    @abstractmethod
    def read(self, request: GuideRequest, text: Text) -> Completion:
        """The completion that an answer stands for; what had to be mended is counted."""

    def close(self) -> None:
        """Give back connections, threads and the store."""
        if self._opened is not None:
            self._opened.close()

    # cache and books

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
        self._shared = self._shared or shared
        self.check_budget(budget or BudgetConfig())
        self._meter = Meter(self.store, run, budget)
        if spend:
            self._meter.at_least(spend)

    has_price = True
    _shared = False  # then the account cannot be in memory

    def spend(self) -> dict[str, Any]:
        return self.meter.to_json()

    def add_cached(self, texts: int) -> None:
        self.meter.cached += texts

    @property
    def store(self) -> Store:
        """The cache; a guide that neither reads nor keeps texts there, and has no price, has books in memory."""
        if self._opened is None:
            local = self.mode == "live" and self.default_mode == "live" and not self._shared
            self._opened = Store() if local else Store.default(make=self.mode != "replay")
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

    def cached(self, requests: Sequence[GuideRequest]) -> list[bool]:
        return [text is not None for text in self._lookup(requests)]

    def _lookup(self, requests: Sequence[GuideRequest]) -> list[Text | None]:
        keys = [self.key(request) for request in requests]
        texts = self.store.texts(keys)
        return [texts.get(key) for key in keys]

    def history(self) -> list[tuple[int, int | None, int | None, float | None]]:
        return self.store.samples(self.name)

    def stored(self, requests: Iterable[GuideRequest]) -> Generator[Answer, None, None]:
        source = enumerate(requests)
        while window := list(itertools.islice(source, LOOK_AHEAD)):
            texts = self._lookup([request for _, request in window])
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
        with Stream(self, requests) as running:
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
        broken = [a for a in failures if isinstance(a.outcome, Failure) and not a.outcome.refused]
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
        first = min(failures, key=lambda answer: answer.index)  # they come in any order
        assert isinstance(first.outcome, Failure)
        return RlgfError(
            f"the guide {self.name} failed {len(failures)} of {asked} requests; "
            f"the first, for {first.request.example.id!r}: {first.outcome.message}"
        )

    def completion(self, request: GuideRequest, text: Text, *, cached: bool) -> Completion:
        """:meth:`read`, with what the store knows of the text."""
        completion = self.read(request, text)
        with self._lock:
            self.counts.update(completion.repaired)
            self.models[text.model] += 1
            self.meter.cached += cached
        usage = {"prompt_tokens": text.prompt_tokens, "completion_tokens": text.completion_tokens}
        return replace(
            completion,
            model=text.model,
            usage={name: count for name, count in usage.items() if count is not None},
            cost_usd=None if text.nano_usd is None else text.nano_usd / NANO,
            created=_iso(text.created),
            raw=text.text if completion.repaired else None,
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


def _iso(created: int) -> str:
    moment = datetime.fromtimestamp(created or time.time(), timezone.utc)
    return moment.isoformat(timespec="seconds")
