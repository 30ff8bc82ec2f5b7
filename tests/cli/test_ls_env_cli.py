"""``rlgf ls`` and ``rlgf env``."""

from __future__ import annotations

import json

import pytest

from rlgf_cli import registry


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("algorithms", "ppo++"),
        ("rewards", "coverage"),
        ("metrics", "bertscore"),
        ("tasks", "imdb"),
        ("guides", "gpt-4o"),
    ],
)
def test_ls(run_cli, kind, name):
    result = run_cli("ls", kind, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found[name] and all("\n" not in summary for summary in found.values())
    lines = run_cli("ls", kind).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(found)


def test_ls_of_something_else(run_cli):
    result = run_cli("ls", "reward")
    assert result.exit_code == 2 and "rewards" in result.stderr


def test_every_reward_and_metric_that_is_listed_can_be_loaded():
    for kind in ("rewards", "metrics"):
        for name in registry.entries(kind):
            assert callable(registry.load(kind, name))


def test_env_says_of_secrets_only_whether_they_are_set(run_cli, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://user:hidden@localhost:8000/v1")
    result = run_cli("env", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["environment"]["OPENAI_API_KEY"] == "set" and found["environment"]["HF_TOKEN"] == "unset"
    assert found["environment"]["OPENAI_BASE_URL"] == "http://***@localhost:8000/v1"
    assert found["versions"]["torch"] and found["versions"]["rouge-score"] and found["machine"]["device auto"]
    plain = run_cli("env").stdout
    for secret in ("very-secret", "hidden"):
        assert secret not in result.stdout + plain
    assert "  OPENAI_API_KEY: set" in plain
