"""A `train` that is killed at any moment goes on with --resume and ends as the uninterrupted run, to the bit (CPU)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import toy_examples, write_rows
from rlgf_cli.artifacts import checkpoints
from rlgf_cli.runs import best
from runs import assert_same_run

STEPS = 9
SERVER = Path(__file__).parents[1] / "kill_server.py"
Kill = tuple[str, float, float]
"""("row", rows that are written, seconds after that), or ("save", how far into the second save, 0)."""


def moments(seed: int, count: int = 30) -> list[Kill]:
    """Half of them anywhere, half of them within a save, one after the other."""
    rng = np.random.default_rng(seed)
    anywhere = [("row", float(rng.integers(0, STEPS - 1)), float(rng.random() * 0.1)) for _ in range(count // 2)]
    saves = [("save", float(rng.random()), 0.0) for _ in range(count - count // 2)]
    return [kill for pair in zip(saves, anywhere, strict=True) for kill in pair]


def command(alg: str, model: Path, folder: Path, *more: str) -> list[str]:
    guided = ["--guide", f"hf:{model}", "--switch-step", "4"] if alg == "d2lols" else []
    return [
        "train", "--alg", alg, "--model", str(model), "--data", str(folder / "train.jsonl"),
        "--reward", "coverage,rougeL", "--max-steps", str(STEPS), "--episodes", "8", "--batch-size", "4",
        "--max-new-tokens", "8", "--lr", "1e-3", "--save-steps", "2", "--save-total-limit", "1",
        "--eval-data", str(folder / "train.jsonl"), "--set", "eval.every=3", "--set", "eval.limit=4",
        "--set", "kl.adaptive=true", "--set", "kl.target=0.05", "--set", "kl.horizon=100",
        "--set", "rollout.save_every=1", *guided, *more,
    ]  # fmt: skip


class Starter:
    """Processes that run ``rlgf``, one at a time, without importing torch anew for each (see kill_server.py)."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.stderr = folder / "stderr"
        self._server = subprocess.Popen(
            [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def start(self, argv: list[str], **more: Any) -> int:
        """Start a process; its id."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps({"argv": argv, "stderr": str(self.stderr), **more}) + "\n")
        self._server.stdin.flush()
        return int(self._answer())

    def wait(self) -> int:
        """The exit status of the process that was started, -9 where it was killed."""
        return int(self._answer())

    def run(self, argv: list[str], **more: Any) -> int:
        self.start(argv, **more)
        return self.wait()

    def _answer(self) -> str:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the server ended; its stderr says why"
        return line

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        assert self._server.wait(60) == 0


@dataclass
class World:
    """A task, and the undisturbed run of each algorithm with what its second save did to the disk."""

    folder: Path
    model: Path
    starter: Starter
    saves: dict[str, list[str]]
    count: int = 0

    def whole(self, alg: str) -> Path:
        run, events = self.folder / f"whole_{alg}", self.folder / f"events_{alg}"
        if alg not in self.saves:
            argv = [*command(alg, self.model, self.folder), "-o", str(run)]
            assert self.starter.run(argv, watch="checkpoint", events=str(events)) == 0, self.said
            self.saves[alg] = events.read_text().splitlines()
        return run

    def new(self) -> Path:
        self.count += 1
        return self.folder / f"killed{self.count}"

    @property
    def said(self) -> str:
        return self.starter.stderr.read_text()

    def killed_in_the_save(self, alg: str, event: int, *more: str, watch: str = "checkpoint") -> Path:
        run = self.new()
        argv = [*command(alg, self.model, self.folder, *more), "-o", str(run)]
        assert self.starter.run(argv, watch=watch, kill_at=event) == -signal.SIGKILL, self.said
        return run

    def killed_after(self, alg: str, lines: int, delay: float) -> Path:
        """Killed ``delay`` seconds after its metrics hold ``lines`` rows; again where it was done by then."""
        for _ in range(10):
            run = self.new()
            process = self.starter.start([*command(alg, self.model, self.folder), "-o", str(run)])
            metrics = run / "metrics.jsonl"
            deadline = time.monotonic() + 120
            while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
                assert time.monotonic() < deadline, self.said
                time.sleep(0.002)
            time.sleep(delay)
            os.kill(process, signal.SIGKILL)  # nobody else waits for it, so the id is still its own
            if self.starter.wait() == -signal.SIGKILL:
                return run
        raise AssertionError("every run was over before it was killed")

    def resumed(self, alg: str, run: Path, *more: str) -> None:
        argv = [*command(alg, self.model, self.folder, *more), "-o", str(run), "--resume"]
        assert self.starter.run(argv) == 0, self.said


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("kill")
    write_rows(folder / "train.jsonl", toy_examples(12))
    starter = Starter(folder)
    yield World(folder, tiny_gpt2, starter, {})
    starter.close()


def cases(count: int) -> list[Any]:
    """The first ``count`` moments of each algorithm belong to the ordinary run."""
    return [
        pytest.param(alg, kill, id=f"{alg}-{i}-{kill[0]}", marks=[pytest.mark.slow] * (i >= count))
        for alg, seed in (("ppo", 0), ("d2lols", 1))
        for i, kill in enumerate(moments(seed))
    ]


@pytest.mark.parametrize(("alg", "kill"), cases(3))
def test_killed_at_any_moment(world: World, alg: str, kill: Kill) -> None:
    whole = world.whole(alg)
    kind, where, delay = kill
    if kind == "save":
        run = world.killed_in_the_save(alg, int(where * len(world.saves[alg])))
        # there is something to go back to, whatever the save had done
        assert checkpoints.complete_checkpoints(run / "checkpoints")
    else:
        run = world.killed_after(alg, int(where), delay)
    world.resumed(alg, run)
    assert_same_run(run, whole)


def index(events: list[str], name: str, *, last: bool = False) -> int:
    """Where an event stands whose name starts so."""
    found = [i for i, event in enumerate(events) if event.startswith(name)]
    assert found, f"{name} is not among {events}"
    return found[-1] if last else found[0]


@pytest.mark.parametrize(
    ("point", "left"),
    [
        ("half of critics.safetensors", ["step_2"]),
        ("open .rlgf_text.json", ["step_2"]),  # the weights and the tokenizer are written
        ("half of write 16 to optimizer.pt", ["step_2"]),
        ("open .COMPLETE", ["step_2"]),  # everything is on disk but the word that it is
        ("os.rename .step_4.tmp step_4", ["step_2"]),
        ("os.rename step_2 .step_2.tmp", ["step_2", "step_4"]),  # before the rotation
        ("os.rmdir .step_2.tmp", ["step_4"]),  # in it: the old one's files are gone, its folder is not
    ],
)
def test_killed_at_a_point_of_a_save(world: World, point: str, left: list[str]) -> None:
    """What is complete afterwards, and what the next one makes of it."""
    whole = world.whole("ppo")
    run = world.killed_in_the_save("ppo", index(world.saves["ppo"], point))
    assert [p.name for p in checkpoints.complete_checkpoints(run / "checkpoints")] == left
    world.resumed("ppo", run)
    assert f"resuming from step {left[-1].removeprefix('step_')}" in world.said
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step_{STEPS}"]  # nothing half made is left
    assert_same_run(run, whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_every_point_of_a_save(world: World) -> None:
    whole = world.whole("ppo")
    for event in range(len(world.saves["ppo"])):
        run = world.killed_in_the_save("ppo", event)
        assert checkpoints.complete_checkpoints(run / "checkpoints"), world.saves["ppo"][event]
        world.resumed("ppo", run)
        assert_same_run(run, whole)


@pytest.mark.parametrize(
    "point",
    [
        "open config.json",  # the new one is begun
        "open .rlgf_best.json",  # it is written, but for its note
        "os.rename best .best.old",
        "os.rename .best.new best",  # between the two: there is none
        "shutil.rmtree .best.old",
        "os.rmdir .best.old",
    ],
)
def test_killed_while_the_best_policy_is_replaced(world: World, point: str) -> None:
    """best/ is there, whole, the new one or the former one, and the resumed run ends with the same."""
    (world.folder / "reward.py").write_text("def letters(text):\n    return sum(c in 'abcdefghi' for c in text) / 9\n")
    often = ["--reward", f"{world.folder / 'reward.py'}:letters", "--set", "eval.every=1", "--set", "eval.limit=12"]
    whole, events = world.folder / "whole_best", world.folder / "events_best"
    if not whole.is_dir():
        argv = [*command("ppo", world.model, world.folder, *often), "-o", str(whole)]
        assert world.starter.run(argv, watch="best", events=str(events)) == 0, world.said
    run = world.killed_in_the_save("ppo", index(events.read_text().splitlines(), point), *often, watch="best")
    between = point == "os.rename .best.new best"
    assert (best.read(run / "best") is None) == between
    world.resumed("ppo", run, *often)
    assert_same_run(run, whole)
    assert best.read(run / "best") is not None
    assert not [p.name for p in (run / "checkpoints").iterdir() if "best" in p.name]


# --- the command as users start it


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-m", "rlgf_cli", *arguments], env=environment, stderr=subprocess.PIPE)


def test_lora_resumes(world: World, tiny_llama: Path) -> None:
    """Killed in a process of its own, not a forked one."""
    arguments = command("ppo", tiny_llama, world.folder, "--use-peft", "--lora-r", "4")
    assert world.starter.run([*arguments, "-o", str(world.folder / "lora")]) == 0, world.said
    run = world.new()
    process = start([*arguments, "-o", str(run)])
    wait_for_rows(process, run, 4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert world.starter.run([*arguments, "-o", str(run), "--resume"]) == 0, world.said
    assert_same_run(run, world.folder / "lora")


def wait_for_rows(process: subprocess.Popen[bytes], run: Path, lines: int) -> None:
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
        time.sleep(0.002)


def test_ctrl_c_saves_and_exits_130(world: World) -> None:
    whole, run = world.whole("ppo"), world.new()
    process = start([*command("ppo", world.model, world.folder), "-o", str(run)])
    wait_for_rows(process, run, 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err.decode()
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    world.resumed("ppo", run)
    assert_same_run(run, whole)


# --- a checkpoint that was damaged after it was written


def cut_short(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-10])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "weights cut short": lambda folder: cut_short(folder, "model.safetensors"),
    "optimizer missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "COMPLETE cut short": lambda folder: cut_short(folder, "COMPLETE"),
    "COMPLETE empty": lambda folder: (folder / "COMPLETE").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(world: World, damage: str) -> None:
    whole = world.whole("ppo")
    keep = ["--save-total-limit", "3"]
    run = world.new()
    argv = [*command("ppo", world.model, world.folder, *keep), "-o", str(run)]
    # before the second save: step_2 alone
    assert world.starter.run(argv, watch="checkpoint", kill_at=0) == -signal.SIGKILL
    assert world.starter.run([*argv, "--resume"]) == 0
    assert [p.name for p in checkpoints.complete_checkpoints(run / "checkpoints")] == ["step_6", "step_8", "step_9"]
    manifest = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**manifest, "status": "failed"}))
    DAMAGE[damage](run / "checkpoints" / "step_9")
    assert world.starter.run([*argv, "--resume"]) == 0, world.said
    assert "step_9" in world.said and "is damaged" in world.said, world.said
    assert "resuming from step 8" in world.said
    assert_same_run(run, whole)
