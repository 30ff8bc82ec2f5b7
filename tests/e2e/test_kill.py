"""A `train` that is killed at any moment goes on with --resume and ends as the uninterrupted run, to the bit (CPU)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from conftest import toy_examples, write_rows

STEPS = 9
HOOK = """
import os, signal
import rlgf_cli.training.checkpoint as checkpoint
from rlgf_cli.artifacts import jsonl
write, count = checkpoint.write_json, [0]
def killed(path, value):
    if path.name == "COMPLETE":
        count[0] += 1
        if count[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)  # everything is on disk but the word that it is
    write(path, value)
checkpoint.write_json = killed
from rlgf_cli.cli.app import main
main()
"""


def command(alg: str, model: Path, folder: Path, *more: str) -> list[str]:
    guided = ["--guide", f"hf:{model}"] if alg not in ("ppo", "grpo") else []
    if alg == "ppo++":
        guided = ["--guide", str(folder / "guide.jsonl")]
    extra = {"d2lols": ["--switch-step", "4"], "grpo": ["--group-size", "4"]}.get(alg, [])
    return [
        "train", "--alg", alg, "--model", str(model), "--data", str(folder / "train.jsonl"),
        "--reward", "coverage,rougeL",
        "--max-steps", str(STEPS), "--episodes", "8", "--batch-size", "4",
        "--max-new-tokens", "8", "--lr", "1e-3", "--save-steps", "2", "--eval-data", str(folder / "train.jsonl"),
        "--set", "eval.every=3", "--set", "eval.limit=4", "--set", "kl.adaptive=true", "--set", "rollout.save_every=1",
        *guided, *extra, *more,
    ]  # fmt: skip


def start(arguments: list[str], hook: str | None = None) -> subprocess.Popen[bytes]:
    how = ["-c", hook] if hook else ["-m", "rlgf_cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, *how, *arguments], env=environment, stderr=subprocess.PIPE)


def finish(arguments: list[str]) -> None:
    process = start(arguments)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()


def rows(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in found]


def assert_equal(run: Path, undisturbed: Path) -> None:
    assert rows(run) == rows(undisturbed)
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (undisturbed / name).exists():
            found, wanted = load_file(run / name), load_file(undisturbed / name)
            assert found.keys() == wanted.keys()
            assert all((found[key] == wanted[key]).all() for key in wanted)
    last = {p.name: p.read_text() for p in (undisturbed / "rollouts").iterdir()}
    assert {p.name: p.read_text() for p in (run / "rollouts").iterdir()} == last


@pytest.fixture
def task(tmp_path: Path) -> Path:
    examples = toy_examples(12)
    write_rows(tmp_path / "train.jsonl", examples)
    guide = [
        {"id": e["id"], "prompt": e["prompt"], "completion": e["references"][0] + " again" * k, "sample_index": k}
        for e in examples
        for k in range(3)
    ]
    write_rows(tmp_path / "guide.jsonl", guide)
    return tmp_path


def kill_at(arguments: list[str], run: Path, lines: int, delay: float) -> bool:
    """Start a run and kill it ``delay`` seconds after its metrics hold ``lines`` rows. Whether it was still running."""
    process = start(arguments)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
            time.sleep(delay)
            break
        time.sleep(0.002)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return alive


def moments(count: int, seed: int) -> list[tuple[int, float]]:
    rng = np.random.default_rng(seed)
    return [(int(rng.integers(1, STEPS)), float(rng.random() * 0.05)) for _ in range(count)]


@pytest.mark.parametrize(
    ("alg", "kills"),
    [
        ("ppo", moments(1, 0)),
        ("d2lols", moments(2, 1)),
        pytest.param("ppo", moments(6, 2), marks=pytest.mark.slow),
        pytest.param("d2lols", moments(6, 3), marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment(alg: str, kills: list[tuple[int, float]], task: Path, tiny_gpt2: Path) -> None:
    finish([*command(alg, tiny_gpt2, task), "-o", str(task / "whole")])
    interrupted = 0
    for i, (lines, delay) in enumerate(kills):
        run = task / f"killed{i}"
        arguments = [*command(alg, tiny_gpt2, task), "-o", str(run)]
        interrupted += kill_at(arguments, run, lines, delay)
        finish([*arguments, "--resume"])
        assert_equal(run, task / "whole")
    assert interrupted > 0, "every run was over before it was killed: the test killed nothing"


LUCK = "import zlib\n\ndef luck(text):\n    return zlib.crc32(text.encode()) % 100 / 100\n"


@pytest.mark.parametrize(
    ("alg", "more"),
    [
        ("ppo++", []),
        ("ppo++", ["--restart", "backward", "--restart-steps", "8", "--gate", "--rollin-prob", "0.6"]),
        ("ppo++", ["--restart", "uncertain", "--gate", "--rollin-prob", "0.6"]),
        ("aggrevated", []),
        ("grpo", []),
        ("dagger", []),
    ],
)
def test_stopped_in_the_middle_and_resumed(
    alg: str, more: list[str], task: Path, tiny_gpt2: Path, run_cli, monkeypatch
) -> None:
    """The same for the other kinds of state (recorded guide, curricula and gate, cut's horizon, groups, likelihood), in
    one process."""
    from rlgf_cli.training.loop import Trainer

    if "--gate" in more:  # a reward under which an untrained policy is at times better than the guide
        (task / "reward.py").write_text(LUCK)
        more = [*more, "--reward", f"{task / 'reward.py'}:luck"]
    assert run_cli(*command(alg, tiny_gpt2, task, *more), "-o", task / "whole").exit_code == 0
    step = Trainer.step

    def dies(self: Trainer):
        if self.state.step == 5:
            raise RuntimeError("the machine went away")
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", dies)
        assert run_cli(*command(alg, tiny_gpt2, task, *more), "-o", task / "run").exit_code == 1
    assert len(rows(task / "run")) == 5
    assert run_cli(*command(alg, tiny_gpt2, task, *more), "-o", task / "run", "--resume").exit_code == 0
    assert_equal(task / "run", task / "whole")
    if "--gate" in more:
        late = rows(task / "run")[5:]
        assert sum(row["guide/gated"] for row in late) > 0, "nothing was decided with what was restored"


def test_killed_in_the_middle_of_a_save(task: Path, tiny_gpt2: Path) -> None:
    """The second checkpoint lacks its last word: the first one is used."""
    finish([*command("ppo", tiny_gpt2, task), "-o", str(task / "whole")])
    arguments = [*command("ppo", tiny_gpt2, task), "-o", str(task / "run")]
    process = start(arguments, HOOK)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert [p.name for p in (task / "run" / "checkpoints").glob("step_*")] == ["step_2"]
    finish([*arguments, "--resume"])
    assert_equal(task / "run", task / "whole")


def test_lora_resumes(task: Path, tiny_llama: Path) -> None:
    arguments = command("ppo", tiny_llama, task, "--use-peft", "--lora-r", "4")
    finish([*arguments, "-o", str(task / "whole")])
    assert kill_at([*arguments, "-o", str(task / "run")], task / "run", 4, 0.0)
    finish([*arguments, "-o", str(task / "run"), "--resume"])
    assert_equal(task / "run", task / "whole")


def test_ctrl_c_saves_and_exits_130(task: Path, tiny_gpt2: Path) -> None:
    arguments = [*command("ppo", tiny_gpt2, task), "-o", str(task / "run")]
    finish([*command("ppo", tiny_gpt2, task), "-o", str(task / "whole")])
    process = start(arguments)
    metrics = task / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes()):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err.decode()
    assert json.loads((task / "run" / "run.json").read_text())["status"] == "interrupted"
    finish([*arguments, "--resume"])
    assert_equal(task / "run", task / "whole")
