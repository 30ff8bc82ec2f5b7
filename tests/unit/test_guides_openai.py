"""The API guide against a server on this machine: requests, answers, failures, keys."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from collecting import no_endpoint
from fake_openai import FakeOpenAI, Reply, Request
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.errors import RlgfError, StoppedEarly, UserError
from rlgf_cli.guides.openai.endpoint import endpoint_of
from rlgf_cli.guides.openai.guide import OpenAIGuide
from rlgf_cli.guides.openai.keys import NO_KEY, api_key
from rlgf_cli.protocols import Completion, Example, Failure, GuideRequest

KEY = "sk-planted-0123456789abcdef"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_endpoint(monkeypatch, tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def guide_for(server: FakeOpenAI, name: str = "openai:m", seed: int = 0, **changes: Any) -> OpenAIGuide:
    changes = {"base_url": server.url, "max_retries": 0, "timeout_s": 5.0, **changes}
    return OpenAIGuide(GuideConfig.model_validate({"name": name, **changes}), seed=seed)


def request(prompt: str = "cat tree", **changes: Any) -> GuideRequest:
    return GuideRequest(Example(f"id of {prompt}", prompt), **changes)


def outcome(reply: Reply, asked: GuideRequest | None = None, **changes: Any) -> Completion | Failure:
    """What the guide makes of one planned reply."""
    with FakeOpenAI(lambda n, seen: reply) as server, closing(guide_for(server, deadline_s=1.0, **changes)) as guide:
        return next(guide.stream([asked or request()])).outcome


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as running:
        yield running


def test_a_chat_request(server: FakeOpenAI) -> None:
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "stop": ["\n"]}
    with closing(
        guide_for(server, system="Be brief.", prompt_template="A sentence with: {prompt}.", sampling=sampling)
    ) as guide:
        (answer,) = guide.complete([request("cat tree", max_new_tokens=17)])
    (seen,) = server.requests
    assert seen.path == "/v1/chat/completions"
    seed = seen.body.pop("seed")
    assert seen.body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "A sentence with: cat tree."},
        ],
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 50,
        "stop": ["\n"],
        "max_tokens": 17,
    }
    assert 0 <= seed < 2**31
    assert seen.headers["authorization"] == f"Bearer {KEY}"
    assert answer.text.startswith("answer ") and answer.finish_reason == "stop"
    assert answer.model == "m-0613"
    assert answer.usage == {"prompt_tokens": 5, "completion_tokens": 2}
    assert answer.nano_usd is None


def test_a_completion_request_goes_on_from_prompt_and_prefix(server: FakeOpenAI) -> None:
    server.plan = lambda n, seen: Reply(text=" runs home. ", finish_reason="length")
    with closing(guide_for(server, api="completion", prompt_template="{prompt}\nA:")) as guide:
        whole, rest = guide.complete([request("cat {prefix}"), request(prefix=" The dog")])
    assert {seen.path for seen in server.requests} == {"/v1/completions"}
    assert sorted(seen.prompt for seen in server.requests) == ["cat tree\nA: The dog", "cat {prefix}\nA:"]
    assert all("n" not in seen.body and isinstance(seen.body["prompt"], str) for seen in server.requests)
    assert whole.text == "runs home."  # a whole text starts and ends with a word
    assert rest.text == " runs home."  # a continuation keeps the space in front
    assert whole.finish_reason == rest.finish_reason == "length"


def test_a_continuation_through_chat(server: FakeOpenAI) -> None:
    server.plan = lambda n, seen: Reply(text='"The dog runs home."')
    with closing(guide_for(server, prompt_template="<{prompt}>", continue_template="{prompt}|{prefix}")) as guide:
        (answer,) = guide.complete([request(prefix="The dog")])
        assert guide.counts == {"quotes_removed": 1, "prefix_removed": 1}
    assert server.requests[0].prompt == "<cat tree>|The dog"
    assert answer.text == " runs home."


def test_seeds_belong_to_example_prefix_and_sample(server: FakeOpenAI) -> None:
    asked = [request("a"), request("b"), request("a", sample_index=1), request("a", prefix="x"), request("a")]
    with closing(guide_for(server, concurrency=1, mode="live")) as guide:
        guide.complete(asked)
    with closing(guide_for(server, concurrency=1, seed=1)) as guide:
        guide.complete(asked[:1])
    with closing(guide_for(server, concurrency=1, sampling={"send_seed": False})) as guide:
        guide.complete(asked[:1])
    seeds = [seen.body.get("seed") for seen in server.requests]
    assert seeds[0] == seeds[4] and len(set(seeds[:4] + seeds[5:6])) == 5
    assert seeds[6] is None


def test_calls_reuse_connections_and_keep_to_the_concurrency(server: FakeOpenAI) -> None:
    server.plan = lambda n, seen: Reply(delay_s=0.01)
    with closing(guide_for(server, concurrency=3)) as guide:
        for sample in range(3):
            guide.complete([request(str(i), sample_index=sample) for i in range(8)])
    assert len(server.requests) == 24
    assert server.most_in_flight == 3
    assert server.connections <= 3


def test_answers_keep_their_order_and_requests_are_drawn_as_needed(server: FakeOpenAI) -> None:
    server.plan = lambda n, seen: Reply(text=seen.prompt, delay_s=0.05 if n == 0 else 0.0)
    drawn = 0

    def requests() -> Iterator[GuideRequest]:
        nonlocal drawn
        for i in range(50):
            drawn += 1
            yield request(str(i))

    with closing(guide_for(server, concurrency=2)) as guide:
        assert [c.text for c in guide.complete([request(str(i)) for i in range(6)])] == list("012345")
        with closing(guide.stream(requests())) as answers:
            next(answers)
            assert drawn <= 4


def test_prices_come_from_the_alias(server: FakeOpenAI) -> None:
    own = Path(os.environ["RLGF_CONFIG_DIR"]) / "aliases.yaml"
    own.parent.mkdir(parents=True, exist_ok=True)
    price = "usd_per_million_input: 0.5\n    usd_per_million_output: 1.5\n"
    own.write_text(f"aliases:\n  - name: mine\n    model: gpt-x\n    base_url: {server.url}\n    {price}")
    with closing(guide_for(server, name="mine")) as guide:
        (answer,) = guide.complete([request("cat tree")])
    assert server.requests[0].body["model"] == "gpt-x"
    assert answer.nano_usd == (2 * 500 + 2 * 1500)
    unpriced = outcome(Reply(body={"usage": None}), name="mine")
    assert isinstance(unpriced, Completion) and unpriced.nano_usd is None and unpriced.usage == {}


def test_the_price_of_an_alias_is_that_of_its_own_host(server: FakeOpenAI) -> None:
    with closing(guide_for(server, name="gpt-3.5")) as guide:
        assert guide.has_price is False and guide.licence is None and guide.max_price(request()) is None
        assert guide.batch_price == 1.0
        (answer,) = guide.complete([request("cat tree")])
    assert server.requests[0].body["model"] == "gpt-3.5-turbo" and answer.nano_usd is None


def test_a_text_ends_before_the_stop_text_whatever_the_server_leaves_in() -> None:
    found = outcome(Reply(text="one sentence.\nand more", finish_reason="length"), sampling={"stop": ["\n"]})
    assert isinstance(found, Completion)
    assert (found.text, found.finish_reason) == ("one sentence.", "stop")


def test_an_empty_text_is_a_text_and_half_a_character_is_not() -> None:
    empty = outcome(Reply(text="", finish_reason="stop"))
    assert isinstance(empty, Completion) and empty.text == ""
    half = outcome(Reply(text="cut in \ud83d", finish_reason="length"))
    assert isinstance(half, Completion) and half.text == "cut in"


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply(finish_reason="content_filter"), "content_filter"),
        (Reply(finish_reason="tool_calls"), "tool_call"),
        (Reply(body={"choices": []}), "malformed"),
        (Reply(body={"choices": None}), "malformed"),
        (Reply(body={"choices": [{"finish_reason": "stop", "message": {"content": None}}]}), "empty"),
        (Reply(body={"choices": [{"finish_reason": "stop"}]}), "empty"),
        (Reply(body={"choices": [{"finish_reason": "stop", "message": {"refusal": "no"}}]}), "refusal"),
        (Reply(raw=b'{"choices": [{"mess'), "malformed"),
        (Reply(raw=b"\xff\xfe"), "malformed"),
        (Reply(raw=b"<html>busy</html>", headers={"Content-Type": "text/html"}), "html"),
        (Reply(raw=b"[1, 2]"), "malformed"),
        (Reply(raw=b'{"choices"', claimed_length=500), "connection"),
        (Reply(drop=True), "connection"),
        (Reply(status=500), "server"),
        (Reply(status=503), "server"),
        (Reply(status=429), "rate_limit"),
        (Reply(status=400), "refused"),
        (Reply(delay_s=1.0), "timeout"),
    ],
)
def test_what_is_no_text_is_a_failure_and_never_a_text(reply: Reply, kind: str) -> None:
    found = outcome(reply, timeout_s=0.3)
    assert isinstance(found, Failure), found
    assert found.kind == kind and found.message


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with closing(OpenAIGuide(GuideConfig(name="openai:m", base_url=url, max_retries=0), seed=0)) as guide:
        found = next(guide.stream([request()])).outcome
    assert isinstance(found, Failure) and found.kind == "connection" and url in found.message


def test_the_client_retries() -> None:
    plan = [Reply(status=500, headers={"retry-after-ms": "1"}), Reply(drop=True), Reply(text="at last")]
    with FakeOpenAI(lambda n, seen: plan[n]) as server, closing(guide_for(server, max_retries=2)) as guide:
        (answer,) = guide.complete([request()])
    assert answer.text == "at last" and len(server.requests) == 3


def test_newer_models_want_another_name_for_the_limit() -> None:
    def plan(n: int, seen: Request) -> Reply:
        if "max_tokens" in seen.body:
            return Reply(status=400, error={"message": "Use 'max_completion_tokens' instead.", "code": "x"})
        return Reply(text=str(seen.body["max_completion_tokens"]))

    with FakeOpenAI(plan) as server, closing(guide_for(server, concurrency=1)) as guide:
        texts = [c.text for c in guide.complete([request(max_new_tokens=9), request(max_new_tokens=8)])]
    assert texts == ["9", "8"] and len(server.requests) == 3


def test_complete_raises_where_a_request_failed() -> None:
    def plan(n: int, seen: Request) -> Reply:
        return Reply(status=500) if seen.prompt == "bad" else Reply()

    with (
        FakeOpenAI(plan) as server,
        closing(guide_for(server)) as guide,
        pytest.raises(RlgfError, match=r"failed 1 of 3 requests.*'id of bad'.*status 500"),
    ):
        guide.complete([request("good"), request("bad"), request("fine")])


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(status=401, error={"message": f"Incorrect API key provided: {KEY}"}), "refused the key"),
        (Reply(status=404, error={"message": "no model m"}), "has no model 'm'"),
        (Reply(status=403, error={"message": "not for you"}), "has no model 'm'"),
        (Reply(status=429, error={"message": "spent", "code": "insufficient_quota"}), "quota is spent"),
        (Reply(status=429, error={"message": "spent", "type": "insufficient_quota"}), "quota is spent"),
        (Reply(status=402, error={"message": "Insufficient Balance"}), "quota is spent.*Insufficient Balance"),
    ],
)
def test_what_no_request_can_survive_is_raised_without_the_key(reply: Reply, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        outcome(reply)
    assert KEY not in f"{caught.value} {caught.value.hint}"
    assert caught.value.__suppress_context__  # or a traceback would show the server's words


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(status=401, error={"message": "Incorrect API key"}), "refused the key.*Incorrect API key"),
        (Reply(status=402, error={"message": "Insufficient Balance"}), "quota is spent.*Insufficient Balance"),
        (Reply(status=403, error={"message": "suspended"}), "refuses access.*suspended"),
        (Reply(status=429, error={"message": "spent", "type": "insufficient_quota"}), "quota is spent"),
    ],
)
def test_what_no_request_can_survive_stops_a_run_that_has_answers(reply: Reply, message: str, tmp_path: Path) -> None:
    with FakeOpenAI(lambda n, seen: reply if n == 1 else Reply()) as server:
        with closing(guide_for(server, concurrency=1, mode="live")) as guide:
            guide.charge_to("run")
            guide.keep_account(tmp_path / "spend.json")
            with pytest.raises(StoppedEarly, match=message) as caught:
                guide.complete([request(str(n)) for n in range(4)])
            assert "--resume" in str(caught.value.hint) and len(server.requests) == 2
        server.plan = lambda n, seen: reply
        with closing(guide_for(server)) as guide:  # nothing is received, in a run that an earlier session began
            guide.charge_to("other", None, {"calls": 0})
            guide.keep_account(tmp_path / "other.json")
            with pytest.raises(StoppedEarly):
                guide.complete([request("more")])


@pytest.mark.parametrize(
    "error",
    [
        {"message": "x", "code": "content_policy_violation"},
        {"message": "flagged", "code": 403, "metadata": {"reasons": ["violence"], "flagged_input": "..."}},
    ],
)
def test_a_403_of_a_content_filter_is_a_refusal_of_one_prompt(error: dict[str, Any]) -> None:
    found = outcome(Reply(status=403, error=error))
    assert isinstance(found, Failure) and found.refused and found.final


def test_no_failure_repeats_the_key() -> None:
    for reply in (
        Reply(status=400, error={"message": "x" * 190 + KEY}),  # cut in the middle of the key
        Reply(status=500, error={"message": f"upstream said {KEY}"}),
    ):
        found = outcome(reply)
        assert isinstance(found, Failure) and "sk-planted" not in found.message


def test_answers_on_their_way_are_given_before_the_end() -> None:
    def plan(n: int, seen: Request) -> Reply:
        if seen.prompt == "bad":
            return Reply(status=401)
        return Reply(text=seen.prompt, delay_s=0.2)

    with FakeOpenAI(plan) as server, closing(guide_for(server, concurrency=3)) as guide:
        given = []
        with pytest.raises(UserError, match="refused the key"):
            for answer in guide.stream([request("paid"), request("bad"), request("also"), *[request("never")] * 9]):
                assert isinstance(answer.outcome, Completion)
                given.append(answer.outcome.text)
    assert sorted(given) == ["also", "paid"]
    assert len(server.requests) == 3


def test_a_wrong_model_after_a_success_is_one_failure() -> None:
    plan = [Reply(text="fine"), Reply(status=404), Reply(text="fine too")]
    with FakeOpenAI(lambda n, seen: plan[n]) as server, closing(guide_for(server, concurrency=1)) as guide:
        found = [answer.outcome for answer in guide.stream([request("a"), request("b"), request("c")])]
    assert isinstance(found[1], Failure) and found[1].kind == "refused"
    assert isinstance(found[2], Completion)


def key_for(url: str) -> str:
    return api_key(endpoint_of(GuideConfig(name="openai:m", base_url=url)))[0]


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_for("https://api.openai.com/v1") == KEY
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    with pytest.raises(UserError, match="characters that no key has") as caught:
        key_for("https://api.openai.com/v1")
    assert "two words" not in str(caught.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    for url in ("http://127.0.0.1:8000/v1", "http://localhost/v1", "http://[::1]:1/v1"):
        assert key_for(url) == NO_KEY
    for url in ("https://api.openai.com/v1", "http://127.example.org/v1", "http://192.168.0.1/v1"):
        with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
            key_for(url)


def test_a_length_that_no_context_holds() -> None:
    with FakeOpenAI() as server, closing(guide_for(server, name="gpt-3.5")) as guide:
        guide.check([request().example], 16384)
        with pytest.raises(UserError, match="takes 16385 in all"):
            guide.check([request().example], 16385)


def test_closing_does_not_wait_for_a_server_that_hangs() -> None:
    with FakeOpenAI(lambda n, seen: Reply(delay_s=2.0)) as server:
        guide = guide_for(server)
        answers = guide.stream([request()] * 2)
        started = time.monotonic()
        future = guide.connection.submit(guide._request(request(), None))
        answers.close()
        guide.close()
        assert time.monotonic() - started < 1.5
        assert future.cancelled()
