"""Rate limits, waiting and outages: by a clock of the test's own, so no test waits for anything."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgf_cli.errors import Interrupted
from rlgf_cli.guides.openai import rate_limits as limits
from rlgf_cli.guides.openai.rate_limits import (
    BURST_S,
    LONGEST_WAIT_S,
    OUTAGE_AFTER,
    UNREACHED_S,
    Outage,
    Pace,
    RateLimiter,
    Unreached,
    back_off,
    duration,
    pause,
)

NOW = 1_700_000_000.0


class Clock:
    """Time that passes only where somebody sleeps: it jumps to the earliest of those who wait."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._sleeping: list[tuple[float, asyncio.Future[None]]] = []

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return NOW + self.now - 1000.0

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await REAL_SLEEP(0)
            return
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleeping.append((self.now + seconds, waiting))
        await waiting

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        main = asyncio.ensure_future(work)
        for _ in range(100_000):
            for _ in range(20):
                await REAL_SLEEP(0)
            if main.done():
                break
            self._sleeping = [(due, waiting) for due, waiting in self._sleeping if not waiting.done()]
            assert self._sleeping, "nobody waits for anything"
            self._sleeping.sort(key=lambda pair: pair[0])
            due, waiting = self._sleeping.pop(0)
            self.now = max(self.now, due)
            waiting.set_result(None)
        main.result()


REAL_SLEEP = asyncio.sleep


class _Asyncio:
    """The module as limits.py sees it."""

    CancelledError = asyncio.CancelledError

    def __init__(self, clock: Clock) -> None:
        self.sleep = clock.sleep


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(limits, "time", made)
    monkeypatch.setattr(limits, "asyncio", _Asyncio(made))
    monkeypatch.setattr(limits.random, "uniform", lambda low, high: 1.0)
    return made


def play(clock: Clock, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(clock.run(work()))


def limiter(**changes: Any) -> tuple[RateLimiter, list[str]]:
    said: list[str] = []
    options = {"requests_per_minute": None, "tokens_per_minute": None, "outage_limit": 300.0, **changes}
    return RateLimiter(notify=said.append, **options), said


# what headers say


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": " 0.25 "}, 0.25),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "-5"}, 0.0),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),  # the finer one
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": formatdate(NOW + 90, usegmt=True)}, 90.0),
        ({"retry-after": formatdate(NOW - 90, usegmt=True)}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "Wed, 21 Oct 99999 07:28:00 GMT"}, None),
        ({"retry-after": "Wed, 77 Oct 2026 07:28:00 GMT"}, None),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 +9999"}, None),
    ],
)
def test_retry_after(clock: Clock, headers: dict[str, str], seconds: float | None) -> None:
    found = limits.retry_after(headers)
    assert found == (None if seconds is None else pytest.approx(seconds))


@given(st.text(max_size=40))
def test_no_header_breaks_anything(text: str) -> None:
    for found in (limits.retry_after({"retry-after": text}), limits.retry_after({"retry-after-ms": text})):
        assert found is None or 0 <= found < float("inf")
    told = duration(text)
    assert told is None or 0 <= told < float("inf")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("6m0s", 360.0), ("20ms", 0.02), ("1.5s", 1.5), ("1h2m3s", 3723.0), ("2d", 172800.0), ("45", 45.0),
        ("0s", 0.0), ("-3", 0.0), ("", None), ("soon", None), ("6m0", None), ("6m 0s", None), ("inf", None),
        ("nan", None),
    ],
)  # fmt: skip
def test_durations(text: str, seconds: float | None) -> None:
    assert duration(text) == (None if seconds is None else pytest.approx(seconds))


def test_back_off_doubles_with_jitter_up_to_a_bound() -> None:
    for attempt in range(30):
        middle = min(LONGEST_WAIT_S, 0.5 * 2**attempt)
        found = [back_off(attempt) for _ in range(50)]
        assert all(0.5 * middle <= wait <= 1.5 * middle for wait in found)
        assert len(set(found)) > 10  # who failed together does not come back together
    assert back_off(10**6, 30.0) <= 45.0


