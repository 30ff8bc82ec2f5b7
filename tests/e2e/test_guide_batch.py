"""``collect-guide --batch``: half the price, and no request paid twice, wherever a process ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from collecting import PRICES, Row, collect, environment, lines, prompts_file, rows, spend, start
from fake_openai import FakeOpenAI, Reply, Request
from rlgf_cli.config.collect_guide import CollectGuideConfig
from rlgf_cli.config.loader import resolve
from rlgf_cli.errors import StoppedEarly
from rlgf_cli.guides.openai import batch
from rlgf_cli.ledger.store import Store
from rlgf_cli.stages import collect_guide

PROMPTS = 12
ALL = 2 * PROMPTS  # two samples each
BATCH = ("--batch", "--max-new-tokens", "12", "--set", "guide.batch_poll_s=0.05", "--set", "guide.batch_price=0.5")
AGAIN = (*BATCH, "--resume")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment(monkeypatch, tmp_path)


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI(prices=PRICES) as running:
        yield running


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return prompts_file(tmp_path, PROMPTS), tmp_path / "guide.jsonl"


def batches(server: FakeOpenAI) -> list[Any]:
    return list(server.batches._state.batches.values())


def answered(server: FakeOpenAI) -> float:
    return round(sum(call.price or 0.0 for call in server.ledger.calls()), 9)


def assert_complete_and_paid_once(server: FakeOpenAI, out: Path) -> None:
    assert len(rows(out)) == ALL
    assert [asked.ends for asked in server.ledger.all()] == [["whole"]] * ALL
    booked = spend(out)
    assert (booked["calls"], booked["unknown_outcome"]) == (ALL, 0)
    assert booked["charged_usd"] == answered(server) > 0
    assert round(sum(row["cost_usd"] for row in lines(out)), 9) == answered(server)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> set[Row]:
    """What comes without a batch."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch, FakeOpenAI() as server:
        environment(patch, folder)
        more = ("--max-new-tokens", "12")
        code, err = collect(server.url, prompts_file(folder, PROMPTS), folder / "guide.jsonl", *more)
        assert code == 0, err
    return rows(folder / "guide.jsonl")


def test_a_batch_brings_the_same_texts_at_half_the_price(
    server: FakeOpenAI, files: tuple[Path, Path], undisturbed: set[Row]
) -> None:
    data, out = files
    code, err = collect(server.url, data, out, *BATCH)
    assert code == 0, err
    assert server.requests == [] and len(batches(server)) == 1  # nothing was asked outside of it
    assert_complete_and_paid_once(server, out)
    assert rows(out) == undisturbed
    usage = spend(out)["usage"]
    whole = (usage["prompt_tokens"] * PRICES[0] + usage["completion_tokens"] * PRICES[1]) / 1e6
    assert spend(out)["charged_usd"] == pytest.approx(whole / 2)
    assert all(row["model"] == "m-0613" for row in lines(out))
    assert f"batch_1: {ALL} requests sent" in err
    before = len(server.batches.log)
    code, err = collect(server.url, data, out, *AGAIN)
    assert code == 0 and len(batches(server)) == 1, err
    assert not [path for method, path in server.batches.log[before:] if method == "POST"]


def test_what_the_cache_holds_is_in_no_batch(server: FakeOpenAI, files: tuple[Path, Path], tmp_path: Path) -> None:
    data, out = files
    more = ("--max-new-tokens", "12")
    code, err = collect(server.url, data, tmp_path / "first.jsonl", "--limit", "5", *more)
    assert code == 0, err
    code, err = collect(server.url, data, out, *BATCH)
    assert code == 0, err
    (only,) = batches(server)
    assert len(only.lines) == ALL - 10 and len(rows(out)) == ALL
    assert spend(out)["calls"] == ALL - 10
    code, err = collect(server.url, data, tmp_path / "third.jsonl", *BATCH)
    assert code == 0 and len(batches(server)) == 1, err


def test_one_prompt_twice_in_the_data_is_in_a_batch_once(server: FakeOpenAI, tmp_path: Path) -> None:
    data = tmp_path / "twice.jsonl"
    data.write_text("".join(f'{{"id": "p{i}", "prompt": "prompt {i % 3}"}}\n' for i in range(9)))
    code, err = collect(server.url, data, tmp_path / "guide.jsonl", *BATCH)
    assert code == 0, err
    assert len(batches(server)[0].lines) == 6 and len(rows(tmp_path / "guide.jsonl")) == 18


