"""A collection that is killed at any moment and run again: nothing is lost, nothing on disk is bought again."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from collecting import PRICES, Row, collect, environment, kill, lines, prompts_file, rows, spend, start
from fake_openai import FakeOpenAI, Plan, Reply, Request, fraction, misbehaviour, text_for

PROMPTS, SAMPLES = 40, 2
MORE = ("--concurrency", "8", "--max-retries", "10")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment(monkeypatch, tmp_path)


def plan(seed: int) -> Plan:
    """Answers after 5 to 35 ms; every second seed has faults too."""
    share = 0.03 if seed % 2 else 0.0

    def answer(n: int, request: Request) -> Reply:
        return Reply(delay_s=0.005 + 0.03 * fraction(seed, request.key))

    faults = ["429_retry_after", "drop", "half_body", "no_choice"]
    return misbehaviour(seed, share, faults, retry_after="0.05", otherwise=answer)


def on_disk(out: Path, cache: Path, copy: Path) -> tuple[set[str], set[str]]:
    """Texts in the output and in the cache, as a kill has left them; nothing is changed by looking."""
    written = set()
    if out.exists():
        whole = [line for line in out.read_bytes().split(b"\n")[:-1] if line]
        (copy.parent / "whole.jsonl").write_bytes(b"".join(line + b"\n" for line in whole))
        written = {row["completion"] for row in lines(copy.parent / "whole.jsonl")}
    kept = set()
    if cache.exists():
        shutil.copytree(cache, copy)
        with closing(sqlite3.connect(copy / "guide.sqlite")) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            if db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'texts'").fetchone()[0]:
                kept = {text for (text,) in db.execute("SELECT text FROM texts")}
        shutil.rmtree(copy)
    return written, kept


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[Row]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch, FakeOpenAI() as server:
        environment(patch, folder)
        code, err = collect(server.url, prompts_file(folder, PROMPTS), folder / "guide.jsonl")
        assert code == 0, err
    found = rows(folder / "guide.jsonl")
    assert len(found) == PROMPTS * SAMPLES
    yield found


def moment(seed: int) -> tuple[int, float]:
    """Requests that have come, and seconds after that."""
    return int(fraction("requests", seed) * (PROMPTS * SAMPLES + 1)), 0.04 * fraction("delay", seed)


@pytest.mark.parametrize("seed", [1, 2, 4, *(pytest.param(100 + n, marks=pytest.mark.slow) for n in range(50))])
def test_killed_at_any_moment(tmp_path: Path, undisturbed: set[Row], seed: int) -> None:
    data, out, cache = prompts_file(tmp_path, PROMPTS), tmp_path / "guide.jsonl", tmp_path / "cache"
    with FakeOpenAI(plan(seed), prices=PRICES) as server:
        running = kill(start(server.url, data, out, *MORE), server, *moment(seed))
        if seed < 100:
            assert running
        written, kept = on_disk(out, cache, tmp_path / "copy")
        assert written <= kept  # a text is in the cache before it is anywhere else
        before = {asked.request.key: len(asked.calls) for asked in server.ledger.all()}
        code, err = collect(server.url, data, out, *MORE, "--resume")
        assert code == 0, err
        for asked in server.ledger.all():
            if text_for(asked.request) in written | kept:
                assert len(asked.calls) == before[asked.request.key], asked.request.prompt
        # every call that the server saw was booked before it was sent, and is still
        booked, calls = spend(out), server.ledger.calls()
        seen = [call for call in calls if not call.end.startswith("4")]
        assert booked["calls"] >= len(seen)
        assert booked["charged_usd"] >= sum(call.charge for call in seen) - 1e-12
    assert rows(out) == undisturbed


def test_killed_again_and_again(tmp_path: Path, undisturbed: set[Row]) -> None:
    data, out = prompts_file(tmp_path, PROMPTS), tmp_path / "guide.jsonl"
    with FakeOpenAI(plan(6), prices=PRICES) as server:
        for n, requests in enumerate((9, 30, 55)):
            assert kill(start(server.url, data, out, *MORE, "--resume"), server, requests, 0.01 * n)
        written, kept = on_disk(out, tmp_path / "cache", tmp_path / "copy")
        assert len(kept) > 20
        before = len(server.requests)
        code, err = collect(server.url, data, out, *MORE, "--resume")
        assert code == 0, err
        assert len(server.requests) - before == PROMPTS * SAMPLES - len(written | kept)
    assert rows(out) == undisturbed


def test_what_a_killed_process_had_claimed_goes_to_the_other_one(tmp_path: Path, undisturbed: set[Row]) -> None:
    """The leases of a process that is gone are no reason to wait."""
    data, outs = prompts_file(tmp_path, PROMPTS), [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    with FakeOpenAI(lambda n, request: Reply(delay_s=0.1), prices=PRICES) as server:
        one, two = (start(server.url, data, out, *MORE) for out in outs)
        assert kill(one, server, 24, 0.02)
        _, err = two.communicate(timeout=60)
        assert two.returncode == 0, err
        assert rows(outs[1]) == undisturbed
        before = len(server.requests)
        code, err = collect(server.url, data, outs[0], *MORE, "--resume")
        assert code == 0, err
        assert len(server.requests) == before  # the other one has bought all of it
        repeated = [asked for asked in server.ledger.all() if len(asked.calls) > 1]
        assert len(repeated) <= 8  # at most what was under way when the kill came
    assert rows(outs[0]) == undisturbed
