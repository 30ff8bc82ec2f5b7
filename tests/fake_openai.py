"""A small OpenAI-like server on 127.0.0.1 that follows a test's plan and counts its requests.

A plan is a function ``(n, request) -> Reply``: ``n`` counts requests from 0, ``request`` is the request.
Without a plan every request is answered with a text made from its prompt and seed, so that equal requests
get equal texts. ``Reply`` can also misbehave: another status, a raw body, a delay, a dropped connection;
:func:`misbehaviour` plans that by seed, :func:`lengths` plans texts of seeded lengths.

The server's own :class:`Ledger` says of every request how often it came, how each time ended and what that
cost; requests, replies and the ledger are in fake_calls.py, the Batch API is in fake_batches.py. As a
program it runs in a process of its own, prints its URL, and gives its ledger at ``GET /ledger``:

    python tests/fake_openai.py --port 0 --faults 1 --share 0.05 --prices 1 2
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fake_batches import Batches
from fake_calls import FLAWED, UNKNOWN, WHOLE, Asked, Call, Ledger, Limits, Plan, Reply, Request
from server_process import server_process

__all__ = [
    "FLAWED", "KINDS", "UNKNOWN", "WHOLE", "Asked", "Call", "FakeOpenAI", "Ledger", "Limits", "Plan", "Reply",
    "Request", "fraction", "in_a_process", "lengths", "misbehaviour", "text_for",
]  # fmt: skip


def fraction(*key: object) -> float:
    """A number in [0, 1) that is fixed by the key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") / 2**64


def text_for(request: Request) -> str:
    """A text that is fixed by prompt and seed."""
    digest = hashlib.sha256(f"{request.prompt}|{request.body.get('seed')}".encode()).hexdigest()
    return f"answer {digest[:8]}"


def lengths(seed: int) -> Plan:
    """Texts of 1 to the asked number of words (a word is a token here), fixed by ``seed`` and the request."""

    def plan(n: int, request: Request) -> Reply:
        digest = text_for(request).split()[-1]
        count = 1 + int(fraction(seed, request.key) * request.limit)
        words = [digest, *(f"w{i}" for i in range(1, count))]
        return Reply(text=" ".join(words), finish_reason="length" if count == request.limit else "stop")

    return plan


KINDS = (
    "429_retry_after", "429", "500", "503", "hang", "drop", "half_body", "invalid_json", "no_choice", "wrong_model",
)  # fmt: skip


class Misbehaviour:
    """A plan in which each of ``kinds`` happens to a ``share`` of the requests; see :func:`misbehaviour`."""

    def __init__(
        self, seed: int, share: float, kinds: Sequence[str], hang_s: float, retry_after: str, otherwise: Plan
    ) -> None:
        if unknown := set(kinds) - set(KINDS):
            raise ValueError(f"unknown kinds: {sorted(unknown)}")
        self.seed, self.share, self.kinds, self.otherwise = seed, share, tuple(kinds), otherwise
        self.happened: Counter[str] = Counter()
        self._replies = {
            "429_retry_after": Reply(status=429, headers={"Retry-After": retry_after}),
            "429": Reply(status=429),
            "500": Reply(status=500),
            "503": Reply(status=503),
            "hang": Reply(delay_s=hang_s, drop=True),
            "drop": Reply(drop=True),
            "half_body": Reply(raw=b'{"id": "x", "choices": [{"index": 0, "mess', claimed_length=500),
            "invalid_json": Reply(raw=b'{"id": "x", "choices": [{"index": 0, "mess'),
            "no_choice": Reply(body={"choices": []}),
            "wrong_model": Reply(body={"model": "somebody-else"}),
        }
        self._times: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, n: int, request: Request) -> Reply:
        with self._lock:
            time_ = self._times[request.key]
            self._times[request.key] += 1
        which = int(fraction(self.seed, request.key, time_) / self.share) if self.share else len(self.kinds)
        kind = self.kinds[which] if which < len(self.kinds) else "fine"
        with self._lock:
            self.happened[kind] += 1
        return self._replies.get(kind) or self.otherwise(n, request)


