"""The batch API of an OpenAI-compatible server: requests are answered within a day, at a lower price.

A batch fills the cache; the collection that follows finds its texts there. A batch job is in the store before the
server receives it, under a name that the server keeps as metadata, so that after a kill anywhere in between the next
process goes on with it.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import tempfile
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rlgf_cli.errors import Interrupted, RlgfError, StoppedEarly
from rlgf_cli.guides.openai.connection import CallFailed, Connection
from rlgf_cli.guides.openai.endpoint import Endpoint
from rlgf_cli.guides.openai.rate_limits import back_off
from rlgf_cli.guides.openai.request import RequestBuilder
from rlgf_cli.guides.openai.response import Read, read_response
from rlgf_cli.guides.openai.server_errors import is_filtered
from rlgf_cli.ledger.batch_jobs import BatchJob, BatchJobs
from rlgf_cli.ledger.meter import Meter
from rlgf_cli.ledger.store import Store, StoredText
from rlgf_cli.protocols import Completion, Failure, GuideRequest

LARGEST = 10_000
"""Requests in a batch: servers take more, but queue only so many tokens."""
LONGEST_S = 26 * 3600.0
_WINDOW = "24h"
_NAME = "rlgf_batch"
_ENDED = {"completed", "failed", "expired", "cancelled"}
_AT_ONCE = 500
_RETRIES = 5
_SHOWN = 3

Item = tuple[bytes, GuideRequest]


class EndpointGuide(Protocol):
    """The members of an endpoint's guide that a batch uses."""

    name: str
    endpoint: Endpoint
    builder: RequestBuilder
    limit_key: str
    has_price: bool
    batch_price: float
    batch_poll_s: float
    lease_s: float
    notify: Callable[[str], None]

    @property
    def connection(self) -> Connection: ...
    @property
    def store(self) -> Store: ...
    @property
    def meter(self) -> Meter: ...
    def key(self, request: GuideRequest) -> bytes: ...
    def request_json(self, request: GuideRequest) -> str: ...
    def prompt_bytes(self, request: GuideRequest) -> int: ...
    def max_price(self, request: GuideRequest) -> int | None: ...
    def accept(self, read: Read, *, price_share: float) -> Completion | Failure: ...


def run(guide: EndpointGuide, requests: Iterator[GuideRequest], stop: threading.Event) -> None:
    """Have a batch answer what the cache does not hold, and wait for it.

    Raises BudgetSpent where a cap leaves no room, Interrupted where ``stop`` is set:
    the batch goes on, and the next run collects it.
    """
    batches = _Batches(guide)
    batches.take_up()
    room = batches.place_all(requests)
    batches.wait(stop)
    if not room:
        raise guide.meter.spent()


