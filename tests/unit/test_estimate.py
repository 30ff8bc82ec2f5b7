"""What a collection or a training run will ask and cost, said before it: and that saying so does nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from collecting import no_endpoint
from conftest import Result, write_rows
from fake_openai import FakeOpenAI, Reply, lengths
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.guides.openai.estimate import Plan, estimate, lines
from rlgf_cli.guides.openai.guide import OpenAIGuide
from rlgf_cli.ledger.store import Store, StoredText
from rlgf_cli.protocols import Example, GuideRequest

FAR = "https://api.example.com/v1"
"""An endpoint that needs a key and is nowhere."""
PRICES = (2.0, 8.0)
PRICED = [
    f"--set=guide.usd_per_million_{what}={price}" for what, price in zip(("input", "output"), PRICES, strict=True)
]
LIMIT = 20


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_endpoint(monkeypatch, tmp_path)


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI(lengths(3), prices=PRICES) as running:
        yield running


def prompts(folder: Path, numbers: range, name: str = "data.jsonl") -> Path:
    rows = [{"id": f"p{i}", "prompt": f"prompt {i} " + "word " * (i % 7)} for i in numbers]
    return write_rows(folder / name, rows)


def guide_at(url: str = FAR, **changes: Any) -> OpenAIGuide:
    prices = {"usd_per_million_input": PRICES[0], "usd_per_million_output": PRICES[1]}
    config = {"name": "openai:m", "base_url": url, "mode": "replay", **prices, **changes}
    return OpenAIGuide(GuideConfig.model_validate(config), seed=0)


def everything(*folders: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def plan_of(guide: OpenAIGuide, count: int, prompt: str = "ten letters", limit: int = LIMIT, **changes: Any) -> Plan:
    plan = Plan(requests=count, **changes)
    for i in range(count):
        plan.add(guide, GuideRequest(Example(f"p{i}", prompt, ("twelve bytes",)), max_new_tokens=limit))
    return plan


# the figures


def test_without_history_the_bounds_hold_what_can_come() -> None:
    with closing(guide_at()) as guide:
        plan = plan_of(guide, 10)
        assert plan.prompt_bytes == 10 * (11 + 16) and plan.limit_tokens == 10 * LIMIT
        found = estimate(guide, plan)
        assert found["to_ask"] == 10 and found["basis"].startswith("the length of the references")
        assert found["prompt_tokens"] == [45, 68, 135]  # 270 bytes at 6, 4 and 2 bytes a token
        assert found["completion_tokens"] == [10, 30, 200]  # 12 bytes are three tokens each; the limit is 20
        low, mid, high = found["usd"]
        assert mid == pytest.approx((67.5 * 2 + 30 * 8) / 1e6) and low < mid < high
        assert found["at_most_usd"] == pytest.approx((270 * 2 + 200 * 8) / 1e6)
        assert found["at_most_usd"] >= high
        assert found["seconds"] is None
    with closing(guide_at(batch_price=0.5)) as guide:
        assert estimate(guide, plan_of(guide, 10, batch=True))["usd"][1] == pytest.approx(mid / 2, abs=1e-6)
        plan.reference_bytes.clear()
        assert estimate(guide, plan)["basis"].startswith("the limit of new tokens")


@pytest.mark.parametrize("known", [0, 30])
def test_nothing_to_ask_costs_nothing(known: int) -> None:
    history("openai:m", [(40, 5)] * known, seconds=2.0)
    with closing(guide_at(requests_per_minute=60)) as guide:
        found = estimate(guide, Plan(requests=5, in_file=2, cached=3))
    assert (found["to_ask"], found["prompt_tokens"], found["completion_tokens"]) == (0, [0, 0, 0], [0, 0, 0])
    assert found["usd"] == [0, 0, 0] and found["at_most_usd"] == 0 and found["seconds"] == [0, 0, 0]
    assert lines(found)


def test_no_price_no_dollars() -> None:
    with closing(guide_at(usd_per_million_input=None, usd_per_million_output=None)) as guide:
        found = estimate(guide, plan_of(guide, 3))
    assert found["usd"] is None and found["at_most_usd"] is None
    assert any("cost unknown" in line for line in lines(found))


def history(guide_name: str, draws: list[tuple[int, int]], seconds: float | None = None) -> None:
    with closing(Store.default()) as store:
        store.put(
            (
                i.to_bytes(32, "big"),
                StoredText(guide_name, "{}", "x", "stop", "m", size, size // 4, tokens, seconds=seconds),
            )
            for i, (size, tokens) in enumerate(draws)
        )


def test_too_little_history_and_that_of_others_is_not_used() -> None:
    history("openai:m", [(40, 5)] * 19)
    with closing(guide_at()) as guide:
        assert "too few texts" in estimate(guide, plan_of(guide, 3))["basis"]
    history("openai:other", [(40, 5)] * 50)
    with closing(guide_at()) as guide:
        assert "too few texts" in estimate(guide, plan_of(guide, 3))["basis"]
    history("openai:m", [(40, 5)] * 51)
    with closing(guide_at()) as guide:
        found = estimate(guide, plan_of(guide, 3))
    assert found["basis"] == "20 texts of this guide in the cache"
    assert found["completion_tokens"] == [15, 15, 15]  # no text was ever longer or shorter
    assert found["prompt_tokens"] == [20, 20, 20]  # 81 bytes, four to a token


@pytest.mark.parametrize("sizes", [(25, 100), (100, 25), (400, 1000)])
def test_the_interval_holds_the_truth_nineteen_times_of_twenty(sizes: tuple[int, int], guide_cache: Path) -> None:
    """Sums over seeded draws: of those that are in the cache, the interval; of as many new ones, the truth."""
    seen, asked = sizes
    held = 0
    repeats = 200
    for seed in range(repeats):
        rng = random.Random(f"{seed} {sizes}")
        draw = [min(LIMIT, 1 + int(rng.expovariate(1 / 8))) for _ in range(seen + asked)]
        for path in guide_cache.glob("guide.sqlite*"):
            path.unlink()
        history("openai:m", [(40, tokens) for tokens in draw[:seen]])
        with closing(guide_at()) as guide:
            low, mid, high = estimate(guide, plan_of(guide, asked))["completion_tokens"]
        assert low <= mid <= high <= asked * LIMIT
        held += low <= sum(draw[seen:]) <= high
    assert 0.90 * repeats <= held <= 0.99 * repeats


def test_time_is_what_takes_longest() -> None:
    history("openai:m", [(40, 5)] * 30, seconds=2.0)
    with closing(guide_at(concurrency=4)) as guide:
        assert estimate(guide, plan_of(guide, 100))["seconds"] == [50.0, 50.0, 50.0]  # 2 s each, four at once
    with closing(guide_at(concurrency=4, requests_per_minute=60)) as guide:
        assert estimate(guide, plan_of(guide, 100))["seconds"] == [100.0, 100.0, 100.0]
    with closing(guide_at(concurrency=4, requests_per_minute=60, tokens_per_minute=60)) as guide:
        found = estimate(guide, plan_of(guide, 100))
        tokens = [p + c for p, c in zip(found["prompt_tokens"], found["completion_tokens"], strict=True)]
        assert found["seconds"] == pytest.approx(tokens, abs=1.0)  # a token a second


# dry runs


@pytest.fixture
def collect(run_cli: Callable[..., Result], tmp_path: Path) -> Callable[..., Result]:
    def run(url: str, data: Path, *more: object) -> Result:
        return run_cli(
            "collect-guide", "--guide", "openai:m", "--base-url", url, "--data", data, "-o", tmp_path / "guide.jsonl",
            "--samples", 2, "--max-new-tokens", LIMIT, *PRICED, *more,
        )  # fmt: skip

    return run


def test_a_dry_run_writes_nothing_asks_nobody_and_needs_no_key(
    collect: Callable[..., Result], tmp_path: Path, guide_cache: Path, server: FakeOpenAI
) -> None:
    data = prompts(tmp_path, range(10))
    guide_cache.rmdir()  # nor is a cache made
    before = everything(tmp_path)
    for url in (FAR, server.url):
        done = collect(url, data, "--dry-run", "--json", "--max-cost-usd", 1)
        assert done.exit_code == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["requests"], found["in_file"], found["cached"], found["to_ask"]) == (20, 0, 0, 20)
        assert 0 < found["usd"][0] < found["usd"][1] < found["usd"][2] <= found["at_most_usd"]
        assert "20 to request" in done.stderr and "USD" in done.stderr
    assert everything(tmp_path) == before
    assert not guide_cache.exists()
    assert server.connections == 0


def test_a_dry_run_with_a_cache_and_a_file_changes_neither(
    collect: Callable[..., Result], tmp_path: Path, guide_cache: Path, server: FakeOpenAI
) -> None:
    data = prompts(tmp_path, range(10))
    assert collect(server.url, data, "--limit", 4).exit_code == 0
    (tmp_path / "guide.jsonl").rename(tmp_path / "elsewhere.jsonl")
    (tmp_path / "guide.jsonl.run.json").unlink()
    assert collect(server.url, data, "--limit", 2).exit_code == 0
    before, asked = everything(tmp_path, guide_cache), len(server.requests)
    found = json.loads(collect(server.url, data, "--dry-run", "--json", "--resume").stdout)
    assert (found["requests"], found["in_file"], found["cached"], found["to_ask"]) == (20, 4, 4, 12)
    live = json.loads(collect(server.url, data, "--dry-run", "--json", "--guide-mode", "live").stdout)
    assert (live["in_file"], live["cached"], live["to_ask"]) == (4, 0, 16)  # live reads no cache
    assert everything(tmp_path, guide_cache) == before and len(server.requests) == asked


def test_a_dry_run_refuses_what_the_run_would(collect: Callable[..., Result], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "a", "prompt": "x"}\n{"id": "b"}\n')
    done = collect(FAR, bad, "--dry-run")
    assert done.exit_code == 2 and f"{bad}:2" in done.stderr


def test_a_batch_is_estimated_at_its_price(collect: Callable[..., Result], tmp_path: Path) -> None:
    data = prompts(tmp_path, range(10))
    whole = json.loads(collect(FAR, data, "--dry-run", "--json").stdout)
    half = json.loads(collect(FAR, data, "--dry-run", "--json", "--batch", "--set", "guide.batch_price=0.5").stdout)
    assert half["usd"] == pytest.approx([usd / 2 for usd in whole["usd"]], abs=1e-6)
    assert half["at_most_usd"] == pytest.approx(whole["at_most_usd"] / 2, abs=1e-6)
    assert half["completion_tokens"] == whole["completion_tokens"]


def test_the_estimate_is_held_against_what_came(
    collect: Callable[..., Result], tmp_path: Path, server: FakeOpenAI
) -> None:
    """A first collection gives the history, the second one is estimated from it; run.json has both figures."""
    first = prompts(tmp_path, range(40))
    assert collect(server.url, first).exit_code == 0
    second = prompts(tmp_path, range(100, 160), "second.jsonl")
    (tmp_path / "guide.jsonl").unlink()
    (tmp_path / "guide.jsonl.run.json").unlink()
    dry = json.loads(collect(server.url, second, "--dry-run", "--json").stdout)
    assert dry["basis"] == "80 texts of this guide in the cache"
    assert collect(server.url, second).exit_code == 0
    run = json.loads((tmp_path / "guide.jsonl.run.json").read_text())
    told, actual = run["estimate"], run["estimate"]["actual"]
    without_time = {key: value for key, value in told.items() if key not in ("actual", "seconds")}
    assert without_time == {key: value for key, value in dry.items() if key != "seconds"}
    assert actual["calls"] == 120 == told["to_ask"] and actual["cached"] == 0
    for name in ("prompt_tokens", "completion_tokens", "usd"):
        low, _, high = told[name]
        assert low <= actual[name] <= high, name
    assert actual["usd"] == run["spend"]["charged_usd"] <= told["at_most_usd"]
    # a session that goes on tells of itself alone
    more = prompts(tmp_path, range(100, 165), "second.jsonl")
    assert collect(server.url, more, "--resume").exit_code == 0
    again = json.loads((tmp_path / "guide.jsonl.run.json").read_text())
    assert again["estimate"]["in_file"] == 120 and again["estimate"]["actual"]["calls"] == 10
    assert again["spend"]["calls"] == 130


# train


@pytest.fixture
def train(run_cli: Callable[..., Result], tmp_path: Path, tiny_gpt2: Path, examples_file: Path) -> Callable[..., Any]:
    def run(name: str, url: str, *more: object) -> Result:
        return run_cli(
            "train", "--alg", name, "--model", tiny_gpt2, "--data", examples_file, "--reward", "coverage",
            "--guide", "openai:m", "--base-url", url, "--episodes", 8, "--batch-size", 4, "--epochs", 1,
            "--max-new-tokens", 10, "--max-steps", 3, "--device", "cpu", *PRICED, *more, "-o", tmp_path / "run",
        )  # fmt: skip

    return run


@pytest.mark.parametrize("name", ["aggrevated", "dagger", "lols", "d2lols"])
def test_a_dry_run_of_training(
    train: Callable[..., Result], tmp_path: Path, guide_cache: Path, name: str, server: FakeOpenAI
) -> None:
    guide_cache.rmdir()
    for url in (FAR, server.url):
        done = train(name, url, "--dry-run", "--json")
        assert done.exit_code == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["steps"] == 3 and found["episodes"] == 24
        assert 0 < found["guide_calls"] <= 48
        assert 0 < found["usd"][0] <= found["usd"][2] <= found["at_most_usd"]
    assert not (tmp_path / "run").exists() and not guide_cache.exists()
    assert everything(tmp_path) == {} and server.connections == 0


@pytest.mark.parametrize("samples", [None, 1, 3])
def test_training_asks_no_more_than_its_dry_run_says(
    train: Callable[..., Result], tmp_path: Path, server: FakeOpenAI, samples: int | None
) -> None:
    """``samples``: on each side of an action under guide_mc."""
    server.plan = lambda n, request: Reply()
    more = [] if samples is None else ["--advantage", "guide_mc", "--mc-samples", samples]
    told = json.loads(train("aggrevated", server.url, *more, "--dry-run", "--json").stdout)
    assert told["guide_calls"] == 24 * (2 * samples if samples else 1)
    done = train("aggrevated", server.url, *more)
    assert done.exit_code == 0, done.stderr
    spend = json.loads((tmp_path / "run" / "run.json").read_text())["spend"]
    assert 0 < spend["calls"] == len(server.requests)
    assert spend["calls"] + spend["cached"] > (told["guide_calls"] // 2 if samples else 0)
    assert spend["calls"] + spend["cached"] <= told["guide_calls"]
    assert 0 < spend["charged_usd"] <= told["at_most_usd"]


def test_a_dry_run_of_training_without_a_guide(
    run_cli: Any, tmp_path: Path, tiny_gpt2: Path, examples_file: Path
) -> None:
    done = run_cli(
        "train", "--alg", "ppo", "--model", tiny_gpt2, "--data", examples_file, "--reward", "coverage",
        "--max-steps", 3, "--max-new-tokens", 16, "--dry-run", "-o", tmp_path / "run",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "guide calls: 0" in done.stdout and everything(tmp_path) == {}
