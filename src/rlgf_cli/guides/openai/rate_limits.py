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

from rlgf_cli import signals
from rlgf_cli.errors import Interrupted, StoppedEarly

BURST_S = 2.0
"""Requests that may be sent at once, as seconds of the rate."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
_SLICE_S = 0.25
UNREACHED_S = 8.0
"""Seconds after which an endpoint that was never reached is given up: the address is wrong, or no server is there."""
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
    wait, and after ``outage_limit`` seconds all end with :class:`Outage`. They also do after as many seconds of nothing
    but 429s, and where the server asks to wait for longer than that and than :data:`LONGEST_WAIT_S`. After a signal
    that asks the command to end, all that wait are Interrupted.
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
        self._closed_until = -math.inf
        self._limited = 0  # 429s in a row
        self._limited_since = -math.inf  # the first 429 since the last answer
        self._limited_until = -math.inf  # the end of the last 429's wait
        self._given_up: Outage | None = None
        self._reached = False  # whether a connection was ever made
        self._unreached_since: float | None = None
        self._failed = 0  # failures in a row
        self._heard = 0.0  # when the server last answered
        self._failing_since = 0.0
        self._last_failure = ""
        self._probing = False
        self._probes = 0  # that failed
        self.down = False

    async def enter(self, tokens: float) -> bool:
        """Wait until a request may be sent. Returns whether it is the one that probes a server that is down.

        Raises Outage where the server has been down, or has limited all requests, for too long.
        """
        await pause(max(self.requests.take(1.0), self.tokens.take(tokens)))
        while True:
            if self._given_up is not None:
                raise self._given_up
            if self.down:
                self._give_up_in_time()
                if not self._probing:
                    self._probing = True
                    try:
                        await pause(self.until_given_up(back_off(self._probes, 30.0)))
                    except BaseException:
                        self.left()
                        raise
                    return True
                await pause(0.05)
                continue
            if (wait := self._closed_until - time.monotonic()) <= 0:
                return False
            if wait > max(self._outage_limit, LONGEST_WAIT_S):
                why = f"the guide asks to wait for {wait:.0f} s ({self._last_failure})"
                raise Outage(why, hint="--resume goes on after that time")
            await pause(wait)

    def until_given_up(self, wait: float) -> float:
        """``wait``; where that is less, the time until a server that is down or was never reached is given up."""
        left = self._failing_since + self._outage_limit - time.monotonic() if self.down else math.inf
        if self._unreached_since is not None:
            left = min(left, self._unreached_since + UNREACHED_S - time.monotonic())
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
        self._limited, self._limited_since = 0, -math.inf
        self.tokens.give_back(unused_tokens)
        self._learn(headers)

    def limited(self, headers: Mapping[str, str], why: str = "status 429") -> float:
        """Note a 429: nothing is sent until the time that the server gives, or for a while. Returns the wait.

        ``why``: the server's words. After ``outage_limit`` seconds of nothing but 429s all requests are given up.
        """
        self._up()
        now = time.monotonic()
        self._last_failure = why
        quiet = now - self._limited_until
        if self._limited_since == -math.inf or quiet > LONGEST_WAIT_S:  # nothing was requested in so long a time
            self._limited_since = now
        if quiet > LONGEST_WAIT_S:  # else the last message holds on
            self._notify(
                f"the guide limits the requests ({why}); waiting as it asks, at most {self._outage_limit:g} s without "
                "an answer"
            )
        lasts = now - self._limited_since
        requested = retry_after(headers)
        wait = requested or back_off(self._limited)  # a wait of zero just after a refusal is ignored
        if not requested and lasts < self._outage_limit:
            wait = min(wait, self._outage_limit - lasts)
        # several 429s of one burst are one event: only what is sent after the wait counts further
        if now >= self._closed_until:
            if self._limited and lasts >= self._outage_limit:
                self._given_up = Outage(
                    f"the guide has answered with nothing but status 429 for {lasts:.0f} s ({why})",
                    hint="--resume goes on when it has room again; guide.outage_limit_s says how long to wait",
                )
            self._limited += 1
        self._closed_until = max(self._closed_until, now + wait)
        self._limited_until = now + wait
        self._learn(headers)
        return wait

    def failed(self, why: str, *, counts: bool = True, sent: float | None = None, connected: bool = True) -> bool:
        """Note a 5xx, a timeout or a broken connection; ``counts``: it may be the sign of an outage.

        A request that was ``sent`` (by the monotonic clock) before the last answer does not count: with many requests
        in flight, a few failures would look like an outage. Returns whether the request is to blame: not in an outage.
        Raises Unreached where for :data:`UNREACHED_S` no request was ever ``connected``.
        """
        now = time.monotonic()
        if connected:
            self._reached, self._unreached_since = True, None
        elif not self._reached:
            self._unreached_since = now if self._unreached_since is None else self._unreached_since
            if now >= self._unreached_since + UNREACHED_S:
                raise Unreached
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
        self._reached, self._unreached_since = True, None
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
    """The endpoint was down, or limited all requests, for longer than ``guide.outage_limit_s``."""


class Unreached(Exception):
    """No connection to the endpoint was ever made."""


async def pause(seconds: float) -> None:
    """Sleep. Raises Interrupted as soon as a signal asks the command to end: a request that waits is not in flight."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if signals.received() is not None:
            raise Interrupted("a request waited for the guide", hint="--resume goes on from there")
        await asyncio.sleep(min(left, _SLICE_S))


def _number(text: str | None) -> float | None:
    """A finite number in a header."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
