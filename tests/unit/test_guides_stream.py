"""A live guide's stream: what is asked, what is kept, what is charged; the fake server counts."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from collecting import no_endpoint
from conftest import write_rows
from fake_openai import FakeOpenAI, Reply, Request
from rlgf_cli.config.collect_guide import CollectGuideConfig
from rlgf_cli.config.guide import BudgetConfig, GuideConfig
from rlgf_cli.config.loader import resolve
from rlgf_cli.errors import RlgfError, StoppedEarly, UserError
from rlgf_cli.guides import stream as guide_stream
from rlgf_cli.guides.openai.guide import OpenAIGuide
from rlgf_cli.ledger.store import Store
from rlgf_cli.protocols import Answer, Completion, Example, Failure, GuideRequest
from rlgf_cli.stages import collect_guide as stage
from rlgf_cli.stages.session import FileResult

PRICES: dict[str, Any] = {"usd_per_million_input": 1.0, "usd_per_million_output": 10.0}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_endpoint(monkeypatch, tmp_path)


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as running:
        yield running


def guide_at(url: str, seed: int = 0, **changes: Any) -> OpenAIGuide:
    changes = {"base_url": url, "max_retries": 0, "timeout_s": 5.0, "deadline_s": 2.0, **changes}
    return OpenAIGuide(GuideConfig.model_validate({"name": "openai:m", **changes}), seed=seed)


def request(prompt: str = "cat tree", **changes: Any) -> GuideRequest:
    return GuideRequest(Example(f"id of {prompt}", prompt), **{"max_new_tokens": 10, **changes})


def texts(answers: list[Answer]) -> list[str]:
    """In the order of the requests; failures are none."""
    found = []
    for answer in sorted(answers, key=lambda answer: answer.index):
        assert isinstance(answer.outcome, Completion), answer.outcome
        found.append(answer.outcome.text)
    return found


def bound(prompt: str, limit: int = 10) -> float:
    """The most that a request can cost: a token a byte, and sixteen for the message."""
    return ((len(prompt.encode()) + 16) * 1.0 + limit * 10.0) / 1e6


# the cache


def test_duplicates_in_a_stream_are_asked_once_and_all_answered(server: FakeOpenAI) -> None:
    server.plan = lambda n, seen: Reply(delay_s=0.1)
    wanted = ["a", "b", "a", "a", "c", "b", "a"]
    with closing(guide_at(server.url, concurrency=8)) as guide:
        answers = list(guide.stream(request(prompt) for prompt in wanted))
        assert Counter(seen.prompt for seen in server.requests) == {"a": 1, "b": 1, "c": 1}
        assert sorted(answer.index for answer in answers) == list(range(7))
        found = texts(answers)
        assert [found.index(text) for text in found] == [0, 1, 0, 0, 4, 1, 0]
        assert sum(isinstance(a.outcome, Completion) and a.outcome.cached for a in answers) == 4
        assert guide.meter.to_json()["calls"] == 3 and guide.meter.to_json()["cached"] == 4


def test_duplicates_of_a_failure_share_it(server: FakeOpenAI) -> None:
    server.plan = lambda n, seen: Reply(status=400, delay_s=0.1)
    with closing(guide_at(server.url, concurrency=4)) as guide:
        answers = list(guide.stream([request("a")] * 3))
    assert len(server.requests) == 1
    assert [isinstance(answer.outcome, Failure) for answer in answers] == [True] * 3


def test_a_hit_asks_nothing_and_says_what_it_cost_then(server: FakeOpenAI) -> None:
    with closing(guide_at(server.url, **PRICES)) as guide:
        (bought,) = guide.complete([request()])
    with closing(guide_at(server.url, **PRICES)) as guide:
        guide.charge_to("another run", BudgetConfig(max_calls=0))
        (hit,) = guide.complete([request()])
        assert guide.meter.to_json() == {
            "calls": 0, "cached": 1, "usage": {"prompt_tokens": 0, "completion_tokens": 0},
            "charged_usd": None, "unknown_outcome": 0, "unpriced": 0,
        }  # fmt: skip
    assert len(server.requests) == 1
    assert (hit.text, hit.nano_usd, hit.usage, hit.created) == (
        bought.text, bought.nano_usd, bought.usage, bought.created,
    )  # fmt: skip
    assert hit.cached and not bought.cached


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_index": 1}, {"prefix": "The"}, {"max_new_tokens": 11}, {"prompt": "cat  tree"},
        {"temperature": 0.5}, {"system": "Be brief."}, {"seed": 1}, {"stop": ["\n"]},
    ],
)  # fmt: skip
def test_all_that_decides_a_text_is_in_its_key(server: FakeOpenAI, changes: dict[str, Any]) -> None:
    with closing(guide_at(server.url)) as guide:
        guide.complete([request()])
    own = {name: value for name, value in changes.items() if name in ("system", "seed")}
    sampling = {name: value for name, value in changes.items() if name in ("temperature", "stop")}
    asked = {name: value for name, value in changes.items() if name not in {**own, **sampling}}
    with closing(guide_at(server.url, sampling=sampling, **own)) as guide:
        guide.complete([request(**asked)])
    assert len(server.requests) == 2


def test_who_asks_and_how_fast_is_in_no_key(server: FakeOpenAI) -> None:
    with closing(guide_at(server.url)) as guide:
        guide.complete([request()])
    with closing(guide_at(server.url, concurrency=2, timeout_s=9.0, max_retries=3, **PRICES)) as guide:
        other = GuideRequest(Example("another id", "cat tree", references=("x",)), max_new_tokens=10)
        assert guide.complete([other])[0].cached
    assert len(server.requests) == 1


def test_more_hits_than_are_looked_up_at_once(server: FakeOpenAI) -> None:
    with closing(guide_at(server.url)) as guide:
        guide.complete([request(str(i)) for i in range(600)])
    before = len(server.requests)
    with closing(guide_at(server.url, concurrency=2)) as guide:
        assert len(texts(list(guide.stream(request(str(i)) for i in range(600))))) == 600
    assert len(server.requests) == before


# replay and live


def test_a_replay_that_misses_names_the_request_and_asks_nobody(
    server: FakeOpenAI, guide_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with closing(guide_at(server.url)) as guide:
        guide.complete([request("there")])
    far = "https://api.example.com/v1"  # no key, and nobody may be asked
    with closing(guide_at(far, mode="replay")) as guide, pytest.raises(UserError) as caught:
        guide.complete([request("there")])
    assert "'id of there'" in caught.value.message  # another endpoint's text is another text
    with closing(guide_at(server.url, mode="replay")) as guide:
        assert guide.complete([request("there")])[0].cached
        with pytest.raises(UserError) as caught:
            guide.complete([request("there"), request("gone", sample_index=3, prefix="It was")])
        assert all(word in caught.value.message for word in ("openai:m", "'id of gone'", "sample 3", "'It was'", "10"))
        assert caught.value.where == str(guide_cache / "guide.sqlite")
        assert "record" in (caught.value.hint or "")
    assert len(server.requests) == 1


def test_live_mode_neither_reads_nor_keeps(server: FakeOpenAI) -> None:
    with closing(guide_at(server.url)) as guide:
        guide.complete([request("kept")])
    with closing(guide_at(server.url, mode="live")) as guide:
        answers = list(guide.stream([request("kept"), request("new"), request("new")]))
        assert not any(a.outcome.cached for a in answers if isinstance(a.outcome, Completion))
        assert guide.meter.to_json()["calls"] == 3
    assert Counter(seen.prompt for seen in server.requests) == {"kept": 2, "new": 2}
    with closing(Store.default()) as store:
        assert store.count() == 1


# failures


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=500), Reply(status=400), Reply(drop=True), Reply(raw=b"{"), Reply(body={"choices": []}),
        Reply(finish_reason="content_filter"), Reply(body={"model": "another"}), Reply(message={"content": None}),
    ],
)  # fmt: skip
def test_failures_are_never_kept(server: FakeOpenAI, reply: Reply) -> None:
    server.plan = lambda n, seen: reply if n == 0 else Reply(text="at last")
    with closing(guide_at(server.url)) as guide:
        first = next(guide.stream([request()])).outcome
        assert isinstance(first, Failure)
        assert guide.store.count() == 0
        assert guide.complete([request()])[0].text == "at last"


def test_attempt_gives_none_for_what_the_guide_would_not_write(server: FakeOpenAI) -> None:
    def plan(n: int, seen: Request) -> Reply:
        if seen.prompt.startswith("refused"):
            return Reply(finish_reason="content_filter")
        return Reply(status=500) if seen.prompt.startswith("broken") else Reply(text=seen.prompt)

    server.plan = plan
    with closing(guide_at(server.url)) as guide:

        def attempt(*prompts: str) -> list[str | None]:
            return [found.text if found else None for found in guide.attempt([request(p) for p in prompts])]

        assert attempt("a", "refused 1", "b") == ["a", None, "b"]
        assert attempt("refused 2", "refused 3") == [None, None]
        assert attempt("a", "broken 1", "b") == ["a", None, "b"]
        with pytest.raises(RlgfError, match=r"'id of broken 2'.*status 500"):
            attempt("broken 2", "broken 3")
        with pytest.raises(RlgfError, match="failed 1 of 2 requests"):
            guide.complete([request("a"), request("broken 4")])


# leases


def other_process(key_of: list[bytes], seconds: float = 60.0) -> Store:
    """A store that has claimed keys as a process of another machine."""
    other = Store.default()
    other.owner = "elsewhere:1:1.0"
    assert other.claim(key_of, seconds)[1] == set(key_of)
    return other


def test_what_another_process_asks_is_waited_for_and_taken(server: FakeOpenAI) -> None:
    with closing(guide_at(server.url, concurrency=2)) as guide:
        theirs = request("theirs")
        guide.complete([request("model")])
        (model,) = guide.store.texts([guide.key(request("model"))]).values()
        with closing(other_process([guide.key(theirs)])) as other:
            answer = model._replace(text="their answer")
            timer = threading.Timer(0.6, lambda: other.put([(guide.key(theirs), answer)]))
            timer.start()
            answers = list(guide.stream([theirs, request("ours"), theirs]))
            timer.join()
    assert [seen.prompt for seen in server.requests] == ["model", "ours"]
    assert texts(answers)[0] == texts(answers)[2] == "their answer"
    assert answers[0].request.example.prompt == "ours"  # others were asked meanwhile


@pytest.mark.parametrize("how", ["gives up", "runs out"])
def test_what_another_process_gave_up_is_asked(server: FakeOpenAI, how: str) -> None:
    with closing(guide_at(server.url)) as guide:
        keys = [guide.key(request("theirs"))]
        with closing(other_process(keys, 60.0 if how == "gives up" else 0.5)) as other:
            timer = threading.Timer(0.5, lambda: other.release(keys) if how == "gives up" else None)
            timer.start()
            began = time.monotonic()
            assert len(texts(list(guide.stream([request("theirs")] * 3)))) == 3
            assert time.monotonic() - began > 0.4
            timer.join()
    assert len(server.requests) == 1


def test_a_lease_lasts_as_long_as_its_request_waits(server: FakeOpenAI) -> None:
    """A rate limit or an outage can hold a request back for longer than any lease was made for."""
    answer = threading.Event()

    def plan(n: int, seen: Request) -> Reply:
        answer.wait(20)
        return Reply()

    server.plan = plan
    answers: list[Answer] = []
    with closing(guide_at(server.url, timeout_s=30.0)) as guide, closing(Store.default()) as other:
        guide.lease_s = 1.0
        asking = threading.Thread(target=lambda: answers.extend(guide.stream([request()])))
        asking.start()
        ends: set[float] = set()
        deadline = time.monotonic() + 15
        while len(ends) < 3 and time.monotonic() < deadline:
            ends |= {until for (until,) in other._db.execute("SELECT until FROM leases")}
            time.sleep(0.01)
        answer.set()
        asking.join()
        assert len(ends) >= 3  # it was renewed again and again
        assert len(texts(answers)) == 1
        assert other._db.execute("SELECT count(*) FROM leases").fetchone() == (0,)


def test_waiting_for_another_process_is_said(server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guide_stream, "_REPORT_S", 0.3)
    said: list[str] = []
    with closing(guide_at(server.url)) as guide:
        guide.notify = said.append
        keys = [guide.key(request("theirs"))]
        with closing(other_process(keys, 1.5)):
            assert len(texts(list(guide.stream([request("theirs")])))) == 1
    assert said and said[0] == "waiting for 1 texts that another process, or a batch, has requested"


def test_no_lease_outlives_a_stream(server: FakeOpenAI) -> None:
    server.plan = lambda n, seen: Reply(status=400) if seen.prompt == "1" else Reply(delay_s=30.0 if n > 4 else 0.0)
    with closing(guide_at(server.url, concurrency=4)) as guide:
        with closing(guide.stream(request(str(i)) for i in range(50))) as answers:
            for _ in range(5):
                next(answers)
            assert guide.store._db.execute("SELECT count(*) FROM leases").fetchone()[0] > 0  # some are on their way
        with closing(Store.default()) as store:
            assert store._db.execute("SELECT count(*) FROM leases").fetchone() == (0,)


# charges


@pytest.mark.parametrize(
    ("reply", "charged"),
    [
        (Reply(text="two words"), (2 * 1.0 + 2 * 10.0) / 1e6),
        (Reply(text="two words", body={"usage": None}), bound("cat tree")),
        (Reply(text="two words", body={"usage": {"prompt_tokens": 2}}), bound("cat tree")),
        (Reply(text="w " * 9 + "w", finish_reason="content_filter"), (2 * 1.0 + 10 * 10.0) / 1e6),  # paid all the same
        (Reply(text="a b c", body={"model": "another"}), (2 * 1.0 + 3 * 10.0) / 1e6),
        (Reply(delay_s=3.0), bound("cat tree")),
        (Reply(drop=True), bound("cat tree")),
        (Reply(raw=b'{"choices": [', claimed_length=400), bound("cat tree")),
        (Reply(raw=b'{"choices": ['), bound("cat tree")),
        (Reply(status=400), 0.0),
        (Reply(status=429), 0.0),
        (Reply(status=500), 0.0),
        (Reply(status=503), 0.0),
    ],
    ids=["text", "no usage", "half usage", "filtered", "model", "timeout", "drop", "half body", "not JSON",
         "400", "429", "500", "503"],
)  # fmt: skip
def test_what_an_outcome_is_charged(server: FakeOpenAI, reply: Reply, charged: float) -> None:
    server.plan = lambda n, seen: reply
    with closing(guide_at(server.url, timeout_s=0.5, deadline_s=0.2, **PRICES)) as guide:
        guide.charge_to("run")
        (answer,) = guide.stream([request()])
        spend = guide.meter.to_json()
    assert isinstance(answer.outcome, Completion) == (reply.text is not None and reply.text.count(" ") == 1)
    assert spend["charged_usd"] == (pytest.approx(charged, abs=1e-12) if charged else None)
    # answered without usage is charged at the bound too, and known to be answered
    unknown = charged == bound("cat tree") and reply.text is None
    assert (spend["calls"], spend["unknown_outcome"]) == (int(charged > 0), int(unknown))


def test_a_refused_connection_costs_nothing() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with closing(guide_at(url, **PRICES)) as guide:
        guide.charge_to("run", BudgetConfig(max_calls=1, max_cost_usd=1.0))
        for _ in range(3):
            (answer,) = guide.stream([request()])
            assert isinstance(answer.outcome, Failure) and answer.outcome.kind == "connection"
        assert guide.meter.to_json()["calls"] == 0 and guide.meter.to_json()["charged_usd"] is None


def test_every_attempt_is_charged(server: FakeOpenAI) -> None:
    plan = [Reply(drop=True), Reply(status=500), Reply(raw=b"{"), Reply(text="a b")]
    server.plan = lambda n, seen: plan[n]
    with closing(guide_at(server.url, max_retries=4, deadline_s=30.0, **PRICES)) as guide:
        guide.charge_to("run")
        guide.complete([request()])
        spend = guide.meter.to_json()
    assert spend["calls"] == 3 and spend["unknown_outcome"] == 2
    assert spend["charged_usd"] == pytest.approx(2 * bound("cat tree") + 22e-6, abs=1e-12)


def over(factor: int) -> Reply:
    """An answer that costs ``factor`` times the bound of ``cat tree``: 124 tokens' worth."""
    return Reply(text="x", body={"usage": {"prompt_tokens": 124 * factor, "completion_tokens": 0}})