def misbehaviour(
    seed: int,
    share: float = 0.05,
    kinds: Sequence[str] = KINDS,
    *,
    hang_s: float = 30.0,
    retry_after: str = "1",
    otherwise: Plan | None = None,
) -> Misbehaviour:
    """Each kind of fault with this share; the rest is answered as ``otherwise`` plans.

    What happens is fixed by ``seed``, the request, and how often this request has come before: neither the
    order of the requests nor their concurrency changes it. ``hang_s`` must be longer than the client waits.
    """
    return Misbehaviour(seed, share, kinds, hang_s, retry_after, otherwise or (lambda n, request: Reply()))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # many clients connect at once; a full queue would reset some of them

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed is no error
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class FakeOpenAI:
    """``with FakeOpenAI(plan) as server``: ``server.url``, ``server.requests``, ``server.ledger``.

    ``model`` is the model that answers report; None is the one asked for with a date. ``prices`` are those of
    the ledger; ``batches`` is the Batch API.
    """

    def __init__(
        self,
        plan: Plan | None = None,
        model: str | None = None,
        *,
        prices: tuple[float, float] = (0.0, 0.0),
        limits: Limits | None = None,
        port: int = 0,
    ) -> None:
        self.plan: Plan = plan or (lambda n, request: Reply())
        self.model = model
        self.requests: list[Request] = []
        self.ledger = Ledger(prices)
        self.limits = limits
        self.batches = Batches(self)
        self.connections = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> FakeOpenAI:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def enter(self, request: Request) -> int:
        """Record a request; returns its number."""
        with self._lock:
            self.requests.append(request)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            return len(self.requests) - 1

    def leave(self) -> None:
        with self._lock:
            self.in_flight -= 1

    def body(self, request: Request, reply: Reply) -> dict[str, Any]:
        """The JSON of an answer. A text is cut at the requested number of words, unless it was planned."""
        if reply.status != 200:
            return {"error": reply.error or {"message": f"planned status {reply.status}", "code": None, "type": "x"}}
        words = (text_for(request) if reply.text is None else reply.text).split(" ")
        cut = reply.text is None and len(words) > request.limit
        text = " ".join(words[: request.limit] if cut else words)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if cut else reply.finish_reason}
        if request.chat:
            choice["message"] = {"role": "assistant", "content": text, **reply.message}
        else:
            choice["text"] = text
        prompt_tokens, completion_tokens = len(request.prompt.split()), len(text.split())
        whole = {
            "id": "x",
            "object": "chat.completion" if request.chat else "text_completion",
            "created": 0,
            "model": self.reported(request),
            "choices": [choice],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
            **reply.body,
        }
        return {key: value for key, value in whole.items() if value is not None}

    def reported(self, request: Request) -> str:
        return self.model or f"{request.body.get('model')}-0613"


def _handler(server: FakeOpenAI) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # headers and body leave in one packet

        def setup(self) -> None:
            super().setup()
            server.connections += 1

        def do_GET(self) -> None:
            if self.path == "/ledger":
                self._send(Reply(raw=json.dumps(server.ledger.json()).encode()))
            else:
                self._send(server.batches.answer("GET", self.path, {}, b""))

        def do_DELETE(self) -> None:
            self._send(server.batches.answer("DELETE", self.path, {}, b""))

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            if not self.path.endswith("/completions"):
                self._send(server.batches.answer("POST", self.path, headers, data))
                return
            request = Request(self.path, json.loads(data), headers)
            number, call = server.enter(request), server.ledger.open(request)
            try:
                self._answer(request, call, self._limited(request) or server.plan(number, request))
            finally:
                server.leave()

        def _limited(self, request: Request) -> Reply | None:
            self.limits: dict[str, str] = {}
            if server.limits is None:
                return None
            wait, self.limits = server.limits.take(len(request.prompt.split()) + request.limit)
            return Reply(status=429, headers={"Retry-After": f"{wait:.3f}"}) if wait else None

        def _answer(self, request: Request, call: Call, reply: Reply) -> None:
            if reply.delay_s:
                server.closing.wait(reply.delay_s)
            answer = server.body(request, reply)
            if not self._send(replace(reply, headers={**self.limits, **reply.headers}), answer):
                return
            if reply.raw is not None and reply.status == 200:
                with contextlib.suppress(ValueError):
                    server.ledger.close(call, 200, json.loads(reply.raw))
            else:
                related = answer.get("model") == server.reported(request)
                server.ledger.close(call, reply.status, answer, related)

        def _send(self, reply: Reply, answer: object = None) -> bool:
            """Whether all of it was sent."""
            if reply.drop:
                self.close_connection = True
                return False
            data = reply.raw if reply.raw is not None else json.dumps(answer).encode()
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(reply.claimed_length or len(data)))
                self.end_headers()
                self.wfile.write(data)
                self.wfile.flush()
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client was killed, or gave up
                return False
            if reply.claimed_length:
                self.close_connection = True
            return not reply.claimed_length

        def log_message(self, *_: object) -> None:
            """Write nothing to stderr, which tests read."""

    return Handler


@contextlib.contextmanager
def in_a_process(*arguments: str) -> Iterator[str]:
    """This server in a process of its own, started with the program's arguments; yields its URL."""
    with server_process(__file__, *arguments) as url:
        yield url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0: any that is free; the URL is printed")
    parser.add_argument("--faults", type=int, help="seed of the faults; without it there are none")
    parser.add_argument("--share", type=float, default=0.05, help="of each kind of fault")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of faults, with commas")
    parser.add_argument("--hang", type=float, default=30.0, help="seconds that a hang lasts")
    parser.add_argument("--lengths", type=int, help="seed of the lengths; without it every text has two words")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds until an answer")
    parser.add_argument("--prices", type=float, nargs=2, default=(0.0, 0.0), help="USD per million tokens, in and out")
    parser.add_argument("--polls", type=int, default=2, help="of a batch until it is complete")
    options = parser.parse_args()
    texts: Plan = lengths(options.lengths) if options.lengths is not None else lambda n, request: Reply()

    def plan(n: int, request: Request) -> Reply:
        return replace(texts(n, request), delay_s=options.delay)

    faults = misbehaviour(
        options.faults or 0, options.share, options.kinds.split(","), hang_s=options.hang, otherwise=plan
    )
    with FakeOpenAI(plan if options.faults is None else faults, prices=options.prices, port=options.port) as server:
        server.batches.polls = options.polls
        print(server.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.closing.wait()


if __name__ == "__main__":
    main()
