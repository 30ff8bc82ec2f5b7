"""The price of answers as servers bill them, the bounds of calls, and the number of calls at once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collecting import no_endpoint
from fake_openai import FakeOpenAI, Reply, Request
from rlgf_cli.config.guide import BudgetConfig, GuideConfig
from rlgf_cli.guides.openai.connection import MOST_BYTES
from rlgf_cli.guides.openai.guide import OpenAIGuide
from rlgf_cli.guides.openai.response import read_response
from rlgf_cli.ledger.meter import BudgetSpent
from rlgf_cli.protocols import Completion, Example, Failure, GuideRequest

PRICES = {"usd_per_million_input": 1.0, "usd_per_million_output": 1.0}
"""A token costs 1e-6 US dollars."""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_endpoint(monkeypatch, tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as running:
        yield running


def guide_for(server: FakeOpenAI, **changes: Any) -> OpenAIGuide:
    changes = {"base_url": server.url, "timeout_s": 5.0, "mode": "live", **changes}
    guide = OpenAIGuide(GuideConfig.model_validate({"name": "openai:m", **changes}), seed=0)
    guide.notify = lambda text: None
    return guide


def requests(count: int, tokens: int = 10) -> list[GuideRequest]:
    return [GuideRequest(Example(str(i), f"prompt {i}"), max_new_tokens=tokens) for i in range(count)]


# tokens as the server bills them


def usage(**counts: Any) -> dict[str, int]:
    body = {"choices": [{"finish_reason": "stop", "message": {"content": "text"}}], "usage": counts}
    return read_response(json.dumps(body).encode(), "chat").outcome.usage


@pytest.mark.parametrize(
    ("given_", "prompt", "completion"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}, 10, 5),
        # OpenAI: reasoning is among the completion's tokens
        ({"prompt_tokens": 10, "completion_tokens": 905, "total_tokens": 915,
          "completion_tokens_details": {"reasoning_tokens": 900}}, 10, 905),
        # Gemini, xAI: only the total has it
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 915,
          "completion_tokens_details": {"reasoning_tokens": 900}}, 10, 905),
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 915}, 10, 905),
        # no total: more reasoning than completion cannot be a part of it
        ({"prompt_tokens": 10, "completion_tokens": 5,
          "completion_tokens_details": {"reasoning_tokens": 900}}, 10, 905),
        ({"prompt_tokens": 10, "completion_tokens": 900,
          "completion_tokens_details": {"reasoning_tokens": 800}}, 10, 900),
        # a total without one of its parts
        ({"prompt_tokens": 10, "total_tokens": 15}, 10, 5),
        ({"completion_tokens": 5, "total_tokens": 15}, 10, 5),
        # a total below its parts, and none: the parts hold
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 0}, 10, 5),
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": None}, 10, 5),
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": "15"}, 10, 5),
    ],
)  # fmt: skip
def test_tokens_count_as_the_server_bills_them(given_: dict[str, Any], prompt: int, completion: int) -> None:
    assert usage(**given_) == {"prompt_tokens": prompt, "completion_tokens": completion}


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_never_less_than_listed_and_never_less_than_the_total(prompt: int, completion: int, total: int) -> None:
    found = usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=total)
    assert found["prompt_tokens"] == prompt
    assert found["completion_tokens"] >= completion
    assert sum(found.values()) == max(total, prompt + completion)


def test_a_text_whose_reasoning_was_long_was_not_cut_for_that() -> None:
    listed = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 915}
    body = {"choices": [{"finish_reason": None, "message": {"content": "text"}}], "usage": listed}
    outcome = read_response(body, "chat", 50).outcome
    assert isinstance(outcome, Completion) and outcome.finish_reason == "stop"


def test_reasoning_that_only_the_total_has_is_charged_and_said(server: FakeOpenAI) -> None:
    """49 calls were booked at $.0029 for $.49."""
    server.plan = lambda n, seen: Reply(
        body={"usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 5000}}
    )
    said: list[str] = []
    with closing(guide_for(server, **PRICES)) as guide:
        guide.notify = said.append
        guide.charge_to("run")
        guide.complete(requests(3))
        assert guide.meter.to_json()["charged_usd"] == pytest.approx(3 * 5000e-6)
        assert guide.counts["unlisted_tokens"] == 3
    assert sum("4985 tokens beside those of the text" in line for line in said) == 1


# bounds


def test_a_server_that_keeps_to_no_limit_does_not_pass_the_cap_by_more_than_one_call(server: FakeOpenAI) -> None:
    """With 16 calls at once a cap of $.02 was charged $1.02."""
    server.plan = lambda n, seen: Reply(
        body={"usage": {"prompt_tokens": 10, "completion_tokens": 10_000}}, delay_s=0.05
    )
    said: list[str] = []
    with closing(guide_for(server, concurrency=16, **PRICES)) as guide:
        guide.notify = said.append
        guide.charge_to("run", BudgetConfig(max_cost_usd=0.025))
        with pytest.raises(BudgetSpent):
            list(guide.stream(requests(100)))
        charged = guide.meter.to_json()["charged_usd"]
    assert len(server.requests) == 2 and charged == pytest.approx(2 * 0.01001)
    assert sum("times the most" in line for line in said) == 1


def test_an_answer_above_its_bound_raises_what_is_reserved_for_those_in_flight(server: FakeOpenAI) -> None:
    """The first answer keeps to the limit, the second does not: no call is sent beside those in flight by then."""
    release = threading.Event()

    def plan(n: int, seen: Request) -> Reply:
        if n > 1:
            release.wait(5.0)
        tokens = 10 if n == 0 else 10_000
        return Reply(body={"usage": {"prompt_tokens": 10, "completion_tokens": tokens}}, delay_s=0.1 if n == 1 else 0.0)

    server.plan = plan
    with closing(guide_for(server, concurrency=4, **PRICES)) as guide:
        guide.charge_to("run", BudgetConfig(max_cost_usd=0.05))
        answers = guide.stream(requests(100))
        next(answers)
        next(answers)
        time.sleep(0.3)  # whatever had room would be sent by now
        reserved = guide.meter.totals()
        release.set()
        with pytest.raises(BudgetSpent):
            list(answers)
        charged = guide.meter.to_json()["charged_usd"]
    # three in flight, each reserved at what the second cost; one more is what the cap has room for
    assert reserved.unknown <= 4 and reserved.nano_usd >= reserved.unknown * 10_010_000
    assert charged <= 0.05 + 0.0101


@pytest.mark.parametrize("cap", [None, 1.0])
def test_the_first_call_goes_alone_where_money_has_a_cap(server: FakeOpenAI, cap: float | None) -> None:
    times: list[float] = []
    server.plan = lambda n, seen: (times.append(time.monotonic()), Reply(delay_s=0.3))[1]
    with closing(guide_for(server, concurrency=4, **PRICES)) as guide:
        guide.charge_to("run", BudgetConfig(max_cost_usd=cap))
        guide.complete(requests(4))
    apart = [later - times[0] for later in sorted(times)[1:]]
    assert all(gap >= 0.3 for gap in apart) if cap else all(gap < 0.25 for gap in apart)


def test_a_first_call_without_an_answer_lets_the_next_one_go(server: FakeOpenAI) -> None:
    server.plan = lambda n, seen: Reply(status=400) if n == 0 else Reply()
    with closing(guide_for(server, concurrency=4, **PRICES)) as guide:
        guide.charge_to("run", BudgetConfig(max_cost_usd=1.0))
        outcomes = [answer.outcome for answer in guide.stream(requests(6))]
    assert sum(isinstance(outcome, Completion) for outcome in outcomes) == 5


# a slow server


class OneSlot:
    """A plan that answers one request at a time; each takes so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._slot = seconds, threading.Lock()

    def __call__(self, n: int, seen: Request) -> Reply:
        with self._slot:
            time.sleep(self.seconds)
        return Reply()


