"""A cap in US dollars without a price ends --dry-run as it ends the run itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from collecting import no_endpoint
from conftest import Result
from evolving_server import seeds_file
from fake_openai import FakeOpenAI

CAP = ("--max-cost-usd", 1)


@pytest.mark.parametrize("command", ["collect-guide", "train", "train with a judge", "evolve generate"])
def test_a_cap_without_a_price(
    run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_gpt2: Path,
    examples_file: Path, command: str,
) -> None:  # fmt: skip
    no_endpoint(monkeypatch, tmp_path)
    with FakeOpenAI() as server:
        guide = ("--guide", "openai:m", "--base-url", server.url)
        judge = json.dumps([{"name": "judge:openai:m", "params": {"guide": {"base_url": server.url}}}])
        more: dict[str, tuple[object, ...]] = {
            "collect-guide": ("--data", examples_file),
            "train": ("--alg", "aggrevated", "--model", tiny_gpt2, "--data", examples_file, "--reward", "coverage",
                      "--max-steps", 1, "--max-new-tokens", 10, "--device", "cpu"),
            "train with a judge": ("--alg", "ppo", "--model", tiny_gpt2, "--data", examples_file,
                                   "--set", f"reward={judge}", "--max-steps", 1, "--max-new-tokens", 10,
                                   "--device", "cpu"),
            "evolve generate": ("--data", seeds_file(tmp_path, 3)),
        }  # fmt: skip
        named, _, judged = command.partition(" with a ")
        words = (*named.split(), *(() if judged else guide), *more[command], "-o", tmp_path / "out")
        assert run_cli(*words, "--dry-run").exit_code == 0
        dry, real = run_cli(*words, *CAP, "--dry-run"), run_cli(*words, *CAP)
        for result in (dry, real):
            assert result.exit_code == 2 and "a cap in US dollars needs a price" in result.stderr, result.stderr
        assert not server.requests and not (tmp_path / "out").exists()
