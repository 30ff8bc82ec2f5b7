"""``rlgf evolve train`` through the command line, with the scripted guide behind the fake server and its ledger."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from collecting import PRICES, environment, lines
from conftest import Result, write_rows
from fake_openai import FakeOpenAI, Reply
from rlgf_cli.artifacts.records import StepRecord
from rlgf_cli.cli.evolve_generate import evolve_generate
from rlgf_cli.cli.evolve_train import evolve_train
from rlgf_cli.evolve.learned import LearnedPolicy, load_policy
from rlgf_cli.evolve.operations import read_operations
from teams_rl import plan, seeds

ITERATIONS, CHAINS, STEPS = 4, 5, 4
QUERIES = ITERATIONS * CHAINS * STEPS
Command = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment(monkeypatch, tmp_path)


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI(plan, prices=PRICES) as running:
        yield running


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "seeds.jsonl", [{"id": seed.id, "prompt": seed.prompt} for seed in seeds(8)])


def command(server: FakeOpenAI, data: Path, out: Path, *more: object) -> list[str]:
    return [
        "evolve", "train", "--data", str(data), "--guide", "openai:scripted", "--base-url", server.url,
        "--iterations", str(ITERATIONS), "--batch-size", str(CHAINS), "--steps", str(STEPS), "--memory", "20",
        "--save-every", "2", "--set", "ppo.minibatch_size=2", "--set", "ppo.hidden=8",
        "--set", f"guide.usd_per_million_input={PRICES[0]}", "--set", f"guide.usd_per_million_output={PRICES[1]}",
        *map(str, more), "-o", str(out),
    ]  # fmt: skip


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def assert_same(run: Path, whole: Path) -> None:
    """Rows, steps, policy, and what the next iteration would begin with: equal to the bit."""
    for name in ("metrics.jsonl", "steps.jsonl", "policy.json"):
        assert (run / name).read_text() == (whole / name).read_text(), name
    for name in ("policy.safetensors", f"checkpoints/step_{ITERATIONS}/memory.safetensors"):
        one, other = load_file(run / name), load_file(whole / name)
        assert one.keys() == other.keys()
        assert all(other[key].tobytes() == value.tobytes() for key, value in one.items()), name
    moments = [(f / "checkpoints" / f"step_{ITERATIONS}" / "optimizer.pt").read_bytes() for f in (run, whole)]
    assert moments[0] == moments[1]


def assert_same_as_replayed(run_cli: Callable[..., Result], server: FakeOpenAI, data: Path, run: Path) -> None:
    """A run is equal to an undisturbed one from the cache alone."""
    whole = run.with_name("whole")
    assert run_cli(*command(server, data, whole, "--guide-mode", "replay")).exit_code == 0
    assert_same(run, whole)


def test_a_run_on_disk(run_cli: Callable[..., Result], server: FakeOpenAI, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_cli(*command(server, data, run, "--json"))
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["rewrites"] == result["queries"] == QUERIES
    assert result["spend"]["calls"] == len(server.requests) <= QUERIES
    assert result["spend"]["charged_usd"] == pytest.approx(sum(call.price or 0 for call in server.ledger.calls()))
    rows, steps = lines(run / "metrics.jsonl"), [StepRecord.model_validate(row) for row in lines(run / "steps.jsonl")]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        own = [step for step in steps if step.iteration == row["iteration"]]
        assert len(own) == row["rewrites"] == CHAINS * STEPS
        outcomes = Counter(step.outcome for step in own)
        assert {n.partition("/")[2]: v for n, v in row.items() if n.startswith("outcome/")} == outcomes
        assert row["kept"] == outcomes["kept"] / len(own)
        rewards = [step.reward for step in own if step.reward is not None]
        assert row["reward"] == pytest.approx(sum(rewards) / len(rewards))
        assert sum(value for name, value in row.items() if name.startswith("operation/")) == pytest.approx(1)
        assert row["memory"] <= 20 and row["ppo/entropy"] > 0
    assert result["outcomes"] == Counter(step.outcome for step in steps)
    last = Counter(step.operation for step in steps if step.iteration == ITERATIONS)
    assert result["operations"] == {name: last[name] / (CHAINS * STEPS) for name in result["operations"]}
    first = Counter(step.operation for step in steps if step.iteration == 1)
    for name, share in result["operations"].items():
        line = next(line for line in done.stderr.splitlines() if line.startswith(f"| {name} "))
        shares = [cell.strip() for cell in line.split("|")[2:4]]
        assert shares == [f"{first[name] / (CHAINS * STEPS):.1%}", f"{share:.1%}"]
    assert f"{QUERIES} rewrites, {QUERIES} queries: " in done.stderr
    # every seed is visited once before any is visited again, and each visit has texts of its own
    visits = Counter((step.seed_id, step.visit) for step in steps)
    assert len(visits) == ITERATIONS * CHAINS and set(visits.values()) == {STEPS}
    assert Counter(visit for _, visit in visits) == {0: 8, 1: 8, 2: 4}
    assert (run / "plots" / "reward.png").stat().st_size > 1000
    assert (run / "plots" / "operations.png").stat().st_size > 1000
    assert isinstance(load_policy(str(run), read_operations(None)), LearnedPolicy)
    assert manifest(run)["guide"]["guide"] == "openai:scripted"
    again = run_cli(*command(server, data, run))
    assert again.exit_code == 2 and "--resume goes on with it" in again.stderr


@pytest.mark.parametrize("policy", ["random", "round-robin", "paper"])
def test_baselines_walk_the_same_world(
    run_cli: Callable[..., Result], server: FakeOpenAI, data: Path, tmp_path: Path, policy: str
) -> None:
    run = tmp_path / "run"
    assert run_cli(*command(server, data, run, "--policy", policy)).exit_code == 0
    rows = lines(run / "metrics.jsonl")
    assert not any(name.startswith(("ppo/", "loss/")) for row in rows for name in row)
    assert not (run / "policy.json").exists()
    expected = {"round-robin": 0.25, "paper": 0.5}.get(policy)
    if expected is not None:
        assert {row["operation/breadth"] for row in rows} == {expected}
    first = [step for step in lines(run / "steps.jsonl") if step["iteration"] == 1]
    assert {step["step"] for step in first} == {1, 2, 3, 4}
    with pytest.raises(Exception, match="holds no learned policy"):
        load_policy(str(run), read_operations(None))


@pytest.mark.parametrize("which", ["train", "generate"])
def test_references_of_the_seeds_are_not_looked_at(
    run_cli: Callable[..., Result], server: FakeOpenAI, tmp_path: Path, which: str
) -> None:
    data = write_rows(tmp_path / "seeds.jsonl", [{"prompt": "Name a bird.", "references": [""]}])
    own = ["--data", data, "--guide", "openai:scripted", "--base-url", server.url, "-o", tmp_path / "run"]
    done = run_cli("evolve", which, *own, "--dry-run")
    assert done.exit_code == 0, done.stderr


def test_dry_run(run_cli: Callable[..., Result], server: FakeOpenAI, data: Path, tmp_path: Path) -> None:
    reviewed = ["--reviewer", "openai:r", "--set", f"reviewer.base_url={server.url}"]
    done = run_cli(*command(server, data, tmp_path / "run", "--dry-run", "--json", *reviewed))
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rewrites"] == found["guide_calls"] == found["reviewer_calls"] == QUERIES
    assert not server.requests and not (tmp_path / "run").exists()
    real = run_cli(*command(server, data, tmp_path / "run"))
    assert real.exit_code == 0
    assert 0 < manifest(tmp_path / "run")["spend"]["charged_usd"] <= found["at_most_usd"]
    assert found["usd"][0] <= found["usd"][1] <= found["usd"][2]


def test_what_asks_the_guide_is_set_by_the_same_flags_as_in_generate() -> None:
    own = {"passes", "answers", "max_answer_tokens"}
    assert {*signature(evolve_generate).parameters} - own <= {*signature(evolve_train).parameters}


# --- what is refused, before anything is written or asked


def test_refusals(run_cli: Callable[..., Result], server: FakeOpenAI, data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "operations.yaml"
    bad.write_text(
        "operations:\n  - name: one\n    prompt: nothing to fill\n  - name: two\n    prompt: '{instruction}'\n"
    )
    deep = tmp_path / "deep.yaml"
    deep.write_text(
        "operations:\n  - {name: one, prompt: '1 {instruction}'}\n  - {name: two, prompt: '2 {instruction}'}\n"
    )
    empty = write_rows(tmp_path / "empty.jsonl", [{"id": "a", "text": "no prompt"}])
    recorded = write_rows(tmp_path / "guide.jsonl", [{"prompt": "a", "completion": "b"}])
    cases = [
        (["--operations", bad], "operations.yaml:", "must hold {instruction}"),
        (["--operations", tmp_path / "none.yaml"], "none.yaml", "no such"),
        (["--policy", "paper", "--operations", deep], "needs an operation with breadth", ""),
        (["--data", empty], "empty.jsonl:1", "the field 'prompt' is missing"),
        (["--guide", recorded], "this guide is recorded", ""),
        (["--reviewer", recorded], "this guide is recorded", ""),
        (["--set", "reward.different=1"], "needs a reviewer's verdict", ""),
        (["--set", "reward.diferent=1"], "'different'", ""),
        (
            ["--max-cost-usd", 1, "--reviewer", "openai:r", "--set", f"reviewer.base_url={server.url}"],
            "needs a price",
            "",
        ),
    ]
    for flags, *said in cases:
        done = run_cli(*command(server, data, tmp_path / "run"), *flags)
        assert done.exit_code == 2, (flags, done.stderr)
        assert all(words in done.stderr for words in said), (flags, done.stderr)
        assert not (tmp_path / "run").exists() and not server.requests


def test_resume_with_other_settings_is_refused(
    run_cli: Callable[..., Result], server: FakeOpenAI, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert run_cli(*command(server, data, run, "--max-calls", 30)).exit_code == 3
    done = run_cli(*command(server, data, run, "--resume", "--learning-rate", "0.1"))
    assert done.exit_code == 2 and "ppo.learning_rate is 0.1" in done.stderr
    data.write_text(data.read_text() + '{"prompt": "one more"}\n')
    done = run_cli(*command(server, data, run, "--resume"))
    assert done.exit_code == 2 and "this file changed" in done.stderr


# --- guides that are of no use


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (Reply(text="I'm sorry, but I cannot help with that."), "refusal: 64"),
        (Reply(text="word " * 400), "too_long: 64"),
        (Reply(text="   "), ": 64"),
        (Reply(body={"choices": [{"index": 0, "finish_reason": "content_filter"}]}), "refusal: 64"),
    ],
    ids=["refuses", "enormous", "nothing", "filtered"],
)
def test_a_guide_of_which_nothing_is_kept_ends_the_run(
    run_cli: Callable[..., Result], data: Path, tmp_path: Path, reply: Reply, outcome: str
) -> None:
    with FakeOpenAI(lambda n, request: reply, prices=PRICES) as server:
        more = ["--batch-size", 16, "--iterations", 50]
        done = run_cli(*command(server, data, tmp_path / "run"), *more)
    assert done.exit_code == 1, done.stderr
    assert "none of the last 64 rewrites was kept" in done.stderr and outcome in done.stderr
    assert len(lines(tmp_path / "run" / "steps.jsonl")) == 64


def test_a_guide_that_fails_ends_the_run_and_resume_goes_on(
    run_cli: Callable[..., Result], server: FakeOpenAI, data: Path, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert run_cli(*command(server, data, whole)).exit_code == 0
    broken = len(server.requests) + QUERIES // 2
    os.environ["RLGF_CACHE_DIR"] = str(tmp_path / "other")  # monkeypatched by the fixture, which puts it back
    server.plan = lambda n, request: plan(n, request) if n < broken else Reply(status=500)
    few = ["--set", "guide.max_retries=0", "--set", "guide.outage_limit_s=0.1"]
    done = run_cli(*command(server, data, run, *few))
    assert done.exit_code != 0 and "--resume" in done.stderr
    server.plan = plan
    assert run_cli(*command(server, data, run, "--resume")).exit_code == 0
    assert_same(run, whole)


# --- interruptions: nothing paid twice, nothing lost, the same result


def test_a_spent_budget_is_exit_3_with_a_policy(
    run_cli: Callable[..., Result], server: FakeOpenAI, data: Path, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert run_cli(*command(server, data, run, "--max-calls", 10)).exit_code == 3
    assert not (run / "policy.json").exists()  # it has not learned anything
    stopped = run_cli(*command(server, data, run, "--resume", "--max-calls", 50))
    assert stopped.exit_code == 3 and "budget" in stopped.stderr
    assert manifest(run)["status"] == "stopped" and manifest(run)["result"]["iterations"] == 2
    assert len(server.requests) == manifest(run)["spend"]["calls"] == 50
    partial = load_policy(str(run), read_operations(None))
    assert isinstance(partial, LearnedPolicy)
    assert run_cli(*command(server, data, run, "--resume")).exit_code == 0
    asked = len(server.requests)
    assert asked == len(server.ledger.all()) == manifest(run)["spend"]["calls"]  # nothing twice
    assert run_cli(*command(server, data, whole, "--guide-mode", "replay")).exit_code == 0
    assert len(server.requests) == asked and manifest(whole)["spend"]["calls"] == 0
    assert_same(run, whole)


def start(argv: list[str]) -> subprocess.Popen[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "rlgf_cli", *argv]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


def after(server: FakeOpenAI, process: subprocess.Popen[str], requests: int) -> None:
    deadline = time.monotonic() + 120
    while len(server.requests) < requests and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def killed(server: FakeOpenAI, argv: list[str], requests: int, delay_s: float) -> bool:
    """Kill -9 when so many requests have come and some time has passed. Returns whether it was still running."""
    process = start(argv)
    after(server, process, requests)
    time.sleep(delay_s)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    while server.in_flight:
        time.sleep(0.005)
    return running


MOMENTS = [(45, 0.004)]
MANY = [(7, 0.0), *((1 + (13 * n) % QUERIES, 0.003 * (n % 17)) for n in range(40))]


@pytest.mark.parametrize("moment", [*MOMENTS, *(pytest.param(m, marks=pytest.mark.slow) for m in MANY)])
def test_killed_at_any_moment(
    run_cli: Callable[..., Result], server: FakeOpenAI, data: Path, tmp_path: Path, moment: tuple[int, float]
) -> None:
    run = tmp_path / "run"
    server.plan = lambda n, request: Reply(text=plan(n, request).text, delay_s=0.003)
    more = ["--set", "guide.concurrency=4"]
    running = killed(server, command(server, data, run, *more), *moment)
    answered = {asked.request.key for asked in server.ledger.all() if asked.calls[-1].end == "whole"}
    done = run_cli(*command(server, data, run, *more, "--resume"))
    assert done.exit_code == 0, done.stderr
    if moment in MOMENTS:
        assert running
    # what had been answered before the kill is in the cache, but for what was on its way in that moment
    twice = [asked for asked in server.ledger.all() if len(asked.calls) > 1]
    assert len(twice) <= 4 and all(asked.request.key in answered for asked in twice)
    assert manifest(run)["spend"]["calls"] >= len(server.requests) - 4
    asked = len(server.requests)
    assert_same_as_replayed(run_cli, server, data, run)
    assert len(server.requests) == asked  # it never asked for anything else than the undisturbed run


@pytest.mark.slow
def test_killed_again_and_again_between_checkpoints(
    run_cli: Callable[..., Result], server: FakeOpenAI, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = command(server, data, run)
    assert killed(server, argv, 5, 0.0)
    assert killed(server, [*argv, "--resume"], 30, 0.0)
    assert run_cli(*argv, "--resume").exit_code == 0
    assert_same_as_replayed(run_cli, server, data, run)
    assert [row["iteration"] for row in lines(run / "metrics.jsonl")] == [1, 2, 3, 4]


def test_ctrl_c_saves_and_exits_130(
    run_cli: Callable[..., Result], server: FakeOpenAI, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    server.plan = lambda n, request: Reply(text=plan(n, request).text, delay_s=0.01)
    process = start(command(server, data, run))
    after(server, process, 25)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert manifest(run)["status"] == "interrupted" and (run / "policy.json").exists()
    assert "the state is saved" in err
    asked = len(server.requests)
    assert asked < QUERIES
    assert run_cli(*command(server, data, run, "--resume")).exit_code == 0
    assert len(server.requests) == len(server.ledger.all())  # nothing was asked twice
    assert_same_as_replayed(run_cli, server, data, run)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(
    run_cli: Callable[..., Result], server: FakeOpenAI, data: Path, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert run_cli(*command(server, data, whole)).exit_code == 0
    assert run_cli(*command(server, data, run)).exit_code == 0
    (run / "run.json").write_text(json.dumps({**manifest(run), "status": "failed"}))
    (run / "checkpoints" / "step_4" / "memory.safetensors").unlink()
    done = run_cli(*command(server, data, run, "--resume"))
    assert done.exit_code == 0 and "step_4" in done.stderr and "is damaged" in done.stderr
    assert "resuming from iteration 2" in done.stderr
    assert_same(run, whole)