def test_the_completion_api(server: FakeOpenAI, files: tuple[Path, Path]) -> None:
    data, out = files
    code, err = collect(server.url, data, out, *BATCH, "--api", "completion")
    assert code == 0, err
    assert {request.path for _, request in batches(server)[0].lines} == {"/v1/completions"}
    assert_complete_and_paid_once(server, out)


# budgets


def bound(number: int) -> float:
    """The most that a request can cost in a batch."""
    return 0.5 * ((len(f"prompt {number}") + 16) * PRICES[0] + 12 * PRICES[1]) / 1e6


@pytest.mark.parametrize("cap", [("--max-cost-usd", f"{10.5 * bound(1):.9f}"), ("--max-calls", "10")])
def test_a_budget_smaller_than_the_whole(
    server: FakeOpenAI, files: tuple[Path, Path], undisturbed: set[Row], cap: tuple[str, str]
) -> None:
    data, out = files
    code, err = collect(server.url, data, out, *BATCH, *cap)
    assert code == 3, err
    assert len(batches(server)[0].lines) == 10  # as many as the cap has room for
    assert "--resume" in err and "are charged" in err
    assert len(rows(out)) == 10 and rows(out) <= undisturbed  # what was bought is in the file
    assert spend(out)["charged_usd"] == answered(server)
    if cap[0] == "--max-calls":
        code, err = collect(server.url, data, out, *AGAIN, *cap)
        assert code == 3 and len(batches(server)) == 1, err
    else:  # real prices were lower than the bounds: there is room again
        for _ in range(20):
            code, err = collect(server.url, data, out, *AGAIN, *cap)
            if code != 3 or not batches(server)[-1].lines:
                break
            assert spend(out)["charged_usd"] <= float(cap[1])
    code, err = collect(server.url, data, out, *AGAIN)
    assert code == 0, err
    assert_complete_and_paid_once(server, out)
    assert rows(out) == undisturbed


def test_a_budget_with_no_room_at_all_orders_nothing(server: FakeOpenAI, files: tuple[Path, Path]) -> None:
    data, out = files
    code, err = collect(server.url, data, out, *BATCH, "--max-cost-usd", "0.00001")
    assert code == 3, err
    assert batches(server) == [] and spend(out)["calls"] == 0
    code, err = collect(server.url, data, out, *AGAIN)
    assert code == 0, err
    assert_complete_and_paid_once(server, out)


@pytest.mark.parametrize(("calls", "sizes"), [(None, [5, 5, 5, 5, 4]), (13, [5, 5, 3]), (10, [5, 5]), (0, [])])
def test_many_batches_of_many_windows(
    server: FakeOpenAI,
    files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    calls: int | None,
    sizes: list[int],
) -> None:
    monkeypatch.setattr(batch, "LARGEST", 5)
    monkeypatch.setattr(batch, "_AT_ONCE", 3)
    data, out = files
    flags = {
        "guide": "openai:m", "guide.base_url": server.url, "data": str(data), "output": str(out), "samples": 2,
        "guide.batch_poll_s": 0.01, "batch": True, "budget.max_calls": calls,
    }  # fmt: skip
    with contextlib.suppress(StoppedEarly) if calls is not None else contextlib.nullcontext():
        collect_guide.run(resolve(CollectGuideConfig, flags=flags))
    assert [len(each.lines) for each in batches(server)] == sizes
    assert len(rows(out)) == sum(sizes) == spend(out)["calls"]
    flags["budget.max_calls"] = None
    collect_guide.run(resolve(CollectGuideConfig, flags=flags), existing="resume")
    assert len(rows(out)) == ALL
    assert [asked.ends for asked in server.ledger.all()] == [["whole"]] * ALL
    with contextlib.closing(Store.default()) as store:
        for table in ("leases", "batches", "batched", "calls"):
            assert store._db.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), table


# what a batch does not answer


def test_lines_that_fail_are_reported_and_asked_again(
    server: FakeOpenAI, files: tuple[Path, Path], undisturbed: set[Row]
) -> None:
    data, out = files

    def line(n: int, request: Request) -> Reply:
        number = int(request.prompt.split()[1])
        if number == 1:
            return Reply(status=400, error={"message": "this line is not to my taste"})
        if number == 2:
            return Reply(drop=True)
        if number == 3:
            return Reply(finish_reason="content_filter")  # an answer, and paid, and no text
        if number == 4:
            return Reply(body={"model": "somebody-else"}) if n % 2 else Reply(body={"choices": []})
        return Reply()

    server.batches.line = line
    code, err = collect(server.url, data, out, *BATCH)
    assert code == 1, err
    assert "10 of 24 without text" not in err and "8 of 24 without text" in err
    assert "status 400: this line is not to my taste: 2" in err and "8 of 24 texts are still missing" in err
    assert len(rows(out)) == ALL - 8
    booked = spend(out)
    assert booked["charged_usd"] == answered(server)  # what was answered is paid, whatever it is worth
    assert (booked["calls"], booked["unknown_outcome"]) == (ALL - 4, 0)
    server.batches.line = None
    code, err = collect(server.url, data, out, *AGAIN)
    assert code == 0, err
    assert rows(out) == undisturbed
    assert Counter(request.prompt for _, request in batches(server)[1].lines) == {
        f"prompt {i}": 2 for i in (1, 2, 3, 4)
    }
    assert spend(out)["charged_usd"] == answered(server)