def test_an_answer_above_the_bound_raises_the_bounds_of_later_ones(server: FakeOpenAI) -> None:
    assert bound("cat tree") == pytest.approx(124e-6)
    server.plan = lambda n, seen: over(3) if n == 0 else Reply(delay_s=3.0)
    with closing(guide_at(server.url, timeout_s=0.5, **PRICES)) as guide:
        guide.charge_to("run")
        guide.complete([request("cat tree")])
        assert guide.meter.to_json()["charged_usd"] == pytest.approx(3 * 124e-6)
        list(guide.stream([request("cat food")]))  # as long, and its outcome is never known
        assert guide.meter.to_json()["charged_usd"] == pytest.approx(6 * 124e-6)


def test_many_answers_above_the_bound_raise_it_once(server: FakeOpenAI) -> None:
    """All that were under way together tell the same: their factors are not multiplied."""
    prompts = [f"cat {i:04d}" for i in range(8)]
    server.plan = lambda n, seen: over(2) if n < 8 else Reply(delay_s=3.0)
    release = threading.Barrier(8, timeout=10)

    def plan(n: int, seen: Request) -> Reply:
        if n < 8:
            release.wait()
            return over(2)
        return Reply(delay_s=3.0)

    server.plan = plan
    with closing(guide_at(server.url, timeout_s=1.0, concurrency=8, **PRICES)) as guide:
        guide.charge_to("run")
        guide.complete([request(prompt) for prompt in prompts])
        before = guide.meter.to_json()["charged_usd"]
        assert before == pytest.approx(8 * 2 * 124e-6)
        list(guide.stream([request("cat food")]))
        assert guide.meter.to_json()["charged_usd"] - before == pytest.approx(2 * 124e-6)


