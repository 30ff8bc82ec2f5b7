"""``rlgf collect-guide`` in processes of its own, for tests that kill it or let two of them run at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import write_rows
from fake_openai import FakeOpenAI
from rlgf_cli.guides.openai.presets import _builtin

PRICES = (2.0, 8.0)
"""US dollars per million tokens, in and out."""
Row = tuple[str, int, str]


def no_endpoint(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """No endpoint, key or proxy in the environment, and a config folder of the test's own."""
    keys = [provider.api_key_env for provider in _builtin()[0].providers if provider.api_key_env]
    for name in (*keys, "OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS",
                 "AZURE_OPENAI_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("RLGF_CONFIG_DIR", str(folder / "config"))


def environment(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The same, and a cache of the test's own."""
    no_endpoint(monkeypatch, folder)
    monkeypatch.setenv("RLGF_CACHE_DIR", str(folder / "cache"))


def prompts_file(folder: Path, count: int) -> Path:
    return write_rows(folder / "data.jsonl", [{"id": f"p{i}", "prompt": f"prompt {i}"} for i in range(count)])


def start(url: str, data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "rlgf_cli", "collect-guide", "--guide", "openai:m", "--base-url", url,
        "--data", str(data), "-o", str(out), "--samples", "2",
        "--set", f"guide.usd_per_million_input={PRICES[0]}", "--set", f"guide.usd_per_million_output={PRICES[1]}",
        *more,
    ]  # fmt: skip
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


def collect(url: str, data: Path, out: Path, *more: str) -> tuple[int, str]:
    """Exit code and stderr."""
    process = start(url, data, out, *more)
    _, err = process.communicate(timeout=500)
    return process.returncode, err


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows(path: Path) -> set[Row]:
    """The rows of a file as a set; no row is there twice."""
    found = [(row["id"], row["sample_index"], row["completion"]) for row in lines(path)]
    assert len(found) == len(set(found))
    return set(found)


def spend(path: Path) -> dict[str, Any]:
    return json.loads(path.with_name(path.name + ".run.json").read_text())["spend"]


def kill(process: subprocess.Popen[str], server: FakeOpenAI, requests: int, delay_s: float) -> bool:
    """Kill -9 after ``requests`` requests and some time. Returns whether the process was still running."""
    deadline = time.monotonic() + 120
    while len(server.requests) < requests and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    time.sleep(delay_s)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    while server.in_flight:  # the server ends what it has begun
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return running
