"""``rlgf collect-guide`` against a server that misbehaves by plan; the server's own ledger is the judge.

Times and shares are small, numbers are not: what is tested is what happens among thousands of calls.
"""

from __future__ import annotations

import math
import sqlite3
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

import fake_openai
from collecting import PRICES, collect, environment, lines, prompts_file, rows, spend, start
from conftest import write_rows


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment(monkeypatch, tmp_path)


def given(ledger: fake_openai.Ledger) -> Counter[tuple[str, str]]:
    """``(id, text)`` of every text that the server has given whole, with the default texts."""
    whole = [asked.request for asked in ledger.all() for end in asked.ends if end == fake_openai.WHOLE]
    return Counter((f"p{request.prompt.split()[1]}", fake_openai.text_for(request)) for request in whole)


def total(amounts: Iterable[float]) -> float:
    """In dollars, to the billionth: prices are whole billionths, sums of floats are not."""
    return round(math.fsum(amounts), 9)


def assert_books_agree(out: Path, ledger: fake_openai.Ledger) -> None:
    """The run was charged what was answered, at its price, and all that nobody knows the end of, at the bound."""
    calls, booked = ledger.calls(), spend(out)
    ends = Counter(call.end for call in calls)
    assert booked["unknown_outcome"] == ends[fake_openai.UNKNOWN]
    assert booked["calls"] == ends[fake_openai.WHOLE] + ends[fake_openai.FLAWED] + ends[fake_openai.UNKNOWN]
    answered = total(call.price or 0.0 for call in calls)
    assert booked["charged_usd"] == total(call.charge for call in calls) >= answered > 0
    assert (booked["charged_usd"] > answered) == (ends[fake_openai.UNKNOWN] > 0)


@pytest.mark.parametrize(("prompts", "seed"), [(250, 1), pytest.param(2000, 2, marks=pytest.mark.slow)])
def test_a_server_with_every_fault_loses_no_text_and_gives_none_twice(tmp_path: Path, prompts: int, seed: int) -> None:
    samples = 2
    data, out = prompts_file(tmp_path, prompts), tmp_path / "guide.jsonl"
    faults = fake_openai.misbehaviour(seed, share=0.05, hang_s=60.0, retry_after="0.2")
    with fake_openai.FakeOpenAI(faults, prices=PRICES) as server:
        code, err = collect(server.url, data, out, "--concurrency", "128", "--timeout", "4", "--max-retries", "6")
        assert code == 0, err
        calls = sum(faults.happened.values())
        assert calls > 1.5 * prompts * samples and all(
            0.025 < faults.happened[kind] / calls < 0.075 for kind in fake_openai.KINDS
        )
        # complete
        found = rows(out)
        assert {(name, k) for name, k, _ in found} == {(f"p{i}", k) for i in range(prompts) for k in range(samples)}
        # what came whole is there, and it was asked for once more by nobody
        assert Counter((name, text) for name, _, text in found) == given(server.ledger)
        for asked in server.ledger.all():
            assert asked.ends.index(fake_openai.WHOLE) == len(asked.ends) - 1, asked.ends
        assert {row["model"] for row in lines(out)} == {"m-0613"}
        assert_books_agree(out, server.ledger)
        # and from now on nothing is asked at all
        code, err = collect(server.url, data, tmp_path / "again.jsonl")
        assert code == 0, err
        assert rows(tmp_path / "again.jsonl") == found and len(server.ledger.calls()) == calls
    assert spend(tmp_path / "again.jsonl")["calls"] == 0 and spend(tmp_path / "again.jsonl")["cached"] == len(found)


@pytest.mark.parametrize("share", [0.0, 0.03], ids=["lengths", "lengths and faults"])
def test_a_cap_in_dollars_holds_among_64_calls_at_once(tmp_path: Path, share: float) -> None:
    data, out = prompts_file(tmp_path, 400), tmp_path / "guide.jsonl"
    most, cap = 100, 0.12
    calls = ("--concurrency", "64", "--max-new-tokens", str(most), "--timeout", "4")
    texts = fake_openai.lengths(5)
    plan = fake_openai.misbehaviour(
        5, share, hang_s=60.0, retry_after="0.1", otherwise=lambda n, request: replace(texts(n, request), delay_s=0.3)
    )
    with fake_openai.FakeOpenAI(plan, prices=PRICES) as server:
        code, err = collect(server.url, data, out, *calls, "--max-cost-usd", str(cap))
        assert code == 3 and "--resume" in err, err
        assert server.most_in_flight > 40
        bound = max(call.bound for call in server.ledger.calls())
        # the server's own sum, with all that it may have worked for, is under the cap, and so is the run's;
        # the cap was used up to what one more call could cost
        assert total(call.charge for call in server.ledger.calls()) <= cap
        assert cap - bound < spend(out)["charged_usd"] <= cap
        assert_books_agree(out, server.ledger)
        partial = rows(out)
        assert 0 < len(partial) < 800
        assert Counter(call.end for call in server.ledger.calls())[fake_openai.WHOLE] == len(partial)
        # the same cap again leaves no room, and asks nothing
        before = len(server.requests)
        code, err = collect(server.url, data, out, *calls, "--max-cost-usd", str(cap), "--resume")
        assert code == 3 and len(server.requests) == before, err
        assert rows(out) == partial
        # a higher one completes it
        code, err = collect(server.url, data, out, *calls, "--max-cost-usd", "5", "--resume")
        assert code == 0, err
        assert_books_agree(out, server.ledger)
        assert all(asked.ends.count(fake_openai.WHOLE) == 1 for asked in server.ledger.all())
    assert rows(out) > partial and len(rows(out)) == 800