def test_usage_that_no_number_can_be_is_no_usage(server: FakeOpenAI) -> None:
    server.plan = lambda n, seen: Reply(text="x", body={"usage": {"prompt_tokens": 10**30, "completion_tokens": 1}})
    with closing(guide_at(server.url, **PRICES)) as guide:
        guide.charge_to("run")
        assert guide.complete([request("cat tree")])[0].usage.get("prompt_tokens") is None
        assert guide.meter.to_json()["charged_usd"] == pytest.approx(bound("cat tree"))


def test_a_model_name_that_no_file_can_hold(server: FakeOpenAI) -> None:
    server.plan = lambda n, seen: Reply(text="x", body={"model": "m@\ud800"})
    with closing(guide_at(server.url)) as guide:
        (answer,) = guide.stream([request("cat tree")])
    assert isinstance(answer.outcome, Failure) or answer.outcome.model.isascii()


def test_a_cap_in_dollars_needs_a_price(server: FakeOpenAI) -> None:
    with closing(guide_at(server.url)) as guide:
        with pytest.raises(UserError, match="needs a price") as caught:
            guide.charge_to("run", BudgetConfig(max_cost_usd=1.0))
        assert "usd_per_million_input" in (caught.value.hint or "") and "--max-calls" in (caught.value.hint or "")
        guide.charge_to("run", BudgetConfig(max_calls=1))


