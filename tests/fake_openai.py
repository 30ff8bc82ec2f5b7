"""A small OpenAI-like server on 127.0.0.1 that does what the test's plan says, and counts what it was asked.

A plan is a function ``(n, request) -> Reply``: ``n`` counts requests from 0, ``request`` is what came.
Without a plan every request is answered with a text made from its prompt and seed, so that equal requests
get equal texts. ``Reply`` can also misbehave: another status, a raw body, a delay, a dropped connection.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    """One request as the server saw it; names of headers in lower case."""

    path: str
    body: dict[str, Any]
    headers: Mapping[str, str]

    @property
    def chat(self) -> bool:
        return self.path.endswith("/chat/completions")

    @property
    def prompt(self) -> str:
        """The completion prompt, or the last message of a chat."""
        return self.body["messages"][-1]["content"] if self.chat else self.body["prompt"]


@dataclass(frozen=True)
class Reply:
    """What the server does. ``raw`` replaces the whole body; ``body`` changes top-level keys (None: drop)."""

    text: str | None = None
    finish_reason: str | None = "stop"
    status: int = 200
    error: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)
    raw: bytes | None = None
    claimed_length: int | None = None
    delay_s: float = 0.0
    drop: bool = False


Plan = Callable[[int, Request], Reply]


def text_for(request: Request) -> str:
    """A text that is fixed by prompt and seed."""
    digest = hashlib.sha256(f"{request.prompt}|{request.body.get('seed')}".encode()).hexdigest()
    return f"answer {digest[:8]}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # many clients connect at once; a full queue would reset some of them


class FakeOpenAI:
    """``with FakeOpenAI(plan) as server``: ``server.url``, ``server.requests``, ``server.connections``."""

    def __init__(self, plan: Plan | None = None, model: str = "fake-model-0613") -> None:
        self.plan: Plan = plan or (lambda n, request: Reply())
        self.model = model
        self.requests: list[Request] = []
        self.connections = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> FakeOpenAI:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def enter(self, request: Request) -> int:
        """Note a request; returns its number."""
        with self._lock:
            self.requests.append(request)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            return len(self.requests) - 1

    def leave(self) -> None:
        with self._lock:
            self.in_flight -= 1

    def body(self, request: Request, reply: Reply) -> dict[str, Any]:
        """The JSON of an answer."""
        if reply.status != 200:
            return {"error": reply.error or {"message": f"planned status {reply.status}", "code": None, "type": "x"}}
        text = text_for(request) if reply.text is None else reply.text
        choice: dict[str, Any] = {"index": 0, "finish_reason": reply.finish_reason}
        if request.chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        whole = {
            "id": "x",
            "object": "chat.completion" if request.chat else "text_completion",
            "created": 0,
            "model": self.model,
            "choices": [choice],
            "usage": {
                "prompt_tokens": len(request.prompt.split()),
                "completion_tokens": len(text.split()),
                "total_tokens": len(request.prompt.split()) + len(text.split()),
            },
            **reply.body,
        }
        return {key: value for key, value in whole.items() if value is not None}


def _handler(server: FakeOpenAI) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # headers and body leave in one packet

        def setup(self) -> None:
            super().setup()
            server.connections += 1

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = Request(self.path, body, {name.lower(): value for name, value in self.headers.items()})
            number = server.enter(request)
            try:
                self._answer(request, server.plan(number, request))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client was killed, or gave up
            finally:
                server.leave()

        def _answer(self, request: Request, reply: Reply) -> None:
            if reply.delay_s:
                time.sleep(reply.delay_s)
            if reply.drop:
                self.close_connection = True
                return
            data = reply.raw if reply.raw is not None else json.dumps(server.body(request, reply)).encode()
            self.send_response(reply.status)
            for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(reply.claimed_length or len(data)))
            self.end_headers()
            self.wfile.write(data)
            if reply.claimed_length:
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Nothing on stderr: tests look at it."""

    return Handler
