"""A set whose making is stopped at any moment and gone on with: nothing is lost, nothing is paid twice, and the files
are those of a run that nobody disturbed.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from collecting import PRICES, environment, kill
from evolving_server import answered, guide, rewritten, rows, seeds_file
from fake_openai import FakeOpenAI, Plan, fraction
from rlgf_cli.artifacts.jsonl import read_json

SEEDS, STEPS, SIZE = 12, 3, 4
FILES = ("instructions.jsonl", "steps.jsonl")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment(monkeypatch, tmp_path)


def plan(delay_s: float = 0.01) -> Plan:
    """Some rewrites and answers break rules; answers come after some time."""

    def rewrite(operation, instruction, request):
        bad = fraction("no", request.key)
        return (
            f"I cannot help with that, for reason {bad}." if bad < 0.2 else rewritten(operation, instruction, request)
        )

    def answer(instruction, request):
        bad = fraction("no", instruction)
        return f"I cannot help with that, for reason {bad}." if bad < 0.1 else answered(instruction, request)

    said = guide(rewrite, answer)
    return lambda n, request: replace(said(n, request), delay_s=delay_s * 2 * fraction("delay", request.key))


def start(url: str, folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "rlgf_cli", "evolve", "generate", "--guide", "openai:m", "--base-url", url,
        "--data", "seeds.jsonl", "-o", "set", "--steps", str(STEPS), "--batch-size", str(SIZE),
        "--set", f"guide.usd_per_million_input={PRICES[0]}", "--set", f"guide.usd_per_million_output={PRICES[1]}",
        *more,
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


def files(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


def in_cache(folder: Path) -> set[str]:
    """The requests whose texts a kill left in the cache; nothing is changed by looking."""
    copy = folder / "copy"
    shutil.copytree(folder / "cache", copy)
    with closing(sqlite3.connect(copy / "guide.sqlite")) as db:
        found = {text for (text,) in db.execute("SELECT text FROM texts")}
    shutil.rmtree(copy)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch, FakeOpenAI(plan(0)) as server:
        environment(patch, folder)
        seeds_file(folder, SEEDS)
        finish(start(server.url, folder))
    steps = rows(folder / "set" / "steps.jsonl")
    assert len(steps) == SEEDS * STEPS
    assert {r["outcome"] for r in steps} == {"kept", "refusal"}
    assert {r["answer"] for r in steps} == {"kept", "refusal", None}
    yield files(folder / "set")


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(100, 130))])
def test_killed_at_any_moment(tmp_path: Path, undisturbed: dict[str, bytes], seed: int) -> None:
    seeds_file(tmp_path, SEEDS)
    moment = int(fraction("moment", seed) * 60)
    with FakeOpenAI(plan(), prices=PRICES) as server:
        assert kill(start(server.url, tmp_path), server, moment, 0.02 * fraction("delay", seed)) or seed >= 100
        kept = in_cache(tmp_path) if (tmp_path / "cache").exists() else set()
        before = {asked.request.key: len(asked.calls) for asked in server.ledger.all()}
        finish(start(server.url, tmp_path, "--resume"))
        assert files(tmp_path / "set") == undisturbed
        for asked in server.ledger.all():
            said = plan()(0, asked.request).text
            if said in kept and asked.request.key in before:
                assert len(asked.calls) == before[asked.request.key], asked.request.prompt
        # at most what was under way when the kill came was asked for again
        assert sum(len(asked.calls) > 1 for asked in server.ledger.all()) <= 16
        spend = read_json(tmp_path / "set" / "run.json")["spend"]
        assert spend["charged_usd"] >= sum(call.charge for call in server.ledger.calls()) - 1e-9


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    seeds_file(tmp_path, SEEDS)
    with FakeOpenAI(plan(), prices=PRICES) as server:
        for moment in (10, 45):
            kill(start(server.url, tmp_path, "--resume"), server, moment, 0.0)
        finish(start(server.url, tmp_path, "--resume"))
        wanted = SEEDS * STEPS + sum(r["answer"] is not None for r in rows(tmp_path / "set" / "steps.jsonl"))
        assert wanted <= len(server.requests) <= wanted + 2 * 16
    assert files(tmp_path / "set") == undisturbed


def test_ctrl_c_keeps_the_blocks_that_are_whole(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    seeds_file(tmp_path, SEEDS)
    with FakeOpenAI(plan(0.05)) as server:
        process = start(server.url, tmp_path)
        while len(server.requests) < 40:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "--resume" in err and "Traceback" not in err
        partial = files(tmp_path / "set")
        assert all(undisturbed[name].startswith(partial[name]) and partial[name] for name in partial)
        assert len(rows(tmp_path / "set" / "steps.jsonl")) % (SIZE * STEPS) == 0
        assert read_json(tmp_path / "set" / "run.json")["status"] == "interrupted"
        finish(start(server.url, tmp_path, "--resume"))
        assert max(len(asked.calls) for asked in server.ledger.all()) == 1  # nothing twice
    assert files(tmp_path / "set") == undisturbed


@pytest.mark.slow
def test_a_guide_that_keeps_nothing_in_the_cache_pays_for_the_block_alone(tmp_path: Path) -> None:
    """``live``: whole blocks are read from the files, only the one that was under way is asked for again."""
    seeds_file(tmp_path, SEEDS)
    with FakeOpenAI(plan(0.02)) as server:
        assert kill(start(server.url, tmp_path, "--guide-mode", "live"), server, 50, 0.0)
        done = len(rows(tmp_path / "set" / "steps.jsonl")) if (tmp_path / "set" / "steps.jsonl").exists() else 0
        assert done
        finish(start(server.url, tmp_path, "--guide-mode", "live", "--resume"))
        steps = rows(tmp_path / "set" / "steps.jsonl")
        asked = {a.request.prompt: len(a.calls) for a in server.ledger.all()}
        kept = [r for r in steps[: done - done % (SIZE * STEPS)] if r["outcome"] == "kept"]
        assert kept and all(asked[r["text"]] == 1 for r in kept)
