"""Runs the behaviours of behaviours.py through the command line, and prints what each of them costs.

    python tests/provider_behaviours.py [PART OF A NAME]

The exit code is 1 where one of them is not as behaviours.py has it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from behaviours import BEHAVIOURS, Behaviour
from conftest import _checkpoint, write_rows
from evolving_server import guide as evolving
from evolving_server import seeds_file
from fake_openai import WHOLE, FakeOpenAI, Reply, Request

KEY = "sk-planted-0123456789"
HEADER = "| behaviour | calls | charged | texts | exit | what is said |\n|---|---:|---:|---:|---:|---|"


@dataclass(frozen=True)
class Found:
    """``bought_twice``: requests whose usable text was bought more than once."""

    calls: int
    paid: int
    texts: int
    exit: int
    said: str
    bought_twice: int

    def line(self, behaviour: Behaviour) -> str:
        reasons = [line for line in self.said.splitlines() if behaviour.says and behaviour.says in line]
        said = (reasons or [""])[-1].replace("|", "\\|").strip()
        said = re.sub(
            r"http://127\.0\.0\.1:\d+",
            "http://127.0.0.1:PORT",
            re.sub(r"(?<![:/\w])/(?!/)\S+/(\w+(\.\w+)*)", r"\1", said),
        )
        numbers = " | ".join(str(n) for n in (self.calls, self.paid, self.texts, self.exit))
        return f"| {behaviour.name} | {numbers} | {said[:160]} |"


@contextlib.contextmanager
def forks() -> Iterator[str]:
    """The socket of a process that runs command lines without importing anything anew (fork_server.py)."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "socket")
        program = Path(__file__).with_name("fork_server.py")
        with subprocess.Popen([sys.executable, str(program), "serve", path], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            try:
                yield path
            finally:
                process.kill()


def run(path: str, behaviour: Behaviour, folder: Path, model: Path) -> Found:
    """Run one behaviour in an empty folder; ``model`` is the policy of a training."""
    child: list[int] = []

    def plan(n: int, request: Request) -> Reply:
        if n == behaviour.signal_at:
            os.kill(child[0], signal.SIGTERM)
        usual = evolving() if behaviour.command == "evolve" else None
        reply = behaviour.plan(n, request)
        return usual(n, request) if usual and reply == Reply() else reply

    with FakeOpenAI(plan) as server:
        words = [str(word) for word in words_of(behaviour, server.url, folder, model)]
        said = folder / "stderr"
        environment = {
            **{k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")},
            "OPENAI_API_KEY": KEY, "RLGF_CACHE_DIR": str(folder / "cache"), "RLGF_CONFIG_DIR": str(folder / "config"),
            "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1", "COLUMNS": "400",
        }  # fmt: skip
        with (folder / "stdout").open("wb") as out, said.open("wb") as err, socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            job = {"words": words, "cwd": str(folder), "env": environment}
            socket.send_fds(connection, [json.dumps(job).encode()], [out.fileno(), err.fileno()])
            told = connection.makefile()
            child.append(int(told.readline()))
            code = int(told.readline())
        twice = sum(asked.ends.count(WHOLE) > 1 for asked in server.ledger.all())
        calls = len(server.requests)
    result, spend = result_of(folder / "out")
    return Found(calls, spend.get("calls", 0), texts_of(behaviour, folder, result), code, said.read_text(), twice)


def words_of(behaviour: Behaviour, url: str, folder: Path, model: Path) -> list[object]:
    """The command line."""
    rows = [{"id": f"p{i}", "prompt": f"prompt {i}", "references": [f"text {i}"]} for i in range(behaviour.prompts)]
    data = write_rows(folder / "data.jsonl", rows)
    out = ("-o", folder / "out")
    guide = ("--guide", "openai:m", "--base-url", url)
    if behaviour.command == "train":
        return [
            "train", "--alg", "aggrevated", "--model", model, "--data", data, "--reward", "coverage", *guide,
            "--episodes", 8, "--batch-size", 4, "--epochs", 1, "--max-new-tokens", 10, "--max-steps", 4,
            "--device", "cpu", *behaviour.flags, *out,
        ]  # fmt: skip
    if behaviour.command == "judge":
        texts = write_rows(folder / "texts.jsonl", [{"id": f"p{i}", "prediction": f"text {i}"} for i in range(4)])
        part = {"name": "reward:judge:openai:m", "params": {"guide": {"base_url": url, "concurrency": 1}}}
        return [
            "eval", "--predictions", texts, "--data", data, "--set", f"metrics={json.dumps([part])}",
            *behaviour.flags, *out,
        ]  # fmt: skip
    if behaviour.command == "evolve":
        return [
            "evolve", "generate", *guide, "--data", seeds_file(folder, 4), "--steps", 2, "--batch-size", 4,
            "--set", "guide.concurrency=1", *behaviour.flags, *out,
        ]  # fmt: skip
    return [
        "collect-guide", *guide, "--data", data, "--concurrency", 1, "--max-new-tokens", 64,
        "--set", "guide.max_retries=2", *behaviour.flags, *out,
    ]  # fmt: skip


def result_of(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The result and the spend in a manifest; empty where the command left none."""
    manifest = out / "run.json" if out.is_dir() else out.with_name("out.run.json")
    data = json.loads(manifest.read_text()) if manifest.is_file() else {}
    return data.get("result") or {}, data.get("spend") or {}


def texts_of(behaviour: Behaviour, folder: Path, result: dict[str, Any]) -> int:
    """Texts in the output; of a training those that the cache holds; of a judge its ratings."""
    out = folder / "out"
    if behaviour.command == "judge":
        rows = (out / "predictions.jsonl").read_text().splitlines() if (out / "scores.json").is_file() else []
        return sum(json.loads(row)["scores"].get("reward.judge") is not None for row in rows)
    if behaviour.command == "train":
        import sqlite3

        with contextlib.closing(sqlite3.connect(folder / "cache" / "guide.sqlite")) as db:
            return db.execute("SELECT count(*) FROM texts").fetchone()[0]
    return len(out.read_text().splitlines()) if out.is_file() else 0


def wrong(behaviour: Behaviour, found: Found) -> list[str]:
    """What is not as it should be."""
    pairs = [
        ("exit", behaviour.exit, found.exit),
        ("bought twice", None if behaviour.late else 0, found.bought_twice),
        ("calls", behaviour.calls, found.calls),
        ("charged", behaviour.paid, found.paid),
        ("texts", behaviour.texts, found.texts),
    ]
    problems = [f"{name}: {is_} for {should}" for name, should, is_ in pairs if should not in (is_, None)]
    if behaviour.says not in found.said:
        problems.append(f"does not say {behaviour.says!r}")
    if behaviour.unsaid and behaviour.unsaid in found.said:
        problems.append(f"says {behaviour.unsaid!r}")
    if "Traceback" in found.said:
        problems.append("a traceback")
    return problems


def main() -> int:
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    failed = 0
    print(HEADER)
    with tempfile.TemporaryDirectory() as name, forks() as path:
        (Path(name) / "model").mkdir()
        model = _checkpoint(Path(name) / "model", "gpt2")
        for number, behaviour in enumerate(BEHAVIOURS):
            if part not in behaviour.name:
                continue
            folder = Path(name) / str(number)
            folder.mkdir()
            found = run(path, behaviour, folder, model)
            print(found.line(behaviour), flush=True)
            if problems := wrong(behaviour, found):
                failed += 1
                print(f"{behaviour.name}: {'; '.join(problems)}\n{found.said}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
