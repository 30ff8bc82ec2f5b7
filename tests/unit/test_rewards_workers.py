"""A Python reward in processes of its own: the same scores, the same letters, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from conftest import toy_examples, write_rows
from rlgf_cli.config.common import PartConfig
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.protocols import Example
from rlgf_cli.scorers.base import signature_of
from rlgf_cli.scorers.checked import score_checked
from rlgf_cli.scorers.weighted_sum import make_reward
from rlgf_cli.scorers.workers import WorkersReward

EXAMPLES = [Example(str(i), f"prompt {i}", (f"reference {i}",), {"k": i}) for i in range(37)]
TEXTS = ["word " * (i % 5) for i in range(37)]
CODE = """
import os
def f(text, meta, scale=1):
    return {"score": scale * meta["k"] + len(text), "process": os.getpid()}
def breaks(text, meta):
    return 1 / (meta["k"] - 20)
def many(texts):
    return [len(texts)] * len(texts)
def ends(text):
    os._exit(3)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path / "mine.py"


def test_scores_are_those_of_one_process_and_in_order(file: Path) -> None:
    spec = [PartConfig(name=f"{file}:f", params={"scale": 2})]
    alone, divided = make_reward(spec), make_reward(spec, workers=2)
    assert signature_of(alone) == signature_of(divided)
    for _ in range(2):
        here, there = (score_checked(r, EXAMPLES, TEXTS) for r in (alone, divided))
        assert [s.value for s in there] == [s.value for s in here] == [2 * i + len(t) for i, t in enumerate(TEXTS)]
        assert os.getpid() not in {s.parts["f.process"] for s in there}
    assert score_checked(divided, [], []) == []


def test_a_function_of_a_batch_is_given_the_whole_batch(file: Path) -> None:
    reward = make_reward([PartConfig(name=f"{file}:many")], workers=2)
    assert {s.value for s in score_checked(reward, EXAMPLES, TEXTS)} == {37}


def test_what_a_function_raises_is_told_as_without_workers(file: Path) -> None:
    letters = []
    for workers in (0, 2):
        with pytest.raises(RlgfError) as caught:
            score_checked(make_reward([PartConfig(name=f"{file}:breaks")], workers=workers), EXAMPLES, TEXTS)
        letters.append((str(caught.value), caught.value.hint))
    assert letters[0] == letters[1]
    assert "mine.py:6" in letters[0][0] and "example '20'" in letters[0][0]


def test_a_process_that_ends_is_told(file: Path) -> None:
    reward = make_reward([PartConfig(name=f"{file}:ends")], workers=1)
    for _ in range(2):
        with pytest.raises(RlgfError, match="ended while it scored"):
            score_checked(reward, EXAMPLES[:2], TEXTS[:2])


def test_a_function_that_cannot_be_used_is_refused_at_once(file: Path) -> None:
    with pytest.raises(UserError, match="no function 'none'"):
        make_reward([PartConfig(name=f"{file}:none")], workers=2)


def test_what_is_expected_is_scored_meanwhile_and_once(tmp_path: Path) -> None:
    """The function waits for a file that is made after ``expect`` has returned, and notes every call."""
    gate, calls = tmp_path / "gate", tmp_path / "calls"
    (tmp_path / "slow.py").write_text(
        "import os, time\n"
        "def f(text, id, gate, calls):\n"
        "    with open(calls, 'a') as file: file.write(id + '\\n')\n"
        "    while not os.path.exists(gate): time.sleep(0.01)\n"
        "    return len(text) + int(id)\n"
    )
    reward = make_reward(
        [
            PartConfig(name=f"{tmp_path}/slow.py:f", params={"gate": str(gate), "calls": str(calls)}),
            PartConfig(name="repetition"),
        ],
        workers=2,
    )
    assert reward.prefetches and not make_reward([PartConfig(name="repetition")], workers=2).prefetches
    reward.prefetch(EXAMPLES[:20], TEXTS[:20])
    reward.prefetch(EXAMPLES[:3], TEXTS[:3])  # a text twice is scored twice: it may come twice in a step
    deadline = time.monotonic() + 60
    while not calls.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    gate.touch()
    examples, texts = [*EXAMPLES[:3], *EXAMPLES], [*TEXTS[:3], *TEXTS]
    found = score_checked(reward, examples, texts)
    assert [s.parts["f"] for s in found] == [len(t) + int(e.id) for e, t in zip(examples, texts, strict=True)]
    assert sorted(calls.read_text().split()) == sorted(e.id for e in examples)


def test_the_figures_of_a_training_are_those_of_one_process(tmp_path: Path, tiny_gpt2: Path, run_cli) -> None:
    write_rows(tmp_path / "train.jsonl", toy_examples(12))
    (tmp_path / "mine.py").write_text("def f(text, meta): return len(text) % 7\n")
    rows = []
    for workers in ("0", "2"):
        out = tmp_path / f"run{workers}"
        done = run_cli(
            "train", "--model", tiny_gpt2, "--data", tmp_path / "train.jsonl", "--reward", f"{tmp_path}/mine.py:f",
            "--reward-workers", workers, "--max-steps", "2", "--episodes", "8", "--batch-size", "8",
            "--set", "rollout.batch_size=2", "--max-new-tokens", "6", "-o", out,
        )  # fmt: skip
        assert done.exit_code == 0, done.stderr
        found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        rows.append([{k: v for k, v in row.items() if not k.startswith("time/")} for row in found])
    assert rows[0] == rows[1]


def test_texts_are_divided_among_the_processes(tmp_path: Path) -> None:
    """No text is scored before two processes have one."""
    (tmp_path / "both.py").write_text(
        "import os, time\n"
        "def f(text, folder):\n"
        "    open(os.path.join(folder, str(os.getpid())), 'w').close()\n"
        "    while len(os.listdir(folder)) < 2: time.sleep(0.01)\n"
        "    return len(text)\n"
    )
    (tmp_path / "seen").mkdir()
    reward = WorkersReward(f"{tmp_path}/both.py:f", {"folder": str(tmp_path / "seen")}, 2)
    assert [s.value for s in reward.score(EXAMPLES, TEXTS)] == [len(t) for t in TEXTS]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_training(how: signal.Signals, tiny_gpt2: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", toy_examples(12))
    (tmp_path / "mine.py").write_text("def f(text): return len(text)\n")
    command = [
        sys.executable, "-m", "rlgf_cli", "train", "--model", str(tiny_gpt2), "--data", str(tmp_path / "train.jsonl"),
        "--reward", f"{tmp_path}/mine.py:f", "--reward-workers", "2", "--max-steps", "100000", "--episodes", "8",
        "--batch-size", "8", "--max-new-tokens", "4", "-o", str(tmp_path / "run"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
    if how is signal.SIGINT:
        assert process.returncode == 130 and b"Traceback" not in err
        assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
