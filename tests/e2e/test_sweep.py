"""`rlgf sweep` from a YAML to the table: resumed, killed, interrupted, with a run that fails, with a changed YAML."""

from __future__ import annotations

import csv
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

import psutil
import pytest
import yaml

from conftest import guide_rows, toy_examples, write_rows
from fake_openai import FakeOpenAI
from rlgf_cli.sweep import work

SERVER = Path(__file__).parents[1] / "fork_server.py"
SWEEP_PROCESS = """
import sys
from rlgf_cli.sweep import work
work.RLGF[:] = {prefix!r}
from rlgf_cli.cli.app import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """What stands for ``python -m rlgf_cli``: runs that need not import torch (see fork_server.py)."""
    path = tmp_path_factory.mktemp("server") / "s"
    server = subprocess.Popen([sys.executable, str(SERVER), "serve", str(path)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None and server.stdout.readline() == "ready\n"
    yield [sys.executable, "-S", str(SERVER), "run", str(path)]
    server.kill()
    server.wait()


@dataclass
class World:
    folder: Path
    recipe: dict[str, Any]
    run_cli: Callable[..., Any]
    prefix: list[str]

    @property
    def out(self) -> Path:
        return self.folder / "sweep"

    @property
    def yaml(self) -> Path:
        path = self.folder / "sweep.yaml"
        path.write_text(yaml.safe_dump(self.recipe, sort_keys=False))
        return path

    def sweep(self, *more: object) -> Any:
        return self.run_cli("sweep", self.yaml, "-o", "sweep", *more)

    def started(self, *more: str) -> subprocess.Popen[str]:
        """A sweep in a process of its own, that can be killed."""
        code = SWEEP_PROCESS.format(prefix=self.prefix)
        words = [sys.executable, "-c", code, "sweep", str(self.yaml), "-o", "sweep", *more]
        return subprocess.Popen(words, cwd=self.folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def manifest(self, name: str) -> dict[str, Any]:
        return json.loads((self.out / name / "run.json").read_text())

    def points(self) -> dict[str, dict[str, Any]]:
        return {p["name"]: p for p in json.loads((self.out / "sweep.json").read_text())["points"]}

    def runs(self) -> dict[str, tuple[str, int]]:
        """Every training that there is: its run id and how often it was resumed."""
        found = {}
        for path in sorted(self.out.glob("*/seed_*/run.json")):
            told = json.loads(path.read_text())
            found[str(path.parent.relative_to(self.out))] = (told["run_id"], told["resumed"])
        return found

    def waits_for(self, sweep: subprocess.Popen[str], name: str, rows: int) -> None:
        """Until a training has written that many rows."""
        until = time.monotonic() + 120
        while work.rows(self.out / name) < rows:
            assert sweep.poll() is None, sweep.communicate()
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.fixture
def world(tmp_path, tiny_gpt2, run_cli, prefix, monkeypatch) -> World:
    examples = toy_examples(8)
    write_rows(tmp_path / "train.jsonl", examples)
    write_rows(tmp_path / "test.jsonl", toy_examples(12, seed=5))
    write_rows(tmp_path / "guide.jsonl", guide_rows(examples, 2))
    (tmp_path / "letters.py").write_text("def score(text):\n    return len(set(text)) / 10\n")
    (tmp_path / "sft").symlink_to(tiny_gpt2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(work, "RLGF", prefix)
    recipe = {
        "base": {
            "model": "sft", "data": "train.jsonl", "guide": "guide.jsonl", "reward": "letters.py:score", "max_steps": 2,
            "optim": {"learning_rate": 1e-3}, "lengths": {"max_new_tokens": 6},
            "rollout": {"episodes": 4, "save_every": 0, "show_count": 0},
            "ppo": {"epochs": 1, "minibatch_size": 4}, "save_steps": 1, "kl": 0,
        },
        "grid": {"alg": ["ppo", "ppo++"], "seed": [0, 1]},
        "eval": {"data": "test.jsonl", "metrics": "coverage", "lengths": {"max_new_tokens": 6},
                 "decoding": {"temperature": 1.0}},
        "systems": {"SFT": "sft"},
        "baselines": ["PPO", "SFT"],
        "interval": {"resamples": 200},
    }  # fmt: skip
    return World(tmp_path, recipe, run_cli, prefix)


def table(world: World) -> dict[str, dict[str, str]]:
    return {row["system"]: row for row in csv.DictReader((world.out / "table.csv").open())}


def test_from_the_yaml_to_the_table_and_on(world):
    done = world.sweep("--jobs", 2)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == (world.out / "table.md").read_text()
    lines = done.stdout.splitlines()
    assert lines[0] == "| system | seeds | coverage | p vs ppo | p vs SFT |"
    assert [line.split(" | ")[0:2] for line in lines[2:5]] == [["| ppo", "2"], ["| ppo++", "2"], ["| SFT", "1"]]
    # the numbers are those of the evaluations
    evals = {n: json.loads((world.out / n / "eval/scores.json").read_text()) for n in world.points()}
    means = {n: scores["metrics"]["coverage"]["value"] for n, scores in evals.items()}
    for system, names in {"ppo": ["ppo/seed_0", "ppo/seed_1"], "SFT": ["systems/SFT"]}.items():
        assert float(table(world)[system]["value"]) == pytest.approx(sum(means[n] for n in names) / len(names))
    told = json.loads((world.out / "comparison_SFT.json").read_text())
    p = {row["system"]: row["difference"] for row in told["figures"]["coverage"]["rows"]}
    assert p["SFT"] is None and float(table(world)["ppo"]["p_holm vs SFT"]) == p["ppo"]["p_holm"]
    assert "ppo++" in (world.out / "table.html").read_text()
    assert {point["state"] for point in world.points().values()} == {"done"}
    assert world.manifest(".")["result"] == {"done": 5}

    # again: nothing is run twice
    before = world.runs()
    assert len(before) == 4
    refused = world.sweep()
    assert refused.exit_code == 2 and "already holds a run" in refused.stderr
    again = world.sweep("--resume")
    assert again.exit_code == 0 and "5 of 5 points are done already" in again.stderr
    assert again.stdout == done.stdout and world.runs() == before

    # a seed more: only the new points are run
    world.recipe["grid"]["seed"] = [0, 1, 2]
    more = world.sweep("--resume")
    assert more.exit_code == 0, more.stderr
    after = world.runs()
    assert {n: run for n, run in after.items() if n in before} == before
    assert set(after) - set(before) == {"ppo/seed_2", "ppo++/seed_2"}

    # one metric more: the texts are kept and scored, nothing is trained
    texts = (world.out / "ppo/seed_0/eval/predictions.jsonl").read_text()
    world.recipe["eval"]["metrics"] = ["coverage", "length"]
    assert world.sweep("--resume").exit_code == 0
    assert world.runs() == after
    assert "length" in (world.out / "table.md").read_text()
    kept = [json.loads(line)["prediction"] for line in texts.splitlines()]
    now = (world.out / "ppo/seed_0/eval/predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in now] == kept

    # another setting for points that are there: refused by name, nothing touched
    world.recipe["base"]["kl"] = 0.5
    changed = world.sweep("--resume")
    assert changed.exit_code == 2, changed.stderr
    assert "sweep/ppo/seed_0" in changed.stderr and "kl.coef is 0.5; the run began with 0.0" in changed.stderr
    assert world.runs() == after


def test_a_point_that_fails_leaves_the_others_alone(world):
    reward = world.folder / "reward.py"
    reward.write_text("def score(text):\n    return float('nan')\n")
    world.recipe["grid"] = {"alg": ["ppo", "ppo++"], "reward": ["coverage", "reward.py:score"]}
    world.recipe["skip"] = [{"alg": "ppo++", "reward": "reward.py:score"}]
    world.recipe["baselines"] = ["SFT"]
    done = world.sweep()
    assert done.exit_code == 1, done.stderr
    name = "ppo-reward-reward.py-score/seed_0"
    states = {n: p["state"] for n, p in world.points().items()}
    assert states == {
        "ppo-reward-coverage/seed_0": "done", "ppo++-reward-coverage/seed_0": "done", name: "failed",
        "systems/SFT": "done",
    }, done.stderr  # fmt: skip
    letter = world.points()[name]["said"]
    assert "nan" in letter.lower() and letter in done.stderr
    assert f"error: 1 of 4 points failed: ppo, reward reward.py:score, seed 0: {letter}" in done.stderr
    # the table names it
    row = next(line for line in done.stdout.splitlines() if line.startswith("| ppo, reward reward.py:score "))
    assert "| 0 of 1 | missing | missing |" in row
    assert f"- Missing: ppo, reward reward.py:score: seed 0 failed: {letter}" in done.stdout
    assert world.manifest(".")["status"] == "failed"
    # mended, it is tried again, and the others are not
    before = world.runs()
    reward.write_text("def score(text):\n    return len(text) / 10\n")
    mended = world.sweep("--resume")
    assert mended.exit_code == 0, mended.stderr
    assert "missing" not in mended.stdout
    assert {n: run for n, run in world.runs().items() if n != name} == {n: r for n, r in before.items() if n != name}


@pytest.mark.parametrize("with_child", [True, False], ids=["with its run", "alone"])
def test_a_killed_sweep_goes_on_where_it_was(world, with_child):
    world.recipe["base"]["max_steps"] = 16
    world.recipe["base"]["save_steps"] = 3
    world.recipe["grid"] = {"alg": ["ppo"], "seed": [0, 1]}
    sweep = world.started()
    world.waits_for(sweep, "ppo/seed_0", 5)
    children = psutil.Process(sweep.pid).children()
    sweep.kill()
    sweep.wait()
    assert len(children) == 1
    if with_child:
        os.kill(run_of(children[0]), signal.SIGKILL)
        psutil.wait_procs(children)
    run_id = world.manifest("ppo/seed_0")["run_id"]
    done = world.sweep("--resume")
    assert done.exit_code == 0, done.stderr
    assert world.runs()["ppo/seed_0"] == (run_id, int(with_child))
    assert world.runs()["ppo/seed_1"][1] == 0
    assert ("waiting for it" in done.stderr) == (not with_child)
    for seed in (0, 1):
        steps = [json.loads(line)["step"] for line in (world.out / f"ppo/seed_{seed}/metrics.jsonl").open()]
        assert steps == list(range(1, 17))


def run_of(process: psutil.Process) -> int:
    """The forked process that does the work of the one that the sweep started."""
    words = process.cmdline()
    return next(p.pid for p in psutil.process_iter() if p.pid != process.pid and _serves(p, words))


def _serves(process: psutil.Process, words: list[str]) -> bool:
    try:
        parent = process.parent()
        return parent is not None and "serve" in parent.cmdline() and words[4] in parent.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def test_ctrl_c_lets_the_runs_save_and_goes_on(world):
    world.recipe["base"]["max_steps"] = 20
    world.recipe["base"]["save_steps"] = 20
    world.recipe["grid"] = {"alg": ["ppo"], "seed": [0, 1]}
    sweep = world.started("--jobs", "2")
    for seed in (0, 1):
        world.waits_for(sweep, f"ppo/seed_{seed}", 2)
    sweep.send_signal(signal.SIGINT)
    out, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 130, err
    assert out == "" and "interrupted: 0 of 3 points are done" in err and "--resume" in err
    assert world.manifest(".")["status"] == "interrupted"
    saved = {}
    for seed in (0, 1):
        assert world.manifest(f"ppo/seed_{seed}")["status"] == "interrupted"
        (checkpoint,) = (world.out / f"ppo/seed_{seed}/checkpoints").iterdir()
        saved[seed] = int(checkpoint.name.removeprefix("step_"))
        assert (checkpoint / "COMPLETE").is_file() and saved[seed] < 20
    done = world.sweep("--resume")
    assert done.exit_code == 0, done.stderr
    for seed in (0, 1):
        assert f"resuming from step {saved[seed]}" in (world.out / f"logs/ppo/seed_{seed}.log").read_text()


def test_one_budget_for_all_runs(world, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789abcdef")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FakeOpenAI() as server:
        prices = {"usd_per_million_input": 1000, "usd_per_million_output": 1000}
        world.recipe["base"]["guide"] = {"name": "openai:m", "base_url": server.url, **prices}
        world.recipe["grid"] = {"alg": ["ppo++"], "seed": [0, 1]}
        world.recipe["baselines"] = ["SFT"]
        stopped = world.sweep("--budget-usd", 0.1)
        assert stopped.exit_code == 3, stopped.stderr
        told = json.loads((world.out / "sweep.json").read_text())
        charged = [world.manifest(f"ppo++/seed_{seed}")["spend"]["charged_usd"] or 0.0 for seed in (0, 1)]
        assert 0 < told["spent_usd"] == pytest.approx(sum(charged)) and told["spent_usd"] <= 0.1
        assert world.manifest(".")["status"] == "stopped" and "raise budget_usd" in stopped.stderr
        asked = len(server.requests)
        done = world.sweep("--budget-usd", 5, "--resume")
        assert done.exit_code == 0, done.stderr
        spend = [world.manifest(f"ppo++/seed_{seed}")["spend"] for seed in (0, 1)]
        assert asked < len(server.requests) == sum(one["calls"] for one in spend)
        spent = json.loads((world.out / "sweep.json").read_text())["spent_usd"]
        assert spent == pytest.approx(sum(one["charged_usd"] for one in spend)) and told["spent_usd"] < spent <= 5


def test_a_sweep_at_work_is_left_alone(world):
    world.recipe["base"]["max_steps"] = 60
    sweep = world.started()
    world.waits_for(sweep, "ppo/seed_0", 1)
    for more in (["--resume"], ["--overwrite"]):
        refused = world.sweep(*more)
        assert refused.exit_code == 2 and f"process {sweep.pid} on" in refused.stderr
    so_far = world.sweep("--table")
    assert so_far.exit_code == 2 and "0 of 3 systems are evaluated so far" in so_far.stderr
    assert sweep.poll() is None
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait(60) == 130
    sweep.communicate()


def test_the_table_of_what_is_there_so_far(world):
    world.recipe["grid"] = {"alg": ["ppo"], "seed": [0]}
    assert world.sweep().exit_code == 0
    world.recipe["grid"] = {"alg": ["ppo", "ppo++"], "seed": [0, 1]}
    before = world.runs()
    done = world.sweep("--table")
    assert done.exit_code == 0, done.stderr
    rows = {line.split(" | ")[0].strip("| "): line for line in done.stdout.splitlines()}
    assert " | 1 of 2 | " in rows["ppo"] and " | 0 of 2 | missing | missing | missing |" in rows["ppo++"]
    assert "- Missing: ppo: seed 1 waiting" in done.stdout
    assert world.runs() == before


def test_the_runs_are_those_of_this_interpreter():
    shown = subprocess.run([*work.RLGF, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("rlgf ")
    assert work.RLGF[0] == sys.executable