class _Batches:
    def __init__(self, guide: EndpointGuide) -> None:
        self._guide = guide
        self._store, self._jobs = guide.store, BatchJobs(guide.meter)
        self._connection = guide.connection
        self._client = guide.connection.client.with_options(max_retries=_RETRIES)

    def take_up(self) -> None:
        """Go on with the batch jobs of an earlier process: find the batches whose server id it did not record."""
        lost = {job.id: job for job in self._jobs.open() if job.server_id is None}
        if not lost:
            return
        server_ids = self._connection.call(self._named(set(lost)))
        for job in lost.values():
            if job.id in server_ids:
                self._jobs.confirm(job.id, server_ids[job.id])
            else:  # the job never reached the server
                self._guide.meter.refund(job.call, calls=job.requests)
                self._jobs.end(job.id)

    async def _named(self, names: set[str]) -> dict[str, str]:
        """The server's ids of the batches with these names, of those that it knows."""
        server_ids: dict[str, str] = {}
        async for batch in self._client.batches.list(limit=100):
            if (name := (batch.metadata or {}).get(_NAME)) in names:
                server_ids[name] = batch.id
                if len(server_ids) == len(names):
                    break
        return server_ids

    def place_all(self, requests: Iterator[GuideRequest]) -> bool:
        """Place the requests that no cache and no batch has yet. Returns whether the budget had room for all."""
        waiting: list[Item] = []
        while window := list(itertools.islice(requests, _AT_ONCE)):
            keys = {self._guide.key(request): request for request in window}
            _, ours = self._store.claim(list(keys), self._guide.lease_s)
            waiting += [(key, request) for key, request in keys.items() if key in ours]
            while len(waiting) >= LARGEST:
                if not self._place(waiting[:LARGEST]):
                    self._store.release([key for key, _ in waiting[LARGEST:]])
                    return False
                waiting = waiting[LARGEST:]
        return not waiting or self._place(waiting)

    def _place(self, items: list[Item]) -> bool:
        """Send one batch, as large as the budget allows. Returns whether that was all of the items."""
        guide = self._guide
        room, calls = guide.meter.room()
        size = amount = 0
        for _, request in items:
            price = round((guide.max_price(request) or 0) * guide.batch_price)
            if size + 1 > calls or amount + price > room:
                break
            size, amount = size + 1, amount + price
        id_ = uuid.uuid4().hex
        sent = items[:size]
        rows = [(key, guide.request_json(r), guide.prompt_bytes(r)) for key, r in sent]
        if not sent or not self._jobs.place(id_, amount, rows, LONGEST_S):
            self._store.release([key for key, _ in items])
            return False
        self._store.release([key for key, _ in items[size:]])
        server_id = self._connection.call(self._send(id_, sent))
        self._jobs.confirm(id_, server_id)
        guide.notify(f"batch {server_id}: {size} requests sent; it may take up to {_WINDOW}")
        return size == len(items)

    async def _send(self, id_: str, items: list[Item]) -> str:
        guide = self._guide
        path = "/v1/completions" if guide.endpoint.api == "completion" else "/v1/chat/completions"
        lines = io.BytesIO()
        for key, request in items:
            body = guide.builder.body(request)
            body |= {**body.pop("extra_body", {}), guide.limit_key: guide.builder.limit(request)}
            line = {"custom_id": key.hex(), "method": "POST", "url": path, "body": body}
            lines.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        lines.seek(0)
        sent = await self._client.files.create(file=("requests.jsonl", lines), purpose="batch")
        return await self._create(id_, sent.id, path)

    async def _create(self, id_: str, file_id: str, path: str) -> str:
        """Create the batch. One whose response was lost is looked for first: created again, it would be paid twice."""
        import openai

        once = self._client.with_options(max_retries=0)
        for attempt in itertools.count():
            try:
                batch = await once.batches.create(
                    input_file_id=file_id,
                    endpoint=path,  # type: ignore[arg-type]
                    completion_window=_WINDOW,  # type: ignore[arg-type]
                    metadata={_NAME: id_},
                )
                return batch.id
            except (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError):
                if attempt == _RETRIES:
                    raise
                await asyncio.sleep(back_off(attempt))
                if server_ids := await self._named({id_}):
                    return server_ids[id_]
        raise AssertionError

    def wait(self, stop: threading.Event) -> None:
        """Poll the run's batches until all are collected."""
        while open_ := self._jobs.open():
            for job in open_:
                assert job.server_id is not None
                try:
                    batch = self._connection.call(self._client.batches.retrieve(job.server_id))
                    if batch.status in _ENDED:
                        self._collect(job, batch)
                except CallFailed as error:
                    if not error.passes:
                        raise
                    raise StoppedEarly(error.message, hint="--batch --resume collects the batch") from None
            if self._jobs.open() and stop.wait(self._guide.batch_poll_s):
                raise Interrupted("the server goes on with the batch", hint="--batch --resume collects it")

    def _collect(self, job: BatchJob, batch: Any) -> None:
        """Store a batch's texts and settle its price; requests without an answer can be sent again."""
        result = _Result()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lines.jsonl"
            if batch.output_file_id:
                self._connection.call(self._download(batch.output_file_id, path))
                with path.open("rb") as lines:
                    while window := list(itertools.islice(lines, _AT_ONCE)):
                        self._store.put(list(self._texts(job.id, window, result)))
            if batch.error_file_id:
                self._connection.call(self._download(batch.error_file_id, path))
                with path.open("rb") as lines:
                    for line in lines:
                        self._error(line, result)
        amount = result.nano_usd if self._guide.has_price else None
        self._guide.meter.settle(job.call, amount, result.usage, calls=job.requests, answered=result.answered)
        self._jobs.end(job.id)
        if missing := job.requests - result.texts:
            why = (
                "; ".join(f"{kind}: {count}" for kind, count in result.failed.most_common(_SHOWN)) or "no reason given"
            )
            self._guide.notify(f"batch {batch.id} ({batch.status}): {missing} of {job.requests} without text ({why})")
        if batch.status == "failed" and not result.answered:
            errors = batch.errors.data if batch.errors and batch.errors.data else []
            why = errors[0].message if errors else "no reason given"
            raise RlgfError(f"the server refused batch {batch.id}: {why}", hint="collect without --batch")

    async def _download(self, file_id: str, path: Path) -> None:
        async with self._client.files.with_streaming_response.content(file_id) as response:
            await response.stream_to_file(path)

    def _texts(self, id_: str, lines: list[bytes], result: _Result) -> Iterator[tuple[bytes, StoredText]]:
        """The texts in lines of the output; every answer is counted and charged, usable or not."""
        guide = self._guide
        bodies = {}
        for line in lines:
            try:
                value = json.loads(line)
                key, response = bytes.fromhex(value["custom_id"]), value["response"]
                status, body = response["status_code"], response["body"]
            except (ValueError, KeyError, TypeError):
                result.failed["malformed"] += 1
                continue
            if status != 200:
                result.failed[f"status {status}"] += 1
                continue
            bodies[key] = body
        for key, (request, size) in self._jobs.requests(id_, list(bodies)).items():
            limit = json.loads(request)["max_tokens"] + guide.builder.config.reasoning_tokens
            read = read_response(bodies[key], guide.endpoint.api, limit)
            usage = read.outcome.usage
            price = guide.endpoint.cost(**usage) if len(usage) == 2 else guide.endpoint.cost(size, limit)
            result.answered += 1
            result.nano_usd += round((price or 0) * guide.batch_price)
            result.usage.update(usage)
            outcome = guide.accept(read, price_share=guide.batch_price)
            if isinstance(outcome, Failure):
                result.failed[outcome.kind] += 1
            else:
                result.texts += 1
                yield key, StoredText.of(guide.name, request, size, outcome)

    def _error(self, line: bytes, result: _Result) -> None:
        """Count why a request was not answered."""
        try:
            value = json.loads(line)
            response, error = value.get("response") or {}, value.get("error") or {}
            status, body = response.get("status_code"), response.get("body") or {}
            message = error.get("message") or (body.get("error") or {}).get("message") or "no reason given"
            if is_filtered(error) or is_filtered(body):
                result.failed["content_filter"] += 1
                return
        except (ValueError, AttributeError):
            status, message = None, "no reason given"
        why = self._connection.first_line(RlgfError(str(message)))
        result.failed[why if status is None else f"status {status}: {why}"] += 1


@dataclass
class _Result:
    """The result of a batch: requests that were answered, texts among the answers, their price, and failures."""

    answered: int = 0
    texts: int = 0
    nano_usd: int = 0
    usage: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