def test_an_answer_without_usage_is_paid_at_the_bound(server: FakeOpenAI, files: tuple[Path, Path]) -> None:
    data, out = files
    server.batches.line = lambda n, request: Reply(body={"usage": None}) if n == 3 else Reply()
    code, err = collect(server.url, data, out, *BATCH)
    assert code == 0, err
    assert spend(out)["charged_usd"] == round(sum(call.charge for call in server.ledger.calls()), 9)
    assert spend(out)["charged_usd"] > answered(server)


def test_a_batch_that_fails_costs_nothing(server: FakeOpenAI, files: tuple[Path, Path]) -> None:
    data, out = files
    server.batches.end = "failed"
    code, err = collect(server.url, data, out, *BATCH)
    assert code == 1 and "refused batch batch_1: planned to fail" in err, err
    assert "collect without --batch" in err
    assert spend(out)["calls"] == 0 and not spend(out)["charged_usd"]
    server.batches.end = "completed"
    code, err = collect(server.url, data, out, *AGAIN)
    assert code == 0, err
    assert len(rows(out)) == ALL and spend(out)["calls"] == ALL
    assert spend(out)["charged_usd"] == answered(server)


def test_a_batch_that_expires_gives_what_it_has(
    server: FakeOpenAI, files: tuple[Path, Path], undisturbed: set[Row]
) -> None:
    data, out = files
    server.batches.end, server.batches.done = "expired", 7
    code, err = collect(server.url, data, out, *BATCH)
    assert code == 1, err
    assert "(expired)" in err and "17 of 24 without text" in err and "expired before this line: 17" in err
    assert len(rows(out)) == 7 and spend(out)["calls"] == 7
    server.batches.end, server.batches.done = "completed", None
    code, err = collect(server.url, data, out, *AGAIN)
    assert code == 0, err
    assert len(batches(server)[1].lines) == ALL - 7
    assert rows(out) == undisturbed and spend(out)["charged_usd"] == answered(server)


def test_a_wrong_model_throughout_is_said_and_the_batch_is_not_lost(
    server: FakeOpenAI, files: tuple[Path, Path]
) -> None:
    data, out = files
    server.model = "somebody-else"
    code, err = collect(server.url, data, out, *BATCH)
    assert code == 2 and "somebody-else" in err and "accept_models" in err
    code, err = collect(server.url, data, out, *AGAIN, "--set", "guide.accept_models=[somebody-else]")
    assert code == 0, err
    assert len(batches(server)) == 1
    assert_complete_and_paid_once(server, out)


# connections


@pytest.mark.parametrize(
    "lost", [("POST", "/v1/batches"), ("POST", "/v1/files"), ("GET", "/v1/batches/batch_1"), ("GET", "/content")]
)
def test_an_answer_that_is_lost_orders_nothing_twice(
    server: FakeOpenAI, files: tuple[Path, Path], lost: tuple[str, str]
) -> None:
    data, out = files
    times: Counter[tuple[str, str]] = Counter()

    def drop(method: str, path: str) -> bool:
        if method != lost[0] or not path.endswith(lost[1]):
            return False
        times[lost] += 1
        return times[lost] == 1

    server.batches.lost = drop
    code, err = collect(server.url, data, out, *BATCH)
    assert code == 0, err
    assert times[lost] >= 1 and len(batches(server)) == 1
    assert_complete_and_paid_once(server, out)


@pytest.mark.slow  # it looks for its batch six times
def test_a_batch_job_that_never_gets_an_answer_is_found_by_the_next_run(
    server: FakeOpenAI, files: tuple[Path, Path]
) -> None:
    data, out = files
    server.batches.lost = lambda method, path: path.startswith("/v1/batches")  # and nobody can look for it
    code, err = collect(server.url, data, out, *BATCH)
    assert code == 1, err
    assert len(batches(server)) == 1 and spend(out)["unknown_outcome"] == ALL
    server.batches.lost = lambda method, path: False
    code, err = collect(server.url, data, out, *AGAIN)
    assert code == 0, err
    assert len(batches(server)) == 1
    assert_complete_and_paid_once(server, out)