def test_a_cap_in_calls_holds(tmp_path: Path) -> None:
    data, out = prompts_file(tmp_path, 150), tmp_path / "guide.jsonl"
    plan = fake_openai.misbehaviour(2, share=0.05, kinds=["429", "500", "drop", "no_choice"])
    more = ("--concurrency", "64")
    with fake_openai.FakeOpenAI(plan, prices=PRICES) as server:
        code, err = collect(server.url, data, out, *more, "--max-calls", "120")
        assert code == 3, err
        ends = Counter(call.end for call in server.ledger.calls())
        assert (
            ends[fake_openai.WHOLE] + ends[fake_openai.FLAWED] + ends[fake_openai.UNKNOWN] == 120 == spend(out)["calls"]
        )
        assert len(rows(out)) == ends[fake_openai.WHOLE] > 100
        code, err = collect(server.url, data, out, *more, "--max-calls", "1000", "--resume")
        assert code == 0, err
        assert_books_agree(out, server.ledger)
    assert len(rows(out)) == 300


def test_two_processes_with_one_cache_pay_for_nothing_twice(tmp_path: Path) -> None:
    data = prompts_file(tmp_path, 400)
    with fake_openai.in_a_process("--prices", *map(str, PRICES), "--delay", "0.2") as url:
        outs = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
        both = [start(url, data, out, "--concurrency", "32") for out in outs]
        for process in both:
            _, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
        ledger = fake_openai.Ledger.of(url)
    assert {tuple(asked.ends) for asked in ledger.all()} == {
        (fake_openai.WHOLE,)
    }  # one call for every text, of all that came
    assert len(ledger.all()) == 800
    assert rows(outs[0]) == rows(outs[1]) and len(rows(outs[0])) == 800
    spends = [spend(out) for out in outs]
    for booked in spends:
        assert booked["calls"] + booked["cached"] == 800 and min(booked["calls"], booked["cached"]) > 50
    assert total(booked["charged_usd"] for booked in spends) == total(call.charge for call in ledger.calls())
    with sqlite3.connect(tmp_path / "cache" / "guide.sqlite") as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("SELECT count(*) FROM texts").fetchone() == (800,)
        assert db.execute("SELECT count(*) FROM leases").fetchone() == (0,)


def test_two_processes_among_faults(tmp_path: Path) -> None:
    """What one process gives up or never hears of, the other may ask for; what came whole is paid once."""
    data = prompts_file(tmp_path, 100)
    faults = fake_openai.misbehaviour(2, share=0.04, hang_s=60.0, retry_after="0.1")
    with fake_openai.FakeOpenAI(faults, prices=PRICES) as server:
        outs = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
        more = ("--concurrency", "32", "--timeout", "4")
        both = [start(server.url, data, out, *more) for out in outs]
        for process in both:
            _, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
        for asked in server.ledger.all():
            assert asked.ends.index(fake_openai.WHOLE) == len(asked.ends) - 1, asked.ends
        charged = total(spend(out)["charged_usd"] for out in outs)
        assert charged == total(call.charge for call in server.ledger.calls())
    assert rows(outs[0]) == rows(outs[1]) and len(rows(outs[0])) == 200


def test_one_prompt_twice_in_the_data_is_one_purchase(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", [{"id": f"p{i}", "prompt": f"prompt {i % 5}"} for i in range(20)])
    with fake_openai.FakeOpenAI(lambda n, request: fake_openai.Reply(delay_s=0.05), prices=PRICES) as server:
        code, err = collect(server.url, data, tmp_path / "guide.jsonl", "--concurrency", "16")
        assert code == 0, err
        assert [asked.ends for asked in server.ledger.all()] == [[fake_openai.WHOLE]] * 10
    assert len(rows(tmp_path / "guide.jsonl")) == 40