# one limit


def test_a_pace_gives_two_seconds_at_once_and_then_its_rate(clock: Clock) -> None:
    pace = Pace(120)  # two a second
    waits = [pace.take(1) for _ in range(8)]
    burst = int(BURST_S * 2)
    assert waits == pytest.approx([0.0] * (burst + 1) + [0.5, 1.0, 1.5])
    clock.now += 3600  # what was not used in an hour is not there all at once
    assert [pace.take(1) for _ in range(burst + 2)][-2:] == pytest.approx([0.0, 0.5])


@given(st.floats(1, 1e5), st.lists(st.tuples(st.floats(0, 500), st.floats(0, 30)), max_size=40))
def test_a_pace_never_lets_more_through_than_rate_and_burst(rate: float, asks: list[tuple[float, float]]) -> None:
    clock, pace, used = Clock(), Pace(rate), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "time", clock)
        for units, pause in asks:
            used.append((clock.now + pace.take(units), units))
            clock.now += pause
    for at, _ in used:
        before = [units for when, units in used if when < at]
        since = at - used[0][0]
        assert sum(before) <= rate / 60 * (since + BURST_S) * (1 + 1e-9) + max([0.0, *before]) + 1e-6


def test_units_given_back_are_there_for_others(clock: Clock) -> None:
    pace = Pace(600)  # ten a second
    pace.take(120)
    assert pace.take(0) == pytest.approx(10.0)
    pace.give_back(60)
    assert pace.take(0) == pytest.approx(4.0)


def test_a_limit_that_is_learned_and_the_user_s_own(clock: Clock) -> None:
    free, own = Pace(None), Pace(60)
    assert [free.take(1e9) for _ in range(3)] == [0.0] * 3
    free.give_back(5)
    for pace in (free, own):
        pace.learn(600)
        pace.learn(0)
        pace.learn(-1)
    assert (free.rate, own.rate) == (600, 60)  # the lower one of the user's and the server's
    for pace in (free, own):
        pace.learn(30)
    assert (free.rate, own.rate) == (30, 30)
    own.learn(90)  # the server allows more now; the user does not
    assert own.rate == 60


def test_the_gate_learns_from_headers(clock: Clock) -> None:
    door, _ = limiter(requests_per_minute=50)
    door.answered({"x-ratelimit-limit-requests": "100", "x-ratelimit-limit-tokens": "9000"})
    assert (door.requests.rate, door.tokens.rate) == (50, 9000)
    door.limited({"x-ratelimit-limit-requests": "20", "x-ratelimit-limit-tokens": "none"})
    assert (door.requests.rate, door.tokens.rate) == (20, 9000)
    for nonsense in ("", "inf", "nan", "-1", "0", "many"):
        door.answered({"x-ratelimit-limit-requests": nonsense, "x-ratelimit-limit-tokens": nonsense})
    assert (door.requests.rate, door.tokens.rate) == (20, 9000)


def test_requests_come_no_faster_than_the_rates(clock: Clock) -> None:
    door, _ = limiter(requests_per_minute=60, tokens_per_minute=6000)  # one a second, 100 tokens a second
    came: list[float] = []

    async def ask(tokens: float) -> None:
        await door.enter(tokens)
        came.append(clock.now - 1000.0)

    async def work() -> None:
        await asyncio.gather(*[ask(400.0) for _ in range(5)])

    play(clock, work)
    # 400 tokens take four seconds; the first has those that were not used before
    assert came == pytest.approx([0.0, 2.0, 6.0, 10.0, 14.0])