def test_a_slow_server_is_sent_fewer_requests_at_once_and_loses_none(server: FakeOpenAI) -> None:
    """Of 230 requests to a server with one slot 181 were lost to time-outs."""
    server.plan = OneSlot(0.05)
    said: list[str] = []
    with closing(guide_for(server, concurrency=16, timeout_s=0.3, max_retries=1)) as guide:
        guide.notify = said.append
        outcomes = [answer.outcome for answer in guide.stream(requests(40))]
        assert guide._places.places < 16
    assert all(isinstance(outcome, Completion) for outcome in outcomes)
    assert len(server.requests) < 90
    assert any("requests at once: at most" in line for line in said)


def test_the_places_come_back_when_the_server_is_quick_again(server: FakeOpenAI) -> None:
    slow = OneSlot(0.2)
    server.plan = lambda n, seen: slow(n, seen) if n < 8 else Reply()
    with closing(guide_for(server, concurrency=8, timeout_s=0.5)) as guide:
        outcomes = [answer.outcome for answer in guide.stream(requests(150))]
        assert guide._places.places == 8
    assert all(isinstance(outcome, Completion) for outcome in outcomes)


def test_one_request_at_a_time_that_times_out_is_to_blame_itself(server: FakeOpenAI) -> None:
    server.plan = lambda n, seen: Reply(delay_s=1.0)
    with closing(guide_for(server, concurrency=4, timeout_s=0.2, max_retries=1)) as guide:
        (answer,) = guide.stream(requests(1))
    assert isinstance(answer.outcome, Failure) and answer.outcome.kind == "timeout"
    assert len(server.requests) == 2


# answers that are too large


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("size", [20_000_000, MOST_BYTES // 8])
def test_an_answer_larger_than_any_text_within_its_limit_is_bought_once(
    server: FakeOpenAI, size: int, status: int
) -> None:
    server.plan = lambda n, seen: Reply(text="x" * size, status=status, error={"message": "x" * size})
    with closing(guide_for(server, max_retries=2, deadline_s=3.0)) as guide:
        (answer,) = guide.stream(requests(1, tokens=64))
    assert isinstance(answer.outcome, Failure)
    if status == 200 or size > MOST_BYTES:
        assert answer.outcome.kind == "oversized" and len(server.requests) == 1
    assert len(answer.outcome.message) < 500


def test_an_answer_that_names_no_length_is_read_as_far_as_it_may_be_long(server: FakeOpenAI) -> None:
    body = json.dumps({"choices": [{"message": {"content": "x"}}], "pad": "x" * 20_000_000}).encode()
    server.plan = lambda n, seen: Reply(raw=body, headers={"Connection": "close"})
    with closing(guide_for(server)) as guide:
        (answer,) = guide.stream(requests(1))
    assert isinstance(answer.outcome, Failure) and answer.outcome.kind == "oversized"


def test_a_long_text_within_a_long_limit_is_a_text(server: FakeOpenAI) -> None:
    server.plan = lambda n, seen: Reply(text="word " * 100_000)
    with closing(guide_for(server)) as guide:
        (answer,) = guide.stream(requests(1, tokens=128_000))
    assert isinstance(answer.outcome, Completion) and len(answer.outcome.text) > 400_000
