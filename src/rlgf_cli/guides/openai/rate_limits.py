"""Rate limits, back-off, and the handling of outages of an endpoint. Times are in seconds."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import math
import random
import re
import time
from collections.abc import Callable, Mapping

from rlgf_cli.errors import StoppedEarly

BURST_S = 2.0
"""Requests that may be sent at once, as seconds of the rate."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
OUTAGE_AFTER = 10
"""Failures in a row, of any requests, after which the endpoint counts as down."""
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNIT = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def back_off(attempt: int, longest: float = LONGEST_WAIT_S) -> float:
    """Seconds to wait after the ``attempt``-th failure in a row (from 0): doubling, with jitter of one half."""
    return min(longest, FIRST_WAIT_S * 2 ** min(attempt, 20)) * random.uniform(0.5, 1.5)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: ``retry-after-ms``, or ``retry-after`` as seconds or as a date."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        if (seconds := _number(text)) is not None:
            return max(0.0, seconds * unit)
        with contextlib.suppress(ValueError, TypeError, IndexError, OverflowError):  # no date, or one of no calendar
            return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None


def duration(text: str) -> float | None:
    """``6m0s``, ``20ms``, ``1.5s`` or plain seconds as seconds."""
    parts = _DURATION.findall(text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        return sum(float(number) * _UNIT[unit] for number, unit in parts)
    return None if (seconds := _number(text)) is None else max(0.0, seconds)


class Pace:
    """One limit: ``rate`` units a minute (None: unlimited).

    The user's own limit allows a burst of two seconds' worth. Of a limit that the server reports, a minute's worth may
    be used at once: the server counts itself, and reports when nothing is left.
    """

    def __init__(self, rate: float | None) -> None:
        self._own = rate
        self.rate = rate
        self._burst = BURST_S
        self._due = 0.0

    def learn(self, reported: float) -> None:
        """Take over the limit that the server reports, unless the user's own is lower."""
        if reported > 0:
            lower = self._own is None or reported < self._own
            self.rate, self._burst = (reported, 60.0) if lower else (self._own, BURST_S)

    def take(self, units: float) -> float:
        """Reserve units; returns how long to wait before they may be used."""
        if self.rate is None:
            return 0.0
        now = time.monotonic()
        self._due = max(self._due, now - self._burst)
        wait = self._due - now
        self._due += units * 60.0 / self.rate
        return max(0.0, wait)

    def give_back(self, units: float) -> None:
        """Give back units that were reserved and not used."""
        if self.rate is not None:
            self._due -= units * 60.0 / self.rate


class RateLimiter:
    """Delays the requests to an endpoint, and learns from their outcomes; used in one event loop.

    After a 429 no request is sent until the time that the server gives, or for a time that doubles. After
    :data:`OUTAGE_AFTER` failures in a row the endpoint counts as down: one request at a time probes it, all others
    wait, and after ``outage_limit`` seconds all end with :class:`Outage`. They also do where the server asks to wait
    for longer than that and than :data:`LONGEST_WAIT_S`.
    """

    def __init__(
        self,
        *,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        outage_limit: float,
        notify: Callable[[str], None],
    ) -> None:
        self.requests = Pace(requests_per_minute)
        self.tokens = Pace(tokens_per_minute)
        self._outage_limit = outage_limit
        self._notify = notify
        self._closed_until = 0.0
        self._limited = 0  # 429s in a row
        self._failed = 0  # failures in a row
        self._heard = 0.0  # when the server last answered
        self._failing_since = 0.0
        self._last_failure = ""
        self._probing = False
        self._probes = 0  # that failed
        self.down = False

    async def enter(self, tokens: float) -> bool:
        """Wait until a request may be sent. Returns whether it is the one that probes a server that is down.

        Raises Outage where the server has been down for too long.
        """
        await asyncio.sleep(max(self.requests.take(1.0), self.tokens.take(tokens)))
        while True:
            if self.down:
                self._give_up_in_time()
                if not self._probing:
                    self._probing = True
                    try:
                        await asyncio.sleep(self._until_open(back_off(self._probes, 30.0)))
                    except asyncio.CancelledError:
                        self.left()
                        raise
                    return True
                await asyncio.sleep(0.05)
                continue
            if (wait := self._closed_until - time.monotonic()) <= 0:
                return False
            if wait > max(self._outage_limit, LONGEST_WAIT_S):
                raise Outage(f"the guide asks to wait for {wait:.0f} s", hint="--resume goes on after that time")
            await asyncio.sleep(wait)

    def _until_open(self, wait: float) -> float:
        left = self._failing_since + self._outage_limit - time.monotonic()
        return max(0.0, min(wait, left))

    def _give_up_in_time(self) -> None:
        lasts = time.monotonic() - self._failing_since
        if lasts >= self._outage_limit:
            raise Outage(
                f"the guide has been down for {lasts:.0f} s ({self._last_failure})",
                hint="--resume goes on when it is up again; guide.outage_limit_s says how long to wait",
            )

    def answered(self, headers: Mapping[str, str], unused_tokens: float = 0.0) -> None:
        """Note an answer; its headers may report the server's limits."""
        self._up()
        self._limited = 0
        self.tokens.give_back(unused_tokens)
        self._learn(headers)

    def limited(self, headers: Mapping[str, str]) -> float:
        """Note a 429: nothing is sent until the time that the server gives, or for a while. Returns the wait."""
        self._up()
        requested = retry_after(headers)
        wait = requested or back_off(self._limited)  # a wait of zero just after a refusal is ignored
        # several 429s of one burst are one event: only what is sent after the wait counts further
        if time.monotonic() >= self._closed_until:
            self._limited += 1
        self._closed_until = max(self._closed_until, time.monotonic() + wait)
        self._learn(headers)
        return wait

    def failed(self, why: str, *, counts: bool = True, sent: float | None = None) -> bool:
        """Note a 5xx, a timeout or a broken connection; ``counts``: it may be the sign of an outage.

        A request that was ``sent`` (by the monotonic clock) before the last answer does not count: with many requests
        in flight, a few failures would look like an outage. Returns whether the request is to blame: not in an outage.
        """
        counts = counts and (sent is None or sent >= self._heard)
        self._last_failure = why
        if not counts and not self.down:
            return True
        self._failed += 1
        if self._failed == OUTAGE_AFTER:
            self.down, self._probes, self._failing_since = True, 0, time.monotonic()
            self._notify(f"the guide does not answer ({why}); waiting for it, at most {self._outage_limit:g} s")
        return not self.down

    def left(self) -> None:
        """Note that the probing request has ended: another one may probe."""
        self._probing = False
        self._probes += self.down

    def _up(self) -> None:
        self._heard = time.monotonic()
        if self.down:
            self._notify(f"the guide answers again after {time.monotonic() - self._failing_since:.0f} s")
        self.down = self._probing = False
        self._failed = 0

    def _learn(self, headers: Mapping[str, str]) -> None:
        for pace, name in ((self.requests, "requests"), (self.tokens, "tokens")):
            if (limit := _number(headers.get(f"x-ratelimit-limit-{name}"))) is not None:
                pace.learn(limit)
            if _number(headers.get(f"x-ratelimit-remaining-{name}")) == 0:
                reset = duration(headers.get(f"x-ratelimit-reset-{name}", ""))
                if reset:
                    self._closed_until = max(self._closed_until, time.monotonic() + min(reset, LONGEST_WAIT_S))


class Outage(StoppedEarly):
    """The endpoint was down for longer than ``guide.outage_limit_s``."""


def _number(text: str | None) -> float | None:
    """A finite number in a header."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
