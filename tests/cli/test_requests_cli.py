"""What the user wants said in requests reaches the server, from every command; keys and headers stay out of files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from collecting import environment, prompts_file
from conftest import write_rows
from evolving_server import guide as evolving
from evolving_server import seeds_file
from fake_openai import FakeOpenAI, Reply, Request
from judging import longer, rating, verdict

KEY, TOKEN, LITERAL = "sk-planted-0123456789", "token-planted-0123456789", "literal-planted-0123456789"
SECRETS = (KEY, TOKEN, LITERAL)
SECTION: dict[str, Any] = {
    "api_key_env": "OWN_KEY",
    "headers": {"X-Literal": LITERAL, "X-Token": "Token ${GATEWAY_TOKEN}"},
    "extra_body": {"thinking": {"type": "enabled"}},
    "reasoning_effort": "low",
    "reasoning_tokens": 40,
    "sampling": {"top_p": None},
    "max_retries": 0,
}
ELSEWHERE = "https://elsewhere.example.org/v1"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment(monkeypatch, tmp_path)
    monkeypatch.setenv("OWN_KEY", KEY)
    monkeypatch.setenv("GATEWAY_TOKEN", TOKEN)


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as running:
        yield running


def as_wanted(request: Request, new_tokens: int) -> bool:
    """Whether a request says all that :data:`SECTION` wants said."""
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert (request.headers["x-literal"], request.headers["x-token"]) == (LITERAL, f"Token {TOKEN}")
    assert request.body["thinking"] == {"type": "enabled"} and request.body["reasoning_effort"] == "low"
    assert request.body["max_tokens"] == new_tokens + 40 and "top_p" not in request.body
    return True


def assert_no_secret(folder: Path, *texts: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file() and "recipe" not in path.name]
    assert files
    for held in (*texts, *(path.read_bytes().decode("utf-8", "replace") for path in files)):
        assert not [secret for secret in SECRETS if secret in held]


def recipe(folder: Path, tree: dict[str, Any]) -> Path:
    return write_rows(folder / "recipe.yaml", [tree])  # JSON is YAML


def test_a_guide_s_requests(run_cli, tmp_path, server):
    path = recipe(tmp_path, {"guide": {"name": "openai:m", "base_url": server.url, **SECTION}})
    data, out = prompts_file(tmp_path, 3), tmp_path / "out" / "guide.jsonl"
    common = ("collect-guide", "-c", path, "--data", data, "--max-new-tokens", 9)
    shown = run_cli(*common, "-o", out)
    assert shown.exit_code == 0, shown.stderr
    assert len(server.requests) == 3 and all(as_wanted(request, 9) for request in server.requests)
    printed = run_cli(*common, "-o", out, "--print-config")
    assert "X-Literal: '***'" in printed.stdout
    stored = json.loads(out.with_name("guide.jsonl.run.json").read_text())
    assert stored["config"]["values"]["guide"]["headers"] == {"X-Literal": "***", "X-Token": "***"}
    assert_no_secret(tmp_path, shown.stdout, shown.stderr, printed.stdout, printed.stderr)
    again = run_cli(*common, "-o", tmp_path / "again.jsonl", "--set", "guide.headers.X-Literal=other")
    assert again.exit_code == 0 and len(server.requests) == 3  # headers change no text
    other = run_cli(*common, "-o", tmp_path / "other.jsonl", "--set", "guide.extra_body.thinking.type=disabled")
    assert other.exit_code == 0 and len(server.requests) == 6


def test_a_batch_has_the_same_requests(run_cli, tmp_path, server):
    path = recipe(tmp_path, {"guide": {"name": "openai:m", "base_url": server.url, "batch_poll_s": 0.05, **SECTION}})
    data = prompts_file(tmp_path, 3)
    shown = run_cli(
        "collect-guide", "-c", path, "--data", data, "--max-new-tokens", 9, "--batch", "-o", tmp_path / "b.jsonl"
    )
    assert shown.exit_code == 0, shown.stderr
    (batch,) = server.batches._state.batches.values()
    live = run_cli(
        "collect-guide", "-c", path, "--data", data, "--max-new-tokens", 9, "--guide-mode", "live", "-o",
        tmp_path / "l.jsonl",
    )  # fmt: skip
    assert live.exit_code == 0, live.stderr
    assert sorted(request.key for _, request in batch.lines) == sorted(request.key for request in server.requests)


@pytest.mark.parametrize(("which", "asked"), [("metric", 4), ("reward", 2)])
def test_a_judge_s_requests(run_cli, tmp_path, which, asked):
    rows = [{"id": f"p{i}", "prompt": f"prompt {i}", "references": [f"reference {i}"]} for i in range(2)]
    data = write_rows(tmp_path / "data.jsonl", rows)
    texts = write_rows(tmp_path / "texts.jsonl", [{"id": row["id"], "text": "a text"} for row in rows])
    with FakeOpenAI(verdict(longer) if which == "metric" else rating(lambda text: 7)) as server:
        judge = {
            "name": "judge:openai:m" if which == "metric" else "reward:judge:openai:m",
            "params": {"guide": {"base_url": server.url, **SECTION}, "max_new_tokens": 30},
        }
        path = recipe(tmp_path, {"metrics": [judge]})
        shown = run_cli("eval", "-c", path, "--predictions", texts, "--data", data, "-o", tmp_path / "out")
        assert shown.exit_code == 0, shown.stderr
        assert len(server.requests) == asked and all(as_wanted(request, 30) for request in server.requests)
    assert_no_secret(tmp_path, shown.stdout, shown.stderr)


def test_a_reviewer_s_requests(run_cli, tmp_path):
    with FakeOpenAI(evolving()) as server:
        section = {"base_url": server.url, **SECTION}
        path = recipe(tmp_path, {"guide": {"name": "openai:m", **section}, "reviewer": {"name": "openai:r", **section}})
        shown = run_cli(
            "evolve", "generate", "-c", path, "--data", seeds_file(tmp_path, 2), "--steps", 1, "--no-answers",
            "--max-new-tokens", 64, "-o", tmp_path / "set",
        )  # fmt: skip
        assert shown.exit_code == 0, shown.stderr
        models = {request.body["model"] for request in server.requests}
        for request in server.requests:
            assert as_wanted(request, request.body["max_tokens"] - 40)
    assert models == {"m", "r"}
    assert_no_secret(tmp_path, shown.stdout, shown.stderr)


GUIDE = {"name": "openai:m", "base_url": ELSEWHERE}


@pytest.mark.parametrize(
    ("command", "tree", "key"),
    [
        (("collect-guide",), {"guide": GUIDE}, "guide.base_url"),
        (("evolve", "generate"), {"guide": "openai:m", "reviewer": GUIDE}, "reviewer.base_url"),
        (("train", "--model", "m"), {"reward": [{"name": "judge:openai:m", "params": {"guide": GUIDE}}]},
         "reward.0.params.guide.base_url"),
        (("eval", "--predictions", "p"), {"metrics": [{"name": "judge:openai:m", "params": {"guide": GUIDE}}]},
         "metrics.0.params.guide.base_url"),
        (("eval", "--predictions", "p"),
         {"metrics": [{"name": "reward:judge:openai:m", "params": {"guide": {"base_url": ELSEWHERE}}}]},
         "metrics.0.params.guide.base_url"),
    ],
)  # fmt: skip
def test_a_recipe_cannot_send_the_key_away(run_cli, tmp_path, monkeypatch, command, tree, key):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    path = recipe(tmp_path, tree)
    data = write_rows(tmp_path / "data.jsonl", [{"id": "a", "prompt": "p", "references": ["r"]}])
    shown = run_cli(*command, "-c", path, "--data", data, "-o", tmp_path / "out")
    assert shown.exit_code == 2 and f"{key} names elsewhere.example.org" in shown.stderr
    assert f"{path}:1" in shown.stderr and f"{key.removesuffix('base_url')}api_key_env" in shown.stderr
    assert not (tmp_path / "out").exists()


def test_a_server_cannot_write_to_the_terminal(run_cli, tmp_path):
    words = "no \x1b[2J\x1b]0;title\x07 quota\x9b5m"
    with FakeOpenAI(lambda n, seen: Reply(status=401, error={"message": words})) as server:
        shown = run_cli(
            "collect-guide", "--guide", "openai:m", "--base-url", server.url, "--data", prompts_file(tmp_path, 1),
            "-o", tmp_path / "g.jsonl",
        )  # fmt: skip
    assert shown.exit_code == 2 and "quota" in shown.stderr
    assert not [c for c in shown.stderr if (c < " " and c != "\n") or "\x7f" <= c < "\xa0"]


def test_env_hides_what_may_be_secret_in_an_address(run_cli, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "https://u:planted-1@h.example.org:8443/v1?key=planted-2#planted-3")
    monkeypatch.setenv("HTTPS_PROXY", "http://someone:planted-4@proxy:3128")
    monkeypatch.setenv("ALL_PROXY", "someone:planted-5@proxy")
    monkeypatch.setenv("MISTRAL_API_KEY", "planted-6")
    shown = run_cli("env", "--json")
    found = json.loads(shown.stdout)["environment"]
    assert found["OPENAI_BASE_URL"] == "https://***@h.example.org:8443/v1?***#***"
    assert found["HTTPS_PROXY"] == "http://***@proxy:3128" and found["MISTRAL_API_KEY"] == "set"
    assert "planted" not in shown.stdout + run_cli("env").stdout


def test_providers_are_listed(run_cli):
    shown = run_cli("ls", "providers", "--json")
    listed = json.loads(shown.stdout)
    assert listed["mistral"].startswith(
        "https://api.mistral.ai/v1, MISTRAL_API_KEY, prefill: prefix, seed: random_seed"
    )
    assert "no seed" in listed["gemini"] and "no key" in listed["ollama"]