def test_nothing_left_until_a_time_that_the_server_tells(clock: Clock) -> None:
    door, _ = limiter()
    door.answered({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "12s"})
    door.answered({"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "40s"})  # some are left

    async def work() -> None:
        assert not await door.enter(1)
        assert clock.now == pytest.approx(1012.0)

    play(clock, work)
    door.answered({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "9d"})

    async def longest() -> None:
        await door.enter(1)
        assert clock.now == pytest.approx(1012.0 + LONGEST_WAIT_S)  # a reset is no promise to wait that long

    play(clock, longest)


# 429


def test_a_429_closes_for_all_until_the_server_says(clock: Clock) -> None:
    door, _ = limiter()
    came: list[float] = []

    async def ask() -> None:
        assert not await door.enter(1)
        came.append(clock.now)

    async def work() -> None:
        assert door.limited({"retry-after": "7"}) == 7.0
        assert door.limited({"retry-after": "3"}) == 3.0  # the longer one holds
        await asyncio.gather(*[ask() for _ in range(4)])

    play(clock, work)
    assert came == pytest.approx([1007.0] * 4)


def test_429s_without_a_time_wait_longer_each_time_and_a_burst_counts_once(clock: Clock) -> None:
    door, _ = limiter()
    waits = []
    for _ in range(9):
        burst = [door.limited({}) for _ in range(6)]
        assert burst[1:] == [min(LONGEST_WAIT_S, 2 * burst[0])] * 5  # one step for the whole burst
        waits.append(burst[0])
        clock.now = door._closed_until
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    door.answered({})
    assert door.limited({}) == 0.5


def test_at_once_is_not_taken_at_its_word(clock: Clock) -> None:
    """A server that refuses, and says to come back at once, is not asked in a loop."""
    door, _ = limiter()
    for headers in ({"retry-after": "0"}, {"retry-after": formatdate(NOW - 60, usegmt=True)}):
        assert door.limited(headers) >= 0.5
        clock.now = door._closed_until
    assert door.limited({"retry-after": "0"}) == 2.0


def test_a_429_counts_further_where_its_headers_tell_of_a_reset(clock: Clock) -> None:
    door, _ = limiter()
    headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1s"}
    assert door.limited(headers) == 0.5
    clock.now = door._closed_until
    assert door.limited(headers) == 1.0


def test_a_wait_longer_than_an_outage_may_last_is_one(clock: Clock) -> None:
    door, _ = limiter(outage_limit=300.0)

    async def work() -> None:
        door.limited({"retry-after": "299"})
        await door.enter(1)
        assert clock.now == pytest.approx(1299.0)
        door.limited({"retry-after": "86400"})
        with pytest.raises(Outage, match="asks to wait for 86400 s") as caught:
            await door.enter(1)
        assert caught.value.exit_code == 3 and "--resume" in (caught.value.hint or "")
        assert clock.now == pytest.approx(1299.0)

    play(clock, work)


def test_a_short_wait_is_none_however_soon_the_user_gives_up(clock: Clock) -> None:
    door, _ = limiter(outage_limit=0.0)

    async def work() -> None:
        door.limited({"retry-after": "20"})
        await door.enter(1)
        assert clock.now == pytest.approx(1020.0)

    play(clock, work)


def test_lasting_429s_are_said_once_and_given_up(clock: Clock) -> None:
    door, said = limiter(outage_limit=300.0)
    sent: list[float] = []

    async def work() -> None:
        with pytest.raises(Outage, match=r"nothing but status 429 for 300 s \(slow down\)") as caught:
            while True:
                await door.enter(1)
                sent.append(clock.now - 1000.0)
                for _ in range(5):
                    door.limited({}, "slow down")
        assert caught.value.exit_code == 3 and "outage_limit_s" in (caught.value.hint or "")

    play(clock, work)
    assert sent[-1] == pytest.approx(300.0) and len(sent) < 15
    assert len(said) == 1 and "(slow down)" in said[0]


def test_one_answer_begins_the_time_of_429s_anew_without_another_message(clock: Clock) -> None:
    door, said = limiter(outage_limit=100.0)

    async def work() -> None:
        for _ in range(30):
            await door.enter(1)
            door.limited({"retry-after": "9"}, "slow down")
            await door.enter(1)
            door.answered({})

    play(clock, work)
    assert clock.now >= 1270.0 and len(said) == 1


def test_429s_of_an_hour_ago_are_no_lasting_ones(clock: Clock) -> None:
    """In training nobody is asked for a while."""
    door, said = limiter(outage_limit=300.0)

    async def work() -> None:
        door.limited({}, "slow down")
        clock.now += 3600
        await door.enter(1)
        door.limited({}, "slow down")
        await door.enter(1)
        door.answered({})

    play(clock, work)
    assert len(said) == 2


def test_who_waits_ends_with_a_signal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    door, _ = limiter()

    async def work() -> None:
        door.limited({"retry-after": "200"})
        waiting = asyncio.ensure_future(door.enter(1))
        await clock.sleep(10)
        monkeypatch.setattr(limits.signals, "received", lambda: "SIGTERM")
        with pytest.raises(Interrupted):
            await waiting
        assert clock.now < 1011.0

    play(clock, work)


# outages


def test_an_address_that_is_never_reached_is_given_up_soon(clock: Clock) -> None:
    door, _ = limiter()

    async def work() -> None:
        with pytest.raises(Unreached):
            while True:
                await door.enter(1)
                door.failed("refused", connected=False)
                door.left()
                await pause(door.until_given_up(60.0))

    play(clock, work)
    assert clock.now == pytest.approx(1000.0 + UNREACHED_S)


@pytest.mark.parametrize("reached", [lambda d: d.answered({}), lambda d: d.failed("503"), lambda d: d.limited({})])
def test_a_server_that_was_reached_may_be_away_for_longer(clock: Clock, reached: Callable[[RateLimiter], Any]) -> None:
    door, _ = limiter()
    door.failed("refused", connected=False)
    reached(door)
    for _ in range(20):
        clock.now += UNREACHED_S
        door.failed("refused", connected=False)
    assert door.down


def test_failures_in_a_row_open_the_breaker_and_one_answer_closes_it(clock: Clock) -> None:
    door, said = limiter()
    for _ in range(OUTAGE_AFTER - 1):
        assert door.failed("status 503")  # the request is to blame
    door.answered({})
    for _ in range(OUTAGE_AFTER - 1):
        assert door.failed("status 503")
    assert not door.down and said == []
    assert not door.failed("status 503: busy")
    assert door.down and len(said) == 1
    assert "does not answer (status 503: busy)" in said[0] and "at most 300 s" in said[0]
    assert not door.failed("more of it")  # no request is to blame for an outage
    clock.now += 42
    door.answered({})
    assert not door.down and said[1:] == ["the guide answers again after 42 s"]


def test_failures_of_what_was_sent_before_the_last_answer_are_no_outage(clock: Clock) -> None:
    """Two hundred requests under way, of which some fail, are a server with faults and not one that is down."""
    closing, said = limiter(outage_limit=60.0)
    sent = clock.now
    clock.now += 1.0
    closing.answered({})
    for _ in range(3 * OUTAGE_AFTER):
        assert closing.failed("status 503", sent=sent)
    assert not closing.down and not said
    clock.now += 1.0
    for _ in range(OUTAGE_AFTER):
        closing.failed("status 503", sent=clock.now)
    assert closing.down and len(said) == 1


def test_failures_that_do_not_count_are_no_outage(clock: Clock) -> None:
    door, _ = limiter()
    for _ in range(5 * OUTAGE_AFTER):
        assert door.failed("status 500", counts=False)
    assert not door.down


@pytest.mark.parametrize("ends", ["answered", "limited"])
def test_one_at_a_time_tries_and_all_go_on_when_it_is_up(clock: Clock, ends: str) -> None:
    door, _ = limiter()
    trying = most = 0
    probes: list[float] = []
    through = 0

    async def ask() -> None:
        nonlocal trying, most, through
        while True:
            probing = await door.enter(1)
            if not probing:
                through += 1
                return
            trying += 1
            most = max(most, trying)
            probes.append(clock.now)
            await clock.sleep(2.0)
            if len(probes) == 4:
                door.answered({}) if ends == "answered" else door.limited({"retry-after": "1"})
            else:
                door.failed("still down")
            trying -= 1
            door.left()

    async def work() -> None:
        for _ in range(OUTAGE_AFTER):
            door.failed("down")
        await asyncio.gather(*[ask() for _ in range(12)])

    play(clock, work)
    assert most == 1 and len(probes) == 4
    assert through == 12
    pauses = [later - earlier for earlier, later in itertools.pairwise(probes)]
    assert pauses == pytest.approx([3.0, 4.0, 6.0], abs=0.11)  # 2 s each, and 1, 2, 4 s between them


def test_what_was_on_its_way_when_it_went_down_makes_nobody_else_try(clock: Clock) -> None:
    """Sixty-four requests fail one after the other: still one at a time tries, and soon."""
    door, _ = limiter()
    trying = most = 0
    first = 0.0

    async def prober() -> None:
        nonlocal trying, most, first
        if not await door.enter(1):
            return
        trying += 1
        most = max(most, trying)
        first = first or clock.now
        await clock.sleep(1.0)
        door.answered({})
        trying -= 1
        door.left()

    async def fail_late() -> None:
        for _ in range(54):
            await clock.sleep(0.005)
            door.failed("was on its way")

    async def work() -> None:
        for _ in range(OUTAGE_AFTER):
            door.failed("down")
        await asyncio.gather(fail_late(), *[prober() for _ in range(10)])

    play(clock, work)
    assert most == 1
    assert first - 1000.0 == pytest.approx(0.5)  # the first wait, not the sixty-fourth


def test_a_try_that_is_cancelled_leaves_room_for_another(clock: Clock) -> None:
    door, _ = limiter()

    async def work() -> None:
        for _ in range(OUTAGE_AFTER):
            door.failed("down")
        gone = asyncio.ensure_future(door.enter(1))
        await REAL_SLEEP(0)
        await REAL_SLEEP(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert await door.enter(1)
        assert clock.now < 1010.0

    play(clock, work)


@pytest.mark.parametrize("limit", [0.0, 30.0, 300.0])
def test_all_are_given_up_after_the_limit(clock: Clock, limit: float) -> None:
    door, _ = limiter(outage_limit=limit)
    given_up: list[float] = []

    async def ask() -> None:
        try:
            while True:
                assert await door.enter(1)
                door.failed("refused the connection")
                door.left()
        except Outage as error:
            assert "refused the connection" in error.message and "outage_limit_s" in (error.hint or "")
            given_up.append(clock.now - 1000.0)

    async def work() -> None:
        for _ in range(OUTAGE_AFTER):
            door.failed("refused the connection")
        await asyncio.gather(*[ask() for _ in range(8)])

    play(clock, work)
    assert len(given_up) == 8
    assert all(limit <= when <= limit + 0.2 for when in given_up)


def test_an_outage_begins_when_it_is_noticed_not_with_a_failure_of_an_hour_ago(clock: Clock) -> None:
    """In training nobody is asked for a while: an old failure is no hour of outage."""
    door, _ = limiter(outage_limit=300.0)
    door.failed("a single one")
    clock.now += 3600

    async def work() -> None:
        for _ in range(OUTAGE_AFTER - 1):
            door.failed("down")
        assert door.down
        assert await door.enter(1)  # somebody tries, nobody gives up

    play(clock, work)


def test_no_test_here_takes_time() -> None:
    """The clock of the tests is the one that the module asks."""
    began = time.monotonic()
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "time", clock)
        patch.setattr(limits, "asyncio", _Asyncio(clock))
        door, _ = limiter(requests_per_minute=1)

        async def work() -> None:
            for _ in range(10):
                await door.enter(1)

        play(clock, work)
    assert clock.now > 1400.0
    assert time.monotonic() - began < 10.0