# processes that end

DIES = """
import os, signal, sys
from rlgf_cli.cli.app import main
from rlgf_cli.guides.openai import batch
from rlgf_cli.ledger import meter as budget
from rlgf_cli.ledger import batch_jobs
from rlgf_cli.ledger import store

def dies(owner, name, after):
    real = getattr(owner, name)
    def method(*arguments, **named):
        if after:
            real(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, method)

moment = os.environ.pop("MOMENT")
{
    "the job is recorded, nothing sent": lambda: dies(batch._Batches, "_send", False),
    "the file is there, no batch": lambda: dies(batch._Batches, "_create", False),
    "the server has it, its id is not recorded": lambda: dies(batch_jobs.BatchJobs, "confirm", False),
    "its id is recorded": lambda: dies(batch_jobs.BatchJobs, "confirm", True),
    "before the texts are stored": lambda: dies(store.Store, "put", False),
    "the texts are stored, not settled": lambda: dies(store.Store, "put", True),
    "settled, not ended": lambda: dies(budget.Meter, "settle", True),
    "ended, nothing written": lambda: dies(batch_jobs.BatchJobs, "end", True),
}[moment]()
main(sys.argv[1:])
"""
MOMENTS = [
    "the job is recorded, nothing sent", "the file is there, no batch", "the server has it, its id is not recorded",
    "its id is recorded", "before the texts are stored", "the texts are stored, not settled", "settled, not ended",
    "ended, nothing written",
]  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at(
    server: FakeOpenAI, files: tuple[Path, Path], undisturbed: set[Row], tmp_path: Path, moment: str
) -> None:
    data, out = files
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    usual = start(server.url, data, out, *BATCH)
    usual.kill()
    usual.communicate()
    arguments = list(usual.args)[3:]
    variables = {**os.environ, "MOMENT": moment}
    died = subprocess.run([sys.executable, str(script), *arguments], env=variables, capture_output=True, timeout=100)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    code, err = collect(server.url, data, out, *AGAIN)
    assert code == 0, err
    assert len(batches(server)) == 1
    assert_complete_and_paid_once(server, out)
    assert rows(out) == undisturbed


def wait_for_polls(server: FakeOpenAI, count: int) -> None:
    deadline = time.monotonic() + 60
    while sum(path == "/v1/batches/batch_1" for _, path in server.batches.log) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_ended_while_it_waits(
    server: FakeOpenAI, files: tuple[Path, Path], undisturbed: set[Row], how: signal.Signals
) -> None:
    data, out = files
    server.batches.polls = 10**9
    process = start(server.url, data, out, *BATCH)
    wait_for_polls(server, 3)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    if how is signal.SIGINT:
        assert process.returncode == 130 and "--resume" in err, err
        assert "the server goes on with the batch" in err
        assert spend(out)["unknown_outcome"] == ALL  # it goes on, and is charged at its bound
    server.batches.polls = 1
    code, err = collect(server.url, data, out, *AGAIN)
    assert code == 0, err
    assert len(batches(server)) == 1
    assert_complete_and_paid_once(server, out)
    assert rows(out) == undisturbed


def test_a_server_that_refuses_while_a_batch_is_made_stops_the_command(
    server: FakeOpenAI, files: tuple[Path, Path], undisturbed: set[Row]
) -> None:
    data, out = files
    server.batches.polls, server.batches.refuse_after = 10**9, 2
    code, err = collect(server.url, data, out, *BATCH)
    assert code == 3 and "Insufficient Balance" in err and "--batch --resume" in err, err
    server.batches.polls, server.batches.refuse_after = 1, None
    code, err = collect(server.url, data, out, *AGAIN)
    assert code == 0 and len(batches(server)) == 1, err
    assert rows(out) == undisturbed


def test_a_batch_that_is_not_collected_is_not_forgotten(server: FakeOpenAI, files: tuple[Path, Path]) -> None:
    data, out = files
    server.batches.polls = 10_000
    going = start(server.url, data, out, *BATCH)
    wait_for_polls(server, 1)
    going.send_signal(signal.SIGKILL)
    going.communicate()
    code, err = collect(server.url, data, out, *BATCH, "--overwrite")
    assert code == 2 and "not collected yet" in err
    server.batches.polls = 0
    code, err = collect(server.url, data, out, *AGAIN)
    assert code == 0, err
    assert len(batches(server)) == 1
