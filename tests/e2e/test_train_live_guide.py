"""A live endpoint inside ``rlgf train``: asked through the cache and the budget, in batches, and down at times."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Result
from fake_openai import FakeOpenAI, Reply, Request

KEY = "sk-planted-0123456789abcdef"
PRICE = ("--set", "guide.usd_per_million_input=1000", "--set", "guide.usd_per_million_output=1000")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as running:
        yield running


@pytest.fixture
def train(
    run_cli: Callable[..., Result], tmp_path: Path, tiny_gpt2: Path, examples_file: Path, server: FakeOpenAI
) -> Callable[..., Result]:
    def run(*more: object, name: str = "aggrevated", folder: str = "run") -> Result:
        return run_cli(
            "train", "--alg", name, "--model", tiny_gpt2, "--data", examples_file, "--reward", "coverage",
            "--guide", "openai:m", "--base-url", server.url, "--episodes", 8, "--batch-size", 4, "--epochs", 1,
            "--max-new-tokens", 10, "--max-steps", 3, "--device", "cpu", "--set", "rollout.save_every=1",
            "--set", "guide.outage_limit_s=1", *PRICE, *more, "-o", tmp_path / folder,
        )  # fmt: skip

    return run


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def comparable(folder: Path) -> list[dict[str, Any]]:
    """What does not depend on time, nor on who had the texts already."""
    ours = ("time/", "guide/calls", "guide/cached", "guide/usd", "guide/mended")
    return [{k: v for k, v in row.items() if not k.startswith(ours)} for row in rows(folder)]


def rollouts(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("rollouts/*.jsonl"))]


@pytest.mark.parametrize("name", ["aggrevated", "dagger", "lols", "ppo++"])
def test_a_second_run_pays_nothing_and_is_the_same(
    train: Callable[..., Result], server: FakeOpenAI, tmp_path: Path, name: str
) -> None:
    assert train(name=name).exit_code == 0
    asked = len(server.requests)
    assert asked > 5
    spend = manifest(tmp_path / "run")["spend"]
    assert spend["calls"] == asked and spend["charged_usd"] > 0 and spend["unknown_outcome"] == 0
    assert train("--guide-mode", "replay", name=name, folder="again").exit_code == 0
    assert len(server.requests) == asked
    assert comparable(tmp_path / "again") == comparable(tmp_path / "run")
    assert rollouts(tmp_path / "again") == rollouts(tmp_path / "run")
    assert manifest(tmp_path / "again")["spend"]["calls"] == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert "m-0613" in card and "US dollars charged" in card
    models = manifest(tmp_path / "run")["guide"]["models"]
    assert set(models) == {"m-0613"} and models["m-0613"] >= asked  # equal prompts share a text


def test_both_sides_of_an_action_are_bought_once(
    train: Callable[..., Result], server: FakeOpenAI, tmp_path: Path
) -> None:
    """A replay asks nobody and is the same run; so is one in other batches."""
    mc = ("--advantage", "guide_mc", "--mc-samples", "2")
    done = train(*mc)
    assert done.exit_code == 0 and "up to 4 texts an episode, 96 in 3 steps" in done.stderr
    asked = len(server.requests)
    texts = sum(row["guide/requests"] for row in rows(tmp_path / "run"))
    assert 8 * 3 < asked <= texts <= 4 * 8 * 3
    assert train(*mc, "--guide-mode", "replay", folder="again").exit_code == 0
    assert len(server.requests) == asked
    assert comparable(tmp_path / "again") == comparable(tmp_path / "run")
    assert rollouts(tmp_path / "again") == rollouts(tmp_path / "run")
    records = [json.loads(line) for text in rollouts(tmp_path / "run") for line in text.splitlines()]
    sides = [[b["side"] for b in r["branches"]] for r in records if "branches" in r]
    assert ["before", "before", "after"] in sides
    more = ("--set", "guide.concurrency=1", "--set", "rollout.batch_size=3", "--guide-mode", "live")
    assert train(*mc, *more, folder="other").exit_code == 0
    assert rollouts(tmp_path / "other") == rollouts(tmp_path / "run")


def test_how_the_guide_is_asked_changes_nothing(
    train: Callable[..., Result], server: FakeOpenAI, tmp_path: Path
) -> None:
    """One batch or several, one request at a time or many."""
    assert train("--guide-mode", "live").exit_code == 0
    server.plan = lambda n, seen: Reply(delay_s=0.01 * (n % 3))
    more = ("--set", "guide.concurrency=1", "--set", "rollout.batch_size=3", "--guide-mode", "live")
    assert train(*more, folder="other").exit_code == 0
    assert rollouts(tmp_path / "other") == rollouts(tmp_path / "run")


def test_the_policy_writes_while_the_guide_does(
    train: Callable[..., Result], server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second batch's roll-in is written before the first batch's answers are there."""
    from rlgf_cli.models.samplers import base

    begun = threading.Event()
    calls = 0
    write = base.sample

    def sample(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:  # a roll-in with its look for boundaries takes a few
            begun.set()
        return write(*args, **kwargs)

    monkeypatch.setattr(base, "sample", sample)

    def plan(n: int, seen: Request) -> Reply:
        assert begun.wait(30)  # no answer before the policy has gone on
        return Reply()

    server.plan = plan
    assert train("--max-steps", "1", "--set", "rollout.batch_size=4").exit_code == 0


def test_a_spent_budget_leaves_a_run_that_goes_on(
    train: Callable[..., Result], server: FakeOpenAI, tmp_path: Path
) -> None:
    undisturbed = train("--guide-mode", "live", folder="whole")
    assert undisturbed.exit_code == 0
    server.requests.clear()
    stopped = train("--max-calls", "10")
    assert stopped.exit_code == 3 and "the budget leaves no room" in stopped.stderr, stopped.stderr
    assert len(server.requests) == 10
    run = manifest(tmp_path / "run")
    assert run["status"] == "stopped" and run["spend"]["calls"] == 10
    assert train("--max-calls", "10", "--resume").exit_code == 3  # the cap is on the run, not on the session
    assert len(server.requests) == 10
    assert train("--max-calls", "100", "--resume").exit_code == 0
    assert comparable(tmp_path / "run") == comparable(tmp_path / "whole")
    assert len({(r.prompt, r.body["seed"]) for r in server.requests}) == len(server.requests)  # nothing is paid twice


def test_an_outage_saves_and_stops(train: Callable[..., Result], server: FakeOpenAI, tmp_path: Path) -> None:
    assert train("--guide-mode", "live", folder="whole").exit_code == 0
    server.requests.clear()
    server.plan = lambda n, seen: Reply(status=503) if n >= 9 else Reply()
    down = train()
    assert down.exit_code == 3 and "the guide has been down" in down.stderr and "does not answer" in down.stderr
    assert any((tmp_path / "run" / "checkpoints").glob("*/COMPLETE"))
    server.plan = lambda n, seen: Reply()
    assert train("--resume").exit_code == 0
    assert comparable(tmp_path / "run") == comparable(tmp_path / "whole")


def test_a_refused_text_runs_unguided_and_is_counted(
    train: Callable[..., Result], server: FakeOpenAI, tmp_path: Path
) -> None:
    server.plan = lambda n, seen: Reply(finish_reason="content_filter") if n % 4 == 0 else Reply()
    assert train().exit_code == 0
    found = rows(tmp_path / "run")
    assert sum(row.get("guide/failed", 0) for row in found) >= 2
    assert sum(row["guide/unguided"] for row in found) >= 2


FILTERED = Reply(status=400, error={"message": "no", "code": "content_filter"})


@pytest.mark.parametrize("reply", [FILTERED, Reply(text="no", finish_reason="content_filter"), Reply(text="")])
@pytest.mark.parametrize("name", ["ppo++", "aggrevated"])
def test_a_guide_without_a_text_is_no_success(
    train: Callable[..., Result], server: FakeOpenAI, tmp_path: Path, name: str, reply: Reply
) -> None:
    server.plan = lambda n, seen: reply
    done = train("--max-steps", "6", name=name)
    assert done.exit_code == 1 and "gave no usable text to any of" in done.stderr, done.stderr
    assert "the guide gave no usable text in the last 5 steps" in done.stderr
    run, folder = manifest(tmp_path / "run"), tmp_path / "run"
    assert run["status"] == "failed" and run["result"]["guide/usable"] == 0 < run["result"]["guide/requests"]
    assert run["result"]["warning/unguided"] >= 1
    assert (folder / "model.safetensors").is_file()
    assert "the policy was trained without it" in (folder / "README.md").read_text()
    asked = len(server.requests)
    again = train("--max-steps", "6", "--resume", name=name)  # nothing is left to train, and nothing is better
    assert again.exit_code == 1 and "gave no usable text" in again.stderr and len(server.requests) == asked


def test_a_dry_run_asks_nobody_and_writes_nothing(
    train: Callable[..., Result], server: FakeOpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    before = sorted(tmp_path.rglob("*"))
    found = train("--dry-run", "--json")
    assert found.exit_code == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["guide_calls"] == 24 and told["usd"][0] < told["usd"][2] <= told["at_most_usd"] * 2
    assert not server.requests and sorted(tmp_path.rglob("*")) == before
    assert json.loads(train("--dry-run", "--json", name="ppo").stdout)["guide_calls"] == 0


def test_no_key_in_anything_that_training_leaves(
    train: Callable[..., Result], server: FakeOpenAI, tmp_path: Path, guide_cache: Path
) -> None:
    done = train("--debug")
    left = done.stdout + done.stderr
    for path in [*tmp_path.rglob("*"), *guide_cache.rglob("*")]:
        left += path.read_bytes().decode("latin-1") if path.is_file() else ""
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert len(left) > 1000 and "sk-planted" not in left
