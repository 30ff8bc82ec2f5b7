"""The batch API of an OpenAI-compatible server: asked now, answered within a day, at a lower price.

A batch fills the cache; the collection that follows finds its texts there. An order is in the store before the
server hears of it, under a name that the server keeps as metadata, so a process that ends anywhere in between
is taken up again by the next one.
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlgf_cli.errors import Interrupted, RlgfError
from rlgf_cli.guides.openai.guide import OpenAIGuide
from rlgf_cli.guides.openai.rate_limits import back_off
from rlgf_cli.guides.openai.response import read_reply
from rlgf_cli.ledger.batches import Order, Orders
from rlgf_cli.ledger.store import Text
from rlgf_cli.protocols import Failure, GuideRequest

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


def run(guide: OpenAIGuide, requests: Iterator[GuideRequest], stop: threading.Event) -> None:
    """Have a batch answer what the cache does not hold, and wait for it.

    Raises BudgetSpent where a cap leaves no room, Interrupted where ``stop`` is set:
    the batch goes on, and the next run collects it.
    """
    batches = _Batches(guide)
    batches.take_up()
    room = batches.order_all(requests)
    batches.wait(stop)
    if not room:
        raise guide.meter.spent()


class _Batches:
    def __init__(self, guide: OpenAIGuide) -> None:
        self._guide = guide
        self._store, self._orders = guide.store, Orders(guide.meter)
        self._client = guide.client.with_options(max_retries=_RETRIES)
        self._share = guide.batch_price

    def take_up(self) -> None:
        """What an earlier process ordered: find the batches whose id it did not live to note."""
        lost = {order.id: order for order in self._orders.open() if order.server_id is None}
        if not lost:
            return
        found = self._guide.call(self._named(set(lost)))
        for order in lost.values():
            if order.id in found:
                self._orders.taken(order.id, found[order.id])
            else:  # the order never reached the server
                self._guide.meter.refund(order.call, calls=order.requests)
                self._orders.end(order.id)

    async def _named(self, names: set[str]) -> dict[str, str]:
        """The server's ids of the orders with these names, of those that it knows."""
        found: dict[str, str] = {}
        async for batch in self._client.batches.list(limit=100):
            if (name := (batch.metadata or {}).get(_NAME)) in names:
                found[name] = batch.id
                if len(found) == len(names):
                    break
        return found

    def order_all(self, requests: Iterator[GuideRequest]) -> bool:
        """Order what is in no cache and no batch yet. Returns whether the budget had room for all of it."""
        waiting: list[Item] = []
        while window := list(itertools.islice(requests, _AT_ONCE)):
            keys = {self._guide.key(request): request for request in window}
            _, ours = self._store.claim(list(keys), self._guide.lease_s)
            waiting += [(key, request) for key, request in keys.items() if key in ours]
            while len(waiting) >= LARGEST:
                if not self._order(waiting[:LARGEST]):
                    self._store.release([key for key, _ in waiting[LARGEST:]])
                    return False
                waiting = waiting[LARGEST:]
        return not waiting or self._order(waiting)

    def _order(self, items: list[Item]) -> bool:
        """Send one batch, as large as the budget allows. Returns whether that was all of it."""
        guide = self._guide
        room, calls = guide.meter.room()
        size = amount = 0
        for _, request in items:
            price = round((guide.price(request) or 0) * self._share)
            if size + 1 > calls or amount + price > room:
                break
            size, amount = size + 1, amount + price
        id_ = uuid.uuid4().hex
        sent = items[:size]
        asked = [(key, guide.request_json(r), guide.prompt_bytes(r)) for key, r in sent]
        if not sent or not self._orders.place(id_, amount, asked, LONGEST_S):
            self._store.release([key for key, _ in items])
            return False
        self._store.release([key for key, _ in items[size:]])
        server_id = guide.call(self._send(id_, sent))
        self._orders.taken(id_, server_id)
        guide.notify(f"batch {server_id}: {size} requests sent; it may take up to {_WINDOW}")
        return size == len(items)

    async def _send(self, id_: str, items: list[Item]) -> str:
        guide = self._guide
        path = "/v1/completions" if guide.endpoint.api == "completion" else "/v1/chat/completions"
        lines = io.BytesIO()
        for key, request in items:
            body = guide.wording.body(request)
            body |= {**body.pop("extra_body", {}), guide.limit_key: request.max_new_tokens}
            line = {"custom_id": key.hex(), "method": "POST", "url": path, "body": body}
            lines.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        lines.seek(0)
        sent = await self._client.files.create(file=("requests.jsonl", lines), purpose="batch")
        return await self._create(id_, sent.id, path)

    async def _create(self, id_: str, file_id: str, path: str) -> str:
        """Give an order. One whose answer was lost is looked for before it is given again, or it is paid twice."""
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
                if found := await self._named({id_}):
                    return found[id_]
        raise AssertionError

    def wait(self, stop: threading.Event) -> None:
        """Ask after the run's batches until all are collected."""
        while open_ := self._orders.open():
            for order in open_:
                assert order.server_id is not None
                batch = self._guide.call(self._client.batches.retrieve(order.server_id))
                if batch.status in _ENDED:
                    self._collect(order, batch)
            if self._orders.open() and stop.wait(self._guide.batch_poll_s):
                raise Interrupted("the batch goes on without us", hint="--batch --resume collects it")

    def _collect(self, order: Order, batch: Any) -> None:
        """Keep a batch's texts and settle its price; what it did not answer is free to be asked again."""
        came = _Came()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lines.jsonl"
            if batch.output_file_id:
                self._guide.call(self._download(batch.output_file_id, path))
                with path.open("rb") as lines:
                    while window := list(itertools.islice(lines, _AT_ONCE)):
                        self._store.put(list(self._texts(order.id, window, came)))
            if batch.error_file_id:
                self._guide.call(self._download(batch.error_file_id, path))
                with path.open("rb") as lines:
                    for line in lines:
                        self._error(line, came)
        amount = came.nano_usd if self._guide.has_price else None
        self._guide.meter.settle(order.call, amount, came.usage, calls=order.requests, answered=came.answered)
        self._orders.end(order.id)
        if missing := order.requests - came.texts:
            told = "; ".join(f"{kind}: {count}" for kind, count in came.failed.most_common(_SHOWN))
            why = told or "no reason given"
            self._guide.notify(f"batch {batch.id} ({batch.status}): {missing} of {order.requests} without text ({why})")
        if batch.status == "failed" and not came.answered:
            errors = batch.errors.data if batch.errors and batch.errors.data else []
            said = errors[0].message if errors else "no reason given"
            raise RlgfError(f"the server refused batch {batch.id}: {said}", hint="collect without --batch")

    async def _download(self, file_id: str, path: Path) -> None:
        async with self._client.files.with_streaming_response.content(file_id) as response:
            await response.stream_to_file(path)

    def _texts(self, id_: str, lines: list[bytes], came: _Came) -> Iterator[tuple[bytes, Text]]:
        """What lines of the output are to be kept as; what came is counted, and paid for, whatever it is worth."""
        guide = self._guide
        replies = {}
        for line in lines:
            try:
                value = json.loads(line)
                key, response = bytes.fromhex(value["custom_id"]), value["response"]
                status, body = response["status_code"], response["body"]
            except (ValueError, KeyError, TypeError):
                came.failed["malformed"] += 1
                continue
            if status != 200:
                came.failed[f"status {status}"] += 1
                continue
            replies[key] = read_reply(body, guide.endpoint.api)
        for key, (request, size) in self._orders.asked(id_, list(replies)).items():
            usage = replies[key].usage
            limit = json.loads(request)["max_tokens"]
            price = guide.endpoint.cost(**usage) if len(usage) == 2 else guide.endpoint.cost(size, limit)
            came.answered += 1
            came.nano_usd += round((price or 0) * self._share)
            came.usage.update(usage)
            text = guide.text_in(replies[key], request, size, price_share=self._share)
            if isinstance(text, Failure):
                came.failed[text.kind] += 1
            else:
                came.texts += 1
                yield key, text

    def _error(self, line: bytes, came: _Came) -> None:
        """Count why a request was not answered."""
        try:
            value = json.loads(line)
            response, error = value.get("response") or {}, value.get("error") or {}
            status, body = response.get("status_code"), response.get("body") or {}
            said = error.get("message") or (body.get("error") or {}).get("message") or "no reason given"
        except (ValueError, AttributeError):
            status, said = None, "no reason given"
        why = self._guide.said(RlgfError(str(said)))
        came.failed[why if status is None else f"status {status}: {why}"] += 1


@dataclass
class _Came:
    """What a batch brought: requests that were answered, and texts among the answers."""

    answered: int = 0
    texts: int = 0
    nano_usd: int = 0
    usage: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
