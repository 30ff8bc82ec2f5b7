"""A chat endpoint with almost no cost of its own, so that a benchmark against it measures the client.

    python benchmarks/fake_endpoint.py [--port 0] [--latency 0.2] [--limit 64] [--model m-0613]

Prints its URL. At most ``--limit`` requests are worked on at a time, for ``--latency`` seconds each; the others
wait. Every answer is the same text with another number. GET /stats gives the requests answered, the most that
were in flight, and the seconds from the first request to the last answer, and starts them again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import time
from collections import deque

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Endpoint:
    """The requests of all connections."""

    def __init__(self, latency: float, limit: int, model: str) -> None:
        self.latency, self.limit = latency, limit
        self._body = json.dumps(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": model,
                "choices": [
                    {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "answer NUMBER"}}
                ],
                "usage": {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17},
            }
        ).encode()
        self._count = 0
        self._waiting: deque[Connection] = deque()
        self._active = 0
        self._fresh()

    def _fresh(self) -> None:
        self._answered = self._most = 0
        self._first = self._last = 0.0

    def take(self, connection: Connection) -> None:
        self._first = self._first or time.monotonic()
        if self._active >= self.limit:
            self._waiting.append(connection)
            return
        self._active += 1
        self._most = max(self._most, self._active)
        if self.latency:
            asyncio.get_running_loop().call_later(self.latency, self._finish, connection)
        else:
            self._finish(connection)

    def _finish(self, connection: Connection) -> None:
        self._active -= 1
        self._count += 1
        self._answered += 1
        self._last = time.monotonic()
        connection.send(self._body.replace(b"NUMBER", b"%08d" % self._count))
        if self._waiting:
            self.take(self._waiting.popleft())

    def stats(self) -> bytes:
        found = {"answered": self._answered, "most_in_flight": self._most, "seconds": self._last - self._first}
        self._fresh()
        return json.dumps(found).encode()


class Connection(asyncio.Protocol):
    """One client's connection: requests one after another."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self._data, 0, end)
            size = end + 4 + (int(length[1]) if length else 0)
            if len(self._data) < size:
                return
            head, self._data = self._data[:4], self._data[size:]
            if head == b"GET ":
                self.send(self._endpoint.stats())
            else:
                self._endpoint.take(self)

    def send(self, body: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )


async def serve(port: int, endpoint: Endpoint) -> None:
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(endpoint), "127.0.0.1", port, backlog=1024
    )
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.2)
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--model", default="m-0613")
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(options.port, Endpoint(options.latency, options.limit, options.model)))


if __name__ == "__main__":
    main()
