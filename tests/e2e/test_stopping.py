"""A run that cannot go on is saved, says why in the server's words, ends with exit code 3, and is resumed.

Signals are sent by the server's plan, in this process, so that they come at a known request.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from collecting import collect, environment, kill, lines, prompts_file, rows, start
from conftest import Result, write_rows
from evolving_server import guide as evolving
from evolving_server import seeds_file
from fake_openai import WHOLE, FakeOpenAI, Plan, Reply, Request, fraction
from judging import longer, rating, verdict
from rlgf_cli.guides.openai import rate_limits

QUOTA = Reply(status=429, error={"message": "You exceeded your current quota", "type": "insufficient_quota"})
SPENT = {
    "quota": (QUOTA, "You exceeded your current quota"),
    "balance": (Reply(status=402, error={"message": "Insufficient Balance"}), "Insufficient Balance"),
    "key": (Reply(status=401, error={"message": "key revoked"}), "key revoked"),
    "access": (Reply(status=403, error={"message": "account suspended"}), "account suspended"),
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment(monkeypatch, tmp_path)


def run_json(path: Path) -> dict[str, Any]:
    return json.loads((path / "run.json" if path.is_dir() else path.with_name(path.name + ".run.json")).read_text())


def after(requests: int, reply: Reply | None, answers: Plan | None = None) -> Plan:
    """``reply`` to all requests but the first ones; None: a SIGTERM at that request, which is answered."""

    def plan(n: int, request: Request) -> Reply:
        if reply is None and n == requests:
            os.kill(os.getpid(), signal.SIGTERM)
        return (answers or (lambda n, request: Reply()))(n, request) if reply is None or n < requests else reply

    return plan


def bought_twice(server: FakeOpenAI) -> list[str]:
    return [asked.request.prompt for asked in server.ledger.all() if asked.ends.count(WHOLE) > 1]


def figures(run: Path) -> list[dict[str, Any]]:
    """The rows without what depends on time, or on who had the texts already."""
    ours = ("time/", "guide/calls", "guide/cached", "guide/usd", "guide/mended")
    return [{k: v for k, v in row.items() if not k.startswith(ours)} for row in lines(run / "metrics.jsonl")]


@pytest.fixture
def train(run_cli: Callable[..., Result], tmp_path: Path, tiny_gpt2: Path, examples_file: Path) -> Any:
    def run(server: FakeOpenAI, *more: object, out: str = "run", steps: int = 3) -> Result:
        return run_cli(
            "train", "--alg", "aggrevated", "--model", tiny_gpt2, "--data", examples_file, "--reward", "coverage",
            "--guide", "openai:m", "--base-url", server.url, "--episodes", 8, "--batch-size", 4, "--epochs", 1,
            "--max-new-tokens", 10, "--max-steps", steps, "--device", "cpu", *more, "-o", tmp_path / out,
        )  # fmt: skip

    return run


# what no request could survive


@pytest.mark.parametrize("what", SPENT)
def test_a_guide_that_gives_no_more_text_stops_a_training_that_goes_on(train: Any, tmp_path: Path, what: str) -> None:
    reply, words = SPENT[what]
    with FakeOpenAI(after(11, reply)) as server:
        stopped = train(server)
        assert stopped.exit_code == 3 and words in stopped.stderr and "--resume goes on" in stopped.stderr
        run = run_json(tmp_path / "run")
        assert run["status"] == "stopped" and words in run["reason"] and run["spend"]["calls"] == 11
        assert list((tmp_path / "run" / "checkpoints").glob("step_*/COMPLETE"))
        server.plan = lambda n, request: reply
        again = train(server, "--resume")  # nothing is answered now: it is still a run that can be resumed
        assert again.exit_code == 3 and words in again.stderr
        server.plan = lambda n, request: Reply()
        assert train(server, "--resume").exit_code == 0
        assert bought_twice(server) == []
        assert run_json(tmp_path / "run")["reason"] is None
        assert run_json(tmp_path / "run")["spend"]["calls"] == sum(len(a.calls) for a in server.ledger.all()) - len(
            [end for a in server.ledger.all() for end in a.ends if end != WHOLE]
        )
        assert train(server, "--guide-mode", "replay", out="whole").exit_code == 0
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


@pytest.mark.parametrize("what", ["quota", "key"])
def test_before_any_answer_nothing_is_left(train: Any, tmp_path: Path, what: str) -> None:
    reply, words = SPENT[what]
    with FakeOpenAI(after(0, reply)) as server:
        refused = train(server)
        assert refused.exit_code == 2 and words in refused.stderr and not (tmp_path / "run").exists()
        code, err = collect(server.url, prompts_file(tmp_path, 5), tmp_path / "guide.jsonl")
        assert code == 2 and words in err and not list(tmp_path.glob("*guide.jsonl*"))


def judge(server: FakeOpenAI, **more: Any) -> list[str]:
    part = {"name": "judge:openai:m", "params": {"guide": {"base_url": server.url, "max_retries": 0, **more}}}
    return ["--set", f"reward={json.dumps([part])}"]


def test_a_judge_that_stops_in_the_evaluation_costs_no_step(
    run_cli: Callable[..., Result], tmp_path: Path, tiny_gpt2: Path, examples_file: Path
) -> None:
    ratings = rating(lambda text: min(10, 1 + len(text.split())))

    def train(server: FakeOpenAI, *more: object, out: str) -> Result:
        return run_cli(
            "train", "--alg", "ppo", "--model", tiny_gpt2, "--data", examples_file,
            *judge(server, concurrency=1, mode="live"),
            "--episodes", 8, "--batch-size", 4, "--epochs", 1, "--max-new-tokens", 6, "--max-steps", 3,
            "--eval-data", examples_file, "--set", "eval.limit=4", "--set", "eval.every=2", "--device", "cpu",
            "--set", "rollout.save_every=1", *more, "-o", tmp_path / out,
        )  # fmt: skip

    with FakeOpenAI(ratings) as server:
        assert train(server, out="whole").exit_code == 0
        calls = [row["guide/calls"] for row in lines(tmp_path / "whole" / "metrics.jsonl")]
        server.requests.clear()
        server.plan = after(calls[1] - 1, QUOTA, ratings)  # the last question of the second step's evaluation
        stopped = train(server, out="run")
        assert stopped.exit_code == 3 and "You exceeded your current quota" in stopped.stderr, stopped.stderr
        assert [row["step"] for row in figures(tmp_path / "run")] == [1]
        server.plan = ratings
        resumed = train(server, "--resume", out="run")
        assert resumed.exit_code == 0 and "resuming from step 2" in resumed.stderr, resumed.stderr
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
    texts = [{p.name: p.read_text() for p in (tmp_path / f / "rollouts").iterdir()} for f in ("run", "whole")]
    assert texts[0] == texts[1]


def test_a_judge_as_metric_stops_an_evaluation_that_goes_on(run_cli: Callable[..., Result], tmp_path: Path) -> None:
    verdicts = verdict(longer)
    texts = [
        {"id": str(n), "prompt": f"say {n}", "prediction": "one two three", "references": ["one two"]} for n in range(8)
    ]
    predictions = write_rows(tmp_path / "p.jsonl", texts)
    with FakeOpenAI(after(5, QUOTA, verdicts)) as server:
        metric = {"name": "judge:openai:m", "params": {"guide": {"base_url": server.url, "concurrency": 1}}}
        argv = ["eval", "--predictions", predictions, "--set", f"metrics={json.dumps([metric])}", "-o", tmp_path / "e"]
        stopped = run_cli(*argv)
        assert stopped.exit_code == 3 and "You exceeded your current quota" in stopped.stderr, stopped.stderr
        assert run_json(tmp_path / "e")["status"] == "stopped" and run_json(tmp_path / "e")["spend"]["calls"] == 5
        server.plan = verdicts
        assert run_cli(*argv, "--resume").exit_code == 0
        assert bought_twice(server) == []


def evolve(run_cli: Callable[..., Result], server: FakeOpenAI, folder: Path, *more: object) -> Result:
    return run_cli(
        "evolve", "train", "--guide", "openai:m", "--base-url", server.url, "--data", folder / "seeds.jsonl",
        "--iterations", 3, "--batch-size", 4, "--steps", 2, *more, "-o", folder / "run",
    )  # fmt: skip


@pytest.mark.parametrize("requests", [3, 13])
@pytest.mark.parametrize("reply", [QUOTA, None], ids=["quota", "SIGTERM"])
def test_evolving_stops_and_goes_on(
    run_cli: Callable[..., Result], tmp_path: Path, requests: int, reply: Reply | None
) -> None:
    seeds_file(tmp_path, 6)
    with FakeOpenAI(after(requests, reply, evolving())) as server:
        server.plan = after(requests, reply, evolving())
        stopped = evolve(run_cli, server, tmp_path)
        assert stopped.exit_code == 3, stopped.stderr
        reason = run_json(tmp_path / "run")["reason"]
        assert run_json(tmp_path / "run")["status"] == "stopped"
        assert ("SIGTERM" if reply is None else "You exceeded your current quota") in reason
        assert list((tmp_path / "run" / "checkpoints").glob("step_*/COMPLETE"))
        server.plan = evolving()
        assert evolve(run_cli, server, tmp_path, "--resume").exit_code == 0
        assert bought_twice(server) == []
    assert [row["iteration"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


# limits and addresses


def test_a_lasting_429_is_said_and_given_up(run_cli: Callable[..., Result], tmp_path: Path) -> None:
    limit = Reply(status=429, error={"message": "Rate limit reached for m"}, headers={"retry-after-ms": "100"})
    data, out = prompts_file(tmp_path, 60), tmp_path / "guide.jsonl"
    with FakeOpenAI(after(20, limit)) as server:
        argv = ["collect-guide", "--guide", "openai:m", "--base-url", server.url, "--data", data, "-o", out]
        stopped = run_cli(*argv, "--concurrency", 4, "--set", "guide.outage_limit_s=1")
        assert stopped.exit_code == 3, stopped.stderr
        assert stopped.stderr.count("the guide limits the requests (status 429") == 1
        assert "nothing but status 429 for" in stopped.stderr
        assert stopped.stderr.count("Rate limit reached for m") == 2
        assert len(lines(out)) == 20 and run_json(out)["status"] == "stopped"
        server.plan = lambda n, request: Reply()
        assert run_cli(*argv, "--resume").exit_code == 0
        assert bought_twice(server) == []


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/v1", "http://no-such-host.invalid/v1"])
def test_an_address_that_nobody_answers_at(
    run_cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(rate_limits, "UNREACHED_S", 0.5)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-0123456789abcdef")
    data, out = prompts_file(tmp_path, 60), tmp_path / "guide.jsonl"
    argv = ["collect-guide", "--guide", "openai:m", "--data", data, "-o", out]
    refused = run_cli(*argv, "--base-url", address)
    assert refused.exit_code == 2 and address in refused.stderr and "check the base URL" in refused.stderr
    assert not list(tmp_path.glob("*guide.jsonl*"))
    with FakeOpenAI() as server:
        assert run_cli(*argv, "--base-url", server.url, "--limit", 5).exit_code == 0
    later = run_cli(*argv, "--base-url", address, "--resume")  # of a run that has texts
    assert later.exit_code == 3 and address in later.stderr and len(lines(out)) == 5


# signals, and the account in the run's folder

CAP = 40


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 12))])
def test_sigterm_in_a_training_whose_cache_is_lost(train: Any, tmp_path: Path, seed: int) -> None:
    done = 0
    with FakeOpenAI() as server:
        for number in range(3):
            moment = len(server.requests) + int(fraction(seed, number) * 8) if number < 2 else 1000
            server.plan = after(moment, None)
            stopped = train(server, "--max-calls", CAP, *(["--resume"] if number else []), steps=30)
            assert stopped.exit_code == 3, stopped.stderr
            run = run_json(tmp_path / "run")
            assert run["status"] == "stopped" and run["spend"]["calls"] == len(server.requests) <= CAP
            assert ("SIGTERM" in run["reason"]) == (number < 2)
            assert len(figures(tmp_path / "run")) >= done  # no step is lost
            assert list((tmp_path / "run" / "checkpoints").glob("step_*/COMPLETE"))
            done = len(figures(tmp_path / "run"))
            shutil.rmtree(tmp_path / "cache")
    assert "the budget leaves no room" in stopped.stderr and len(server.requests) == CAP


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 20))])
def test_sigterm_in_a_collection_whose_cache_is_lost(run_cli: Callable[..., Result], tmp_path: Path, seed: int) -> None:
    data, out, prompts = prompts_file(tmp_path, 40), tmp_path / "guide.jsonl", 40
    with FakeOpenAI(prices=(1000.0, 1000.0)) as server:
        argv = [
            "collect-guide", "--guide", "openai:m", "--base-url", server.url, "--data", data, "-o", out,
            "--concurrency", 6, "--max-calls", prompts,
        ]  # fmt: skip
        for number in range(2):
            moment = len(server.requests) + int(fraction(seed, number) * 15)
            server.plan = after(moment, None)
            before = rows(out) if number else set()
            stopped = run_cli(*argv, *(["--resume"] if number else []))
            assert stopped.exit_code == 3 and "SIGTERM" in run_json(out)["reason"], stopped.stderr
            assert len(rows(out)) == len(server.requests) and rows(out) >= before  # what was in flight was awaited
            assert run_json(out)["spend"]["calls"] == len(server.requests)
            shutil.rmtree(tmp_path / "cache")
        server.plan = lambda n, request: Reply()
        assert run_cli(*argv, "--resume").exit_code == 0
        assert len(server.requests) == len(rows(out)) == prompts and bought_twice(server) == []
    assert not list(tmp_path.glob("*.spend.json")) and not list(tmp_path.rglob("*.lock"))


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 12))])
def test_a_killed_collection_whose_cache_is_lost_keeps_its_cap(tmp_path: Path, seed: int) -> None:
    data, out, cap = prompts_file(tmp_path, 30), tmp_path / "guide.jsonl", 30  # of 60 texts
    more = ("--concurrency", "8", "--max-calls", str(cap))
    with FakeOpenAI(lambda n, request: Reply(delay_s=0.02 * fraction(seed, request.key))) as server:
        kill(start(server.url, data, out, *more), server, 3 + int(fraction(seed) * 20), 0.0)
        assert out.with_name("guide.jsonl.spend.json").is_file()
        shutil.rmtree(tmp_path / "cache")
        code, err = collect(server.url, data, out, *more, "--resume")
        assert code == 3 and "the budget leaves no room" in err, err
        assert len(server.requests) <= cap and run_json(out)["spend"]["calls"] == cap


MOMENTS = [1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 21))]
LASTING = Reply(status=429, error={"message": "slow down"})
STOPS: list[tuple[Reply | None, str]] = [
    (SPENT["quota"][0], "exceeded your current quota"), (SPENT["balance"][0], "Insufficient Balance"),
    (LASTING, "nothing but status 429"), (None, "SIGTERM"),
]  # fmt: skip


def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, output: Path) -> None:
    """The cache stays, is lost, or the output alone is taken to another machine."""
    if seed % 3 == 0:
        return
    shutil.rmtree(tmp_path / "cache")
    if seed % 3 == 2:
        monkeypatch.setattr(socket, "gethostname", lambda: f"machine-{seed}")
        monkeypatch.setenv("RLGF_CACHE_DIR", str(tmp_path / f"cache_{seed}"))
        moved = output.with_name("moved")
        output.rename(moved)
        moved.rename(output)


@pytest.mark.parametrize("seed", MOMENTS)
def test_a_collection_that_stops_at_any_moment_and_goes_on(
    run_cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    data, out, prompts = prompts_file(tmp_path, 40), tmp_path / "guide.jsonl", 40
    reply, words = STOPS[int(fraction(seed, "stop") * 4)]
    with FakeOpenAI() as server:
        argv = [
            "collect-guide", "--guide", "openai:m", "--base-url", server.url, "--data", data, "-o", out,
            "--concurrency", 4, "--max-calls", prompts, "--set", "guide.outage_limit_s=1",
        ]  # fmt: skip
        server.plan = after(1 + int(fraction(seed) * 35), reply)
        stopped = run_cli(*argv)
        assert stopped.exit_code == 3 and words in stopped.stderr, stopped.stderr
        had, run = rows(out), run_json(out)
        assert run["status"] == "stopped" and words in run["reason"]
        answered = sum(asked.ends.count(WHOLE) for asked in server.ledger.all())
        assert run["spend"]["calls"] == len(had) == answered
        elsewhere(tmp_path, monkeypatch, seed, out)
        server.plan = lambda n, request: Reply()
        done = run_cli(*argv, "--resume")
        assert done.exit_code == 0, done.stderr  # the cap has room for each text once
        assert rows(out) >= had and len(rows(out)) == prompts
        assert bought_twice(server) == [] and run_json(out)["spend"]["calls"] == prompts


@pytest.mark.parametrize("seed", MOMENTS)
def test_a_training_that_stops_at_any_moment_and_goes_on(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    reply, words = STOPS[int(fraction(seed, "training") * 4)]
    limit = ("--set", "guide.outage_limit_s=1", "--max-calls", CAP)
    with FakeOpenAI() as server:
        server.plan = after(1 + int(fraction(seed) * 20), reply)
        stopped = train(server, *limit, steps=30)
        assert stopped.exit_code == 3 and words in stopped.stderr, stopped.stderr
        had, run = figures(tmp_path / "run"), run_json(tmp_path / "run")
        assert run["status"] == "stopped" and words in run["reason"]
        answered = sum(asked.ends.count(WHOLE) for asked in server.ledger.all())
        assert run["spend"]["calls"] == answered
        elsewhere(tmp_path, monkeypatch, seed, tmp_path / "run")
        server.plan = lambda n, request: Reply()
        ended = train(server, *limit, "--resume", steps=30)
        assert ended.exit_code == 3 and "the budget leaves no room" in ended.stderr, ended.stderr
        assert figures(tmp_path / "run")[: len(had)] == had  # no step is lost
        total = sum(asked.ends.count(WHOLE) for asked in server.ledger.all())
        assert CAP - 1 <= total <= CAP and run_json(tmp_path / "run")["spend"]["calls"] == total
        if seed % 3 == 0:  # without the cache, the step that was cut short has its texts bought once more
            assert bought_twice(server) == []


def test_a_second_collection_of_one_file_is_refused(run_cli: Callable[..., Result], tmp_path: Path) -> None:
    """Two at once wrote some texts twice."""
    data, out = prompts_file(tmp_path, 30), tmp_path / "guide.jsonl"
    with FakeOpenAI(lambda n, request: Reply(delay_s=0.1)) as server:
        process = start(server.url, data, out, "--concurrency", "2")
        while len(server.requests) < 4:
            assert process.poll() is None
        for how in ("--resume", "--overwrite"):
            second = run_cli(
                "collect-guide", "--guide", "openai:m", "--base-url", server.url, "--data", data, "-o", out, how
            )
            assert second.exit_code == 2 and f"process {process.pid} on" in second.stderr, second.stderr
        server.plan = lambda n, request: Reply()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert len(rows(out)) == 60
