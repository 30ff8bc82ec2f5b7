"""The server that the guide's tests are measured by: what it plans, counts and prices is checked on its own."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import openai
import pytest
import requests

from fake_openai import (
    FLAWED,
    KINDS,
    UNKNOWN,
    WHOLE,
    FakeOpenAI,
    Ledger,
    Limits,
    Reply,
    Request,
    in_a_process,
    lengths,
    misbehaviour,
    text_for,
)  # fmt: skip


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def chat(prompt: str, seed: int = 0, **more: Any) -> Request:
    body = {"model": "m", "messages": [{"role": "user", "content": prompt}], "seed": seed, "max_tokens": 10, **more}
    return Request("/v1/chat/completions", body, {})


def settled(server: FakeOpenAI) -> Ledger:
    """The ledger when the last answer is booked, which is just after it was sent."""
    deadline = time.monotonic() + 10
    while server.in_flight and time.monotonic() < deadline:
        time.sleep(0.005)
    return server.ledger


def post(server: FakeOpenAI | str, request: Request) -> requests.Response:
    url = server if isinstance(server, str) else server.url
    return requests.post(url.removesuffix("/v1") + request.path, json=request.body, timeout=2)


def test_every_kind_of_fault_has_its_share_whatever_the_order() -> None:
    requests = [chat(f"p{i}") for i in range(4000)]
    plan, other = misbehaviour(1), misbehaviour(1)
    replies = {request.key: plan(0, request) for request in requests}
    assert replies == {request.key: other(0, request) for request in reversed(requests)}
    assert all(150 < plan.happened[kind] < 250 for kind in KINDS)
    again = [plan(0, request) for request in requests]  # the second time is another draw
    assert 1000 < sum(reply != replies[request.key] for reply, request in zip(again, requests, strict=True)) < 3500
    assert replies != {request.key: misbehaviour(2)(0, request) for request in requests}
    only = misbehaviour(1, 0.5, ["500"])
    assert Counter(only(0, request).status for request in requests).keys() == {200, 500}
    with pytest.raises(ValueError, match="unknown kinds"):
        misbehaviour(1, kinds=["flood"])


def test_what_the_ledger_says_of_every_end() -> None:
    with FakeOpenAI(prices=(1e6, 10e6)) as server:  # a dollar per token in, ten per token out
        for kind in (*KINDS, "fine"):
            server.plan = misbehaviour(0, 1.0, [kind], hang_s=0.1) if kind != "fine" else lambda n, request: Reply()
            try:
                post(server, chat(f"two {kind}"))
            except requests.RequestException:
                assert kind in ("hang", "drop", "half_body")
        server.plan = lambda n, request: Reply(body={"usage": None})
        post(server, chat("without usage"))
        server.plan = lambda n, request: Reply(claimed_length=5000)
        with pytest.raises(requests.RequestException):
            post(server, chat("cut short"))
        found = {asked.request.prompt.split()[1]: asked.calls for asked in settled(server).all()}
    assert {kind: (call.end, call.price) for kind, (call,) in found.items()} == {
        "429_retry_after": ("429", 0.0), "429": ("429", 0.0), "500": ("500", 0.0), "503": ("503", 0.0),
        "hang": (UNKNOWN, None), "drop": (UNKNOWN, None), "half_body": (UNKNOWN, None),
        "invalid_json": (UNKNOWN, None), "no_choice": (FLAWED, 22.0), "wrong_model": (FLAWED, 22.0),
        "fine": (WHOLE, 22.0), "usage": (WHOLE, None), "short": (UNKNOWN, None),
    }  # fmt: skip
    assert found["drop"][0].bound == found["drop"][0].charge == len("two drop") + 16 + 10 * 10


def test_lengths_are_seeded_and_counted() -> None:
    seen = []
    with FakeOpenAI(lengths(3)) as server:
        for i in range(60):
            answer = post(server, chat(f"p{i}", max_tokens=4)).json()
            words = answer["choices"][0]["message"]["content"].split()
            assert len(words) == answer["usage"]["completion_tokens"] <= 4
            assert answer["choices"][0]["finish_reason"] == ("length" if len(words) == 4 else "stop")
            assert words[0] == text_for(chat(f"p{i}")).split()[1]
            seen.append(len(words))
        assert set(seen) == {1, 2, 3, 4}
        server.plan = lambda n, request: Reply()
        assert post(server, chat("p", max_tokens=1)).json()["choices"][0] == {
            "index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "answer"},
        }  # fmt: skip


def test_limits_are_told_and_kept() -> None:
    with FakeOpenAI(limits=Limits(requests=3, tokens=1000, minute_s=3.0, enforce=True)) as server:
        answers = [post(server, chat("p")) for _ in range(5)]
    assert [answer.status_code for answer in answers].count(200) in (3, 4)
    assert answers[0].headers["x-ratelimit-limit-requests"] == "3"
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "2"
    assert answers[0].headers["x-ratelimit-remaining-tokens"] == "989"
    assert answers[0].headers["x-ratelimit-reset-tokens"].endswith("ms")
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert 0 < float(refused.headers["retry-after"]) <= 1


def test_in_a_process_of_its_own() -> None:
    with in_a_process("--faults", "1", "--share", "1", "--kinds", "500", "--prices", "1", "2") as url:
        assert post(url, chat("p")).status_code == 500
        deadline = time.monotonic() + 10
        (asked,) = Ledger.of(url).all()
        while asked.ends == ["unknown"] and time.monotonic() < deadline:  # booked when the answer has left
            time.sleep(0.01)
            (asked,) = Ledger.of(url).all()
    assert (asked.request, asked.ends) == (chat("p"), ["500"])


# --- the Batch API, through the client that talks to the real one ---


def lines(*requests: Request, **more: Any) -> bytes:
    rows = [
        {"custom_id": f"c{i}", "method": "POST", "url": request.path, "body": request.body, **more}
        for i, request in enumerate(requests)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def client(server: FakeOpenAI) -> openai.OpenAI:
    return openai.OpenAI(api_key="none", base_url=server.url, max_retries=0)


def submit(api: openai.OpenAI, data: bytes) -> Any:
    file = api.files.create(file=("in.jsonl", data), purpose="batch")
    assert file.bytes == len(data) and api.files.content(file.id).read() == data
    return api.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"run": "r"}
    )


def rows(api: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    return {row["custom_id"]: row for row in map(json.loads, api.files.content(file_id).text.splitlines())}


def test_a_batch_from_start_to_end() -> None:
    requests = [chat(f"prompt ü {i}") for i in range(4)]

    def line(n: int, request: Request) -> Reply:
        return [Reply(), Reply(status=500), Reply(drop=True), Reply()][n]

    with FakeOpenAI(prices=(1e6, 10e6)) as server, client(server) as api:
        server.batches.line, server.batches.polls = line, 3
        batch = submit(api, lines(*requests))
        assert batch.status == "validating" and batch.request_counts.total == 4
        assert [api.batches.retrieve(batch.id).status for _ in range(4)] == [
            "in_progress", "in_progress", "completed", "completed",
        ]  # fmt: skip
        done = api.batches.retrieve(batch.id)
        counts = done.request_counts
        assert counts and (counts.completed, counts.failed, done.metadata) == (2, 1, {"run": "r"})
        good, bad = rows(api, done.output_file_id), rows(api, done.error_file_id)
        assert good.keys() == {"c0", "c3"} and bad.keys() == {"c1"}
        assert good["c3"]["response"]["body"]["choices"][0]["message"]["content"] == text_for(requests[3])
        assert bad["c1"]["response"]["status_code"] == 500
        assert [listed.id for listed in api.batches.list()] == [batch.id]
        ends = [(call.end, call.price) for call in settled(server).calls()]
    assert ends == [(WHOLE, 11.5), ("500", 0.0), (UNKNOWN, None), (WHOLE, 11.5)]  # half the price
    assert server.requests == []


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (lines(chat("a")) * 2, "duplicate_custom_id"),
        (b'{"custom_id": "a"', "invalid_json_line"),
        (lines(chat("a"), priority=1), "invalid_request"),
        (lines(chat("a"), url="/v1/completions"), "mismatched_endpoint"),
        (lines(chat("a"), chat("b", model="other")), "mismatched_model"),
        (b"", "empty_file"),
    ],
)
def test_a_batch_that_is_not_valid_fails(data: bytes, code: str) -> None:
    with FakeOpenAI() as server, client(server) as api:
        batch = api.batches.retrieve(submit(api, data).id)
    assert batch.status == "failed" and batch.errors is not None and batch.errors.data
    assert batch.errors.data[0].code == code


def test_batches_that_expire_fail_or_are_cancelled() -> None:
    with FakeOpenAI() as server, client(server) as api:
        server.batches.polls, server.batches.end, server.batches.done = 1, "expired", 1
        batch = api.batches.retrieve(submit(api, lines(chat("a"), chat("b"))).id)
        assert batch.status == "expired" and rows(api, batch.output_file_id).keys() == {"c0"}
        assert rows(api, batch.error_file_id)["c1"]["error"]["code"] == "batch_expired"
        server.batches.end = "failed"
        assert api.batches.retrieve(submit(api, lines(chat("a"))).id).status == "failed"
        server.batches.end = "completed"
        batch = submit(api, lines(chat("c")))
        assert api.batches.cancel(batch.id).status == "cancelling"
        assert api.batches.retrieve(batch.id).status == "cancelled"
        with pytest.raises(openai.ConflictError):
            api.batches.cancel(batch.id)
        assert len(api.batches.list(limit=2).data) == 2 and len(list(api.batches.list(limit=1))) == 3
        with pytest.raises(openai.NotFoundError):
            api.batches.retrieve("batch_9")


def test_an_answer_that_is_lost_after_the_batch_was_made() -> None:
    with FakeOpenAI() as server, client(server) as api:
        server.batches.lost = lambda method, path: (method, path) == ("POST", "/v1/batches")
        with pytest.raises(openai.APIConnectionError):
            submit(api, lines(chat("a")))
        assert len(list(api.batches.list())) == 1
