"""Requests and replies of a fake server, its ledger of each call's end and cost, its rate limits."""

from __future__ import annotations

import json
import math
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


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

    @property
    def limit(self) -> int:
        """The most tokens that the answer may have; OpenAI's own default where the request does not say."""
        return self.body.get("max_completion_tokens", self.body.get("max_tokens", 16))

    @property
    def key(self) -> str:
        """Equal for equal requests, whatever their headers and the order of their keys."""
        return f"{self.path} {json.dumps(self.body, sort_keys=True)}"


@dataclass(frozen=True)
class Reply:
    """The server's reaction. ``raw`` replaces the whole body; ``body`` changes top-level keys (None: drop), ``message``
    those of a chat answer's message."""

    text: str | None = None
    finish_reason: str | None = "stop"
    status: int = 200
    error: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)
    message: dict[str, Any] = field(default_factory=dict)
    raw: bytes | None = None
    claimed_length: int | None = None
    delay_s: float = 0.0
    drop: bool = False


Plan = Callable[[int, Request], Reply]


WHOLE, FLAWED, UNKNOWN = "whole", "flawed", "unknown"


@dataclass
class Call:
    """One call.

    ``end`` is WHOLE (a text was sent to the last byte), FLAWED (so was the answer, which has a price, but no
    usable text), a status such as "429", or UNKNOWN: nobody but the server can know what it did. ``price`` is
    that of the answer's usage, 0 for a status and None where no usage was sent. ``bound``: the most that the
    request can cost, with a token for each byte, 16 more for each message, and the longest answer.
    """

    bound: float
    end: str = UNKNOWN
    price: float | None = None

    @property
    def charge(self) -> float:
        """The charge of a careful client: the reported price, else the bound."""
        return self.bound if self.price is None else self.price


@dataclass(frozen=True)
class Asked:
    """All calls with one request."""

    request: Request
    calls: list[Call] = field(default_factory=list)

    @property
    def ends(self) -> list[str]:
        return [call.end for call in self.calls]


class Ledger:
    """Every call with its end and cost. ``prices``: US dollars per million tokens of input and output."""

    def __init__(self, prices: tuple[float, float] = (0.0, 0.0)) -> None:
        self.prices = prices
        self._asked: dict[str, Asked] = {}
        self._lock = threading.Lock()

    def open(self, request: Request, discount: float = 1.0) -> Call:
        """Record a call; until it is closed its end is unknown."""
        texts = [m["content"] for m in request.body["messages"]] if request.chat else [request.body["prompt"]]
        tokens = sum(len(text.encode()) + 16 for text in texts)
        call = Call(discount * self._cost(tokens, request.limit))
        with self._lock:
            self._asked.setdefault(request.key, Asked(request)).calls.append(call)
        return call

    def close(self, call: Call, status: int, answer: object, related: bool = True, discount: float = 1.0) -> None:
        """Record the end of a call whose last byte was sent. ``related``: the reported model is the one asked for."""
        if status != 200:
            call.end, call.price = str(status), 0.0
        elif isinstance(answer, dict):
            usage = answer.get("usage")
            if usage:
                call.price = discount * self._cost(usage["prompt_tokens"], usage["completion_tokens"])
            call.end = WHOLE if answer.get("choices") and related else FLAWED

    def _cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prices[0] + completion_tokens * self.prices[1]) / 1e6

    def all(self) -> list[Asked]:
        with self._lock:
            return [Asked(asked.request, list(asked.calls)) for asked in self._asked.values()]

    def calls(self) -> list[Call]:
        return [call for asked in self.all() for call in asked.calls]

    def json(self) -> list[dict[str, Any]]:
        return [
            {"path": a.request.path, "body": a.request.body, "calls": [vars(call) for call in a.calls]}
            for a in self.all()
        ]

    @classmethod
    def of(cls, url: str) -> Ledger:
        """The ledger of a server in another process, as it is now."""
        parts = urlsplit(url)
        with urllib.request.urlopen(f"{parts.scheme}://{parts.netloc}/ledger", timeout=30) as answer:
            rows = json.load(answer)
        ledger = cls()
        for row in rows:
            request = Request(row["path"], row["body"], {})
            ledger._asked[request.key] = Asked(request, [Call(**call) for call in row["calls"]])
        return ledger


class Limits:
    """Requests and tokens per minute, stated in the headers of every answer and, with ``enforce``, enforced."""

    def __init__(
        self, requests: int | None = None, tokens: int | None = None, *, minute_s: float = 60.0, enforce: bool = False
    ) -> None:
        self.enforce = enforce
        self._sizes = {name: size for name, size in (("requests", requests), ("tokens", tokens)) if size}
        self._left = {name: float(size) for name, size in self._sizes.items()}
        self._minute_s = minute_s
        self._then = time.monotonic()
        self._lock = threading.Lock()

    def take(self, tokens: int) -> tuple[float, dict[str, str]]:
        """Seconds until the request may be sent again (0: it is accepted), and the headers."""
        with self._lock:
            now = time.monotonic()
            for name, size in self._sizes.items():
                self._left[name] = min(size, self._left[name] + size * (now - self._then) / self._minute_s)
            self._then = now
            wanted = {name: 1 if name == "requests" else min(tokens, size) for name, size in self._sizes.items()}
            short = [(wanted[n] - self._left[n]) / size * self._minute_s for n, size in self._sizes.items()]
            wait = max([0.0, *short]) if self.enforce else 0.0
            headers = {}
            for name, size in self._sizes.items():
                if not wait:
                    self._left[name] = max(0.0, self._left[name] - wanted[name])
                full_in = (size - self._left[name]) / size * self._minute_s
                headers[f"x-ratelimit-limit-{name}"] = str(size)
                headers[f"x-ratelimit-remaining-{name}"] = str(int(self._left[name]))
                headers[f"x-ratelimit-reset-{name}"] = duration(full_in)
            return wait, headers


def duration(seconds: float) -> str:
    """As OpenAI writes it: 12ms, 6.5s, 1m2s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}m{rest:.0f}s" if minutes else f"{rest:g}s"