def test_a_budget_ends_a_stream_after_what_it_paid_for(server: FakeOpenAI) -> None:
    server.plan = lambda n, seen: Reply(delay_s=0.05)
    with closing(guide_at(server.url, concurrency=4)) as guide:
        guide.charge_to("run", BudgetConfig(max_calls=10))
        given = []
        with pytest.raises(StoppedEarly, match="10 of 10 calls"):
            for answer in guide.stream(request(str(i)) for i in range(50)):
                given.append(answer)
        assert len(texts(given)) == 10 == len(server.requests)
        assert guide.complete([given[0].request])[0].cached  # what was bought is there
        with closing(Store.default()) as store:
            assert store._db.execute("SELECT count(*) FROM leases").fetchone() == (0,)


# what the stage does with an output that is there


def collect(server: FakeOpenAI, folder: Path, existing: str = "refuse", **flags: Any) -> FileResult:
    data = write_rows(folder / "data.jsonl", [{"id": f"p{i}", "prompt": f"prompt {i}"} for i in range(4)])
    values = {"guide": "openai:m", "guide.base_url": server.url, "guide.max_retries": 0, "data": str(data)}
    more = {key.replace("__", "."): value for key, value in flags.items()}
    resolved = resolve(CollectGuideConfig, flags={**values, "output": str(folder / "guide.jsonl"), **more})
    return stage.run(resolved, existing=existing)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"budget__max_cost_usd": 1.0}, "needs a price"),
        ({"batch": True, "guide__mode": "live"}, "guide.mode is live"),
    ],
)
def test_what_is_refused_replaces_no_file(
    server: FakeOpenAI, tmp_path: Path, flags: dict[str, Any], message: str
) -> None:
    collect(server, tmp_path)
    before = (tmp_path / "guide.jsonl").read_bytes()
    assert len(before.splitlines()) == 4
    with pytest.raises(UserError, match=message):
        collect(server, tmp_path, "overwrite", **flags)
    assert (tmp_path / "guide.jsonl").read_bytes() == before
    assert (tmp_path / "guide.jsonl.run.json").exists()


def test_what_was_paid_is_remembered_though_no_text_came(server: FakeOpenAI, tmp_path: Path) -> None:
    """Three answers by another model end the run: they were paid for, and count for the caps of the next one."""
    server.plan = lambda n, seen: Reply(body={"model": "somebody-else"})
    with pytest.raises(UserError, match="somebody-else"):
        collect(server, tmp_path, guide__concurrency=1, budget__max_calls=4)
    manifest = json.loads((tmp_path / "guide.jsonl.run.json").read_text())
    assert manifest["spend"]["calls"] == len(server.requests) == 3
    with pytest.raises(StoppedEarly, match="4 of 4 calls"):
        collect(server, tmp_path, "resume", budget__max_calls=4, guide__accept_models=["somebody-else"])
    assert len(server.requests) == 4
