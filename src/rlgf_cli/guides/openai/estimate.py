"""Estimates of the tokens, the price and the time of requests, before any is sent."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, pvariance
from typing import Any

from rlgf_cli.ledger.meter import usd
from rlgf_cli.protocols import Guide, GuideRequest

_ENOUGH = 20
"""From this number of cached texts of a guide on, its own figures are used."""
_BYTES_PER_TOKEN = (2.0, 4.0, 6.0)
"""Bytes of a prompt per token of an unknown guide: most, expected, least tokens."""
_LENGTH_SHARE = (0.05, 0.5, 1.0)
"""Length of an answer of an unknown guide as a share of the limit: least, expected, most."""
_Z = 1.96
_WINDOW = 500
"""Requests that are looked up in the cache at once."""

Interval = tuple[float, float, float]
"""Low, expected, high."""


@dataclass
class Plan:
    """Sums over the requests that are planned."""

    requests: int = 0
    in_file: int = 0
    cached: int = 0
    prompt_bytes: int = 0
    limit_tokens: int = 0
    reference_bytes: list[int] = field(default_factory=list)
    batch: bool = False

    @classmethod
    def of(cls, guide: Guide, missing: Iterator[GuideRequest], wanted: int, *, cache: bool, batch: bool) -> Plan:
        """The plan for ``wanted`` texts of which ``missing`` are in no file. ``cache``: whether the cache is read."""
        plan, count = cls(requests=wanted, batch=batch), 0
        while window := list(itertools.islice(missing, _WINDOW)):
            count += len(window)
            in_cache = guide.cached(window) if cache else [False] * len(window)
            plan.cached += sum(in_cache)
            for request, cached in zip(window, in_cache, strict=True):
                if not cached:
                    plan.add(guide, request)
        plan.in_file = wanted - count
        return plan

    @property
    def to_ask(self) -> int:
        return self.requests - self.in_file - self.cached

    def scaled(self, requests: int) -> Plan:
        """The plan of so many requests like those of this one."""
        share = requests / max(1, self.requests)
        return replace(
            self,
            requests=requests,
            prompt_bytes=round(self.prompt_bytes * share),
            limit_tokens=round(self.limit_tokens * share),
        )

    def add(self, guide: Guide, request: GuideRequest) -> None:
        """Count a request that has to be sent."""
        self.prompt_bytes += guide.prompt_bytes(request)
        self.limit_tokens += guide.answer_tokens(request)
        if len(self.reference_bytes) < 1000:
            self.reference_bytes += [len(text.encode()) for text in request.example.references[:1]]


def estimate(guide: Guide, plan: Plan) -> dict[str, Any]:
    """Tokens, US dollars and seconds of a plan, each as ``[low, expected, high]``; None where nothing is known.

    The basis is the guide's own texts in the cache where there are enough of them (95 % intervals, normal
    approximation); else the length of the references or of the limit, between wide bounds. ``basis`` says which.
    """
    history = guide.history()
    prompt, completion, basis = _tokens(plan, [row for row in history if None not in row[:3]])
    figures: dict[str, Any] = {
        "requests": plan.requests,
        "in_file": plan.in_file,
        "cached": plan.cached,
        "to_ask": plan.to_ask,
        "prompt_tokens": _whole(prompt),
        "completion_tokens": _whole(completion),
        "basis": basis,
        "usd": None,
        "at_most_usd": None,
        "seconds": None,
    }
    if (each := guide.nano_usd_per_token) is not None:
        per = [(guide.batch_price if plan.batch else 1.0) * price for price in each]
        figures["usd"] = [round(usd(p * per[0] + c * per[1]), 6) for p, c in zip(prompt, completion, strict=True)]
        figures["at_most_usd"] = round(usd(plan.prompt_bytes * per[0] + plan.limit_tokens * per[1]), 6)
    if guide.abilities.remote and not plan.batch:
        took = [row[3] for row in history if row[3]]
        tokens = tuple(p + c for p, c in zip(prompt, completion, strict=True))
        figures["seconds"] = _seconds(guide, plan.to_ask, tokens, took)
    return figures


def _tokens(plan: Plan, history: Sequence[tuple[Any, ...]]) -> tuple[Interval, Interval, str]:
    requests, limit = plan.to_ask, plan.limit_tokens
    if not requests:
        return (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), "no request is needed"
    if len(history) >= _ENOUGH:
        per_byte = [tokens / size for size, tokens, _, _ in history if size]
        each = [float(completion) for _, _, completion, _ in history]
        prompt = _interval([ratio * plan.prompt_bytes / requests for ratio in per_byte], requests)
        low, mid, high = (min(float(limit), value) for value in _interval(each, requests))
        return prompt, (low, mid, high), f"{len(history)} texts of this guide in the cache"
    prompt = (
        plan.prompt_bytes / _BYTES_PER_TOKEN[2],
        plan.prompt_bytes / _BYTES_PER_TOKEN[1],
        plan.prompt_bytes / _BYTES_PER_TOKEN[0],
    )
    low, mid, high = (limit * share for share in _LENGTH_SHARE)
    basis = "the limit of new tokens"
    if plan.reference_bytes:
        mid = min(high, requests * fmean(plan.reference_bytes) / _BYTES_PER_TOKEN[1])
        low, basis = min(low, mid / 2), "the length of the references"
    return prompt, (low, mid, high), f"{basis}; the cache has too few texts of this guide"


def _interval(each: Sequence[float], draws: int) -> Interval:
    """The prediction interval of the sum over ``draws`` new draws, given a sample of them."""
    mean = fmean(each)
    spread = _Z * math.sqrt(pvariance(each) * draws * (1 + draws / len(each)))
    return max(0.0, draws * mean - spread), draws * mean, draws * mean + spread


def _seconds(guide: Guide, requests: int, tokens: tuple[float, ...], took: list[float]) -> list[float] | None:
    """The time at the known limits: the longest of those of the rates and of the round trips."""
    requests_rate, tokens_rate = guide.rates()
    bounds = [0.0, 0.0, 0.0]
    known = False
    if requests_rate:
        known, bounds = True, [requests * 60 / requests_rate] * 3
    if tokens_rate:
        known, bounds = True, [max(b, t * 60 / tokens_rate) for b, t in zip(bounds, tokens, strict=True)]
    if len(took) >= _ENOUGH:
        known = True
        trips = _interval(took, requests)
        bounds = [max(b, t / guide.abilities.at_once) for b, t in zip(bounds, trips, strict=True)]
    return [round(b, 1) for b in bounds] if known else None


def _whole(interval: Interval) -> list[int]:
    return [round(value) for value in interval]


def lines(figures: dict[str, Any]) -> list[str]:
    """The estimate as lines for the user."""
    text = [
        f"{figures['requests']} texts wanted: {figures['in_file']} in the file, {figures['cached']} in the cache, "
        f"{figures['to_ask']} to request",
        f"tokens in {_span(figures['prompt_tokens'])}, out {_span(figures['completion_tokens'])} "
        f"(from {figures['basis']})",
    ]
    if figures["usd"] is not None:
        text.append(f"cost {_span(figures['usd'], ' USD')}, at most {figures['at_most_usd']:g} USD without retries")
    else:
        text.append("cost unknown: no price is known for this guide (guide.usd_per_million_input and _output)")
    if figures["seconds"] is not None:
        text.append(f"time {_span(figures['seconds'], ' s')} at the known rates")
    elif figures["to_ask"]:
        text.append("time unknown: no call of this guide was timed yet (--rpm and --tpm give its limits), or a batch")
    return text


def _span(interval: Sequence[float], unit: str = "") -> str:
    low, mid, high = interval
    return f"{mid:,g}{unit}" if low == high else f"about {mid:,.7g}{unit} ({low:,.7g} to {high:,.7g})"
