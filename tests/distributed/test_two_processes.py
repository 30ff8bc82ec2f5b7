"""Two processes give what one gives, end alike, and one of them alone writes to disk."""

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

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from conftest import Result, guide_rows, toy_examples, write_rows
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.runs.guide_costs import share_of
from runs import assert_figures

STEPS = 10
MANY = Path(__file__).with_name("many.py")
RUNS: dict[str, tuple[str, list[str]]] = {
    # fourteen episodes in minibatches of five: the shares are never equal
    "ppo": ("ppo", ["--set", "kl.adaptive=true", "--set", "kl.target=0.01"]),
    "ppo++": ("ppo++", ["--set", "aux.reference_nll=0.1", "--set", "ppo.entropy_coef=0.01"]),
    "gated": ("ppo++", ["--restart", "uncertain", "--gate", "--rollin-prob", "0.6", "--limit", "9"]),
    "grouped": (
        "grpo++",
        ["--group-size", "2", "--restart", "backward", "--restart-steps", "6", "--gate", "--limit", "9"],
    ),
    "luffy": ("luffy", ["--group-size", "3", "--episodes", "18"]),
    "mix": ("mix", ["--group-size", "2"]),
    "hpt": ("hpt", ["--group-size", "2", "--failed-at", "0.3", "--set", "rollout.temperature=1.1"]),
    "uft": ("uft", ["--group-size", "2"]),
    "on-failure": ("on-failure", ["--group-size", "4", "--restarted", "2", "--failed-at", "0.4", "--episodes", "16"]),
    "aggrevated": ("aggrevated", ["--gradient-accumulation-steps", "2"]),
    "grpo": ("grpo", ["--episodes", "16", "--group-size", "4"]),
    "lols": ("lols", ["--set", "ppo.critic=separate"]),
    "guide_mc": ("aggrevated", ["--advantage", "guide_mc", "--mc-samples", "2", "--limit", "9"]),
    "few": ("aggrevated", ["--limit", "3", "--batch-size", "3"]),  # prompts return within a step
    "one": ("ppo", ["--limit", "1", "--episodes", "3", "--batch-size", "1"]),  # one process has nothing to write
}


FSDP = ["ppo", "gated", "aggrevated", "lols", "one"]


@dataclass
class World:
    folder: Path
    model: Path

    def argv(self, name: str, out: str, *more: str) -> list[str]:
        algorithm, options = RUNS[name]
        texts = self.folder / "guide.jsonl"
        recorded = dict.fromkeys(("luffy", "mix", "hpt", "uft", "on-failure"), texts)
        guides = {
            **recorded,
            "ppo++": texts,
            "grpo++": texts,
            "aggrevated": f"hf:{self.model}",
            "lols": f"hf:{self.model}",
        }
        guide = ["--guide", str(guides[algorithm])] if algorithm in guides else []
        # the gate has something to decide where an untrained policy is at times better than the guide
        reward = "luck" if "--gate" in options else "letters"
        return [
            "train", "--alg", algorithm, "--model", str(self.model), "--data", str(self.folder / "train.jsonl"),
            "--reward", f"{self.folder / 'reward.py'}:{reward}", "--episodes", "14", "--batch-size", "5",
            "--epochs", "2", "--max-new-tokens", "10", "--max-steps", str(STEPS), "--lr", "1e-4", "--device", "cpu",
            "--eval-data", str(self.folder / "train.jsonl"), "--set", "eval.limit=7", "--set", "eval.every=5",
            *guide, *options, *more, "-o", str(self.folder / out),
        ]  # fmt: skip

    def rows(self, out: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (self.folder / out / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]

    def state(self, out: str) -> dict[str, Any]:
        return json.loads((self.folder / out / "checkpoints" / f"step_{STEPS}" / "state.json").read_text())

    def manifest(self, out: str) -> dict[str, Any]:
        return json.loads((self.folder / out / "run.json").read_text())

    def best(self, out: str) -> dict[str, Any]:
        return json.loads((self.folder / out / "best" / "rlgf_best.json").read_text())

    def weights(self, out: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / out / "model.safetensors")


def world_in(folder: Path, model: Path) -> World:
    rows = toy_examples(40)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "guide.jsonl", guide_rows(rows, 2))
    (folder / "reward.py").write_text(
        "import zlib\n\n"
        "def letters(text):\n    return sum(c in 'abcdefghijklm' for c in text.lower()) / max(1, len(text))\n\n"
        "def luck(text):\n    return zlib.crc32(text.encode()) % 100 / 100\n"
    )
    return World(folder, model)


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "RLGF_CACHE_DIR": str(folder / "cache"), "ACCELERATE_USE_CPU": "true"}


def torchrun(folder: Path, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*command, *arguments], env=environment(folder), capture_output=True, text=True, timeout=300, cwd=folder
    )


@dataclass
class Two:
    world: World
    codes: list[dict[str, int]]
    wrote: list[list[str]]
    shards: list[list[int]]
    stderr: str


def run_all(folder: Path, gpt2: Path, t5: Path) -> None:
    world = world_in(folder, gpt2)
    runs = [(name, world.argv(name, f"two_{name}"), None) for name in RUNS]
    fsdp = ["--set", "parallel.strategy=fsdp"]
    runs += [(f"fsdp_{name}", world.argv(name, f"fsdp_{name}", *fsdp, "--profile"), None) for name in FSDP]
    runs += [("fsdp_t5", world.argv("ppo", "fsdp_t5", *fsdp, "--model", str(t5)), None)]
    runs += [("fsdp_outage", world.argv("ppo", "fsdp_outage", *fsdp), 4)]
    runs += [("fsdp_resumed", world.argv("ppo", "fsdp_outage", *fsdp, "--resume"), None)]
    runs += [("fsdp_stopped", world.argv("ppo", "fsdp_stopped", *fsdp), 4)]
    runs += [
        ("outage", world.argv("aggrevated", "outage"), 4),
        ("outage_again", world.argv("aggrevated", "outage_again"), 4),
        ("resumed", world.argv("aggrevated", "outage", "--resume"), None),
        ("done", world.argv("aggrevated", "outage", "--resume"), None),
        ("used", world.argv("ppo", "two_ppo"), None),
        ("bad_reward", world.argv("ppo", "bad_reward", "--reward", "no_such_reward"), None),
        ("three", world.argv("ppo", "three", "--num-processes", "3"), None),
    ]
    plan = world.folder / "plan" / "plan.json"
    plan.parent.mkdir()
    watched = str(world.folder / "")
    plan.write_text(
        json.dumps({"runs": [{"argv": argv, "outage": outage} for _, argv, outage in runs], "watch": watched})
    )
    ran = torchrun(world.folder, str(MANY), str(plan))
    assert ran.returncode == 0, ran.stderr
    told = [json.loads((plan.parent / f"rank_{rank}.json").read_text()) for rank in range(2)]
    found = {"names": [name for name, _, _ in runs], "told": told, "stderr": ran.stderr, "model": str(gpt2)}
    (plan.parent / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, tiny_t5: Path) -> Two:
    """All runs in two processes, which are started once, for all workers of the test run."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / f"two-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    found = folder / "plan" / "found.json"
    try:
        folder.mkdir()
    except FileExistsError:  # another worker is at it
        while not found.is_file():
            assert not (folder / "failed").exists(), "the runs failed; another worker says why"
            time.sleep(0.2)
    else:
        try:
            run_all(folder, tiny_gpt2, tiny_t5)
        except BaseException:
            (folder / "failed").touch()
            raise
    data = json.loads(found.read_text())
    told = data["told"]
    wrote = [[p for p in t["wrote"] if "/cache" not in p and "/plan/" not in p] for t in told]
    codes = [dict(zip(data["names"], t["codes"], strict=True)) for t in told]
    return Two(World(folder, Path(data["model"])), codes, wrote, told[0]["shards"], data["stderr"])


@pytest.fixture
def alone(two: Two, run_cli: Callable[..., Result]) -> Callable[..., str]:
    """``alone("ppo", "more", "options")`` -> the name of the folder of the same run in one process."""

    def run(name: str, *more: str, folder: str | None = None) -> str:
        out = folder or f"alone_{name}"
        result = run_cli(*two.world.argv(name, out, *more))
        assert result.exit_code == 0, result.stderr
        return out

    return run


def assert_same_figures(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    """Every figure of every step to 1e-5, and without a drift: the mean of the residuals to 1e-6."""
    assert len(a) == STEPS
    assert_figures(a, b, point=1e-5, mean=1e-6)


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """To 1e-5, but for the biases of attention's keys, which change no output: their gradient is a rounding error,
    and Adam makes a step of it."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        difference = (b[name] - tensor).abs()
        if name.endswith("c_attn.bias"):
            queries, keys, values = difference.chunk(3)
            assert float(keys.max()) < 2e-3, name
            difference = torch.cat([queries, values])
        assert float(difference.max()) < 1e-5, name


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(two: Two, alone: Callable[..., str], name: str) -> None:
    assert [codes[name] for codes in two.codes] == [0, 0]
    out = alone(name)
    assert_same_figures(two.world.rows(out), two.world.rows(f"two_{name}"))
    one, other = two.world.state(out), two.world.state(f"two_{name}")
    assert one["guide_uses"] == other["guide_uses"]  # the sample index of every guide text
    assert one["guide_texts"] == other["guide_texts"]
    assert (one["guide_uses"] != {}) == (RUNS[name][0] in ("aggrevated", "lols"))
    assert other["guide_scores"] == pytest.approx(one["guide_scores"])
    assert (one["own_scores"] != {}) == (one["guide_scores"] != {}) == ("--gate" in RUNS[name][1])
    assert ("--gate" in RUNS[name][1]) == (sum(row.get("guide/gated", 0) for row in two.world.rows(out)) > 0)
    assert one["watched"] == other["watched"]  # no figure is watched: it is empty
    assert other["explained"] == pytest.approx(one["explained"], rel=1e-4, abs=1e-6)
    for critic, moments in one["moments"].items():
        assert other["moments"][critic] == pytest.approx(moments, rel=1e-6)
    figures = [n for n in one if not n.startswith("guide_") and n not in ("watched", "explained", "moments")]
    for figure in figures:
        assert other[figure] == pytest.approx(one[figure], rel=1e-6), figure
    start = load_file(two.world.model / "model.safetensors")
    assert_same_weights(two.world.weights(out), two.world.weights(f"two_{name}"))
    assert any(not torch.equal(start[n], t) for n, t in two.world.weights(f"two_{name}").items())
    spend = [two.world.manifest(folder)["spend"] for folder in (out, f"two_{name}")]
    assert spend[0] == spend[1]


def test_the_product_loads(two: Two) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(two.world.folder / "two_ppo")
    assert torch.equal(model.transformer.wte.weight, two.world.weights("two_ppo")["transformer.wte.weight"])
    assert [two.world.manifest(f"two_{name}")["processes"] for name in RUNS] == [2] * len(RUNS)


@pytest.mark.parametrize("name", FSDP)
def test_shards_give_what_ddp_gives(two: Two, name: str) -> None:
    assert [codes[f"fsdp_{name}"] for codes in two.codes] == [0, 0]
    assert_same_figures(two.world.rows(f"two_{name}"), two.world.rows(f"fsdp_{name}"))
    assert two.world.state(f"two_{name}")["guide_uses"] == two.world.state(f"fsdp_{name}")["guide_uses"]
    assert_same_weights(two.world.weights(f"two_{name}"), two.world.weights(f"fsdp_{name}"))
    AutoModelForCausalLM.from_pretrained(two.world.folder / f"fsdp_{name}")
    best = [two.world.best(f"{strategy}_{name}") for strategy in ("two", "fsdp")]
    assert best[0]["step"] == best[1]["step"] and best[0]["score"] == pytest.approx(best[1]["score"], abs=1e-5)
    assert best[1]["score"] == max(row.get("eval/score", -1) for row in two.world.rows(f"fsdp_{name}"))
    AutoModelForCausalLM.from_pretrained(two.world.folder / f"fsdp_{name}" / "best")
    kept = load_file(two.world.folder / f"fsdp_{name}" / "best" / "model.safetensors")
    assert {n: t.shape for n, t in kept.items()} == {n: t.shape for n, t in two.world.weights(f"two_{name}").items()}


def test_an_encoder_decoder_in_shards(two: Two, alone: Callable[..., str], tiny_t5: Path) -> None:
    assert [codes["fsdp_t5"] for codes in two.codes] == [0, 0]
    out = alone("ppo", "--model", str(tiny_t5), folder="alone_t5")
    # rounding grows over ten steps: 1.1e-5 seen in the norm of a gradient
    assert_figures(two.world.rows(out), two.world.rows("fsdp_t5"), point=5e-5, mean=1e-5)
    AutoModelForSeq2SeqLM.from_pretrained(two.world.folder / "fsdp_t5")


def test_a_process_holds_half_of_the_states(two: Two) -> None:
    networks = [pair for pair in two.shards if pair[0] > 1000]  # a value head's single row is on one process
    assert len(networks) > 9
    assert all(0.4 * whole < shard < 0.6 * whole for whole, shard in networks)


def test_a_sharded_run_resumes_in_shards_or_without(two: Two, alone: Callable[..., str]) -> None:
    assert [codes["fsdp_outage"] for codes in two.codes] == [3, 3]
    assert [codes["fsdp_resumed"] for codes in two.codes] == [0, 0]
    assert two.world.rows("fsdp_outage") == two.world.rows("fsdp_ppo")
    whole, resumed = two.world.weights("fsdp_ppo"), two.world.weights("fsdp_outage")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    alone("ppo", "--resume", folder="fsdp_stopped")
    assert_same_figures(two.world.rows("fsdp_ppo"), two.world.rows("fsdp_stopped"))


def test_one_process_alone_writes(two: Two) -> None:
    main, other = two.wrote
    assert any(p.endswith("two_ppo/metrics.jsonl") for p in main)
    assert any("two_ppo/checkpoints" in p for p in main)
    # each charge is in the run's folder before the call is sent, whoever makes it
    assert [p for p in other if not p.endswith("/spend.json")] == []


def test_one_process_alone_speaks(two: Two) -> None:
    """A profile per run that asked for one, and one sample of the first step per run that made one."""
    assert two.stderr.count("| part ") == len(FSDP)
    begun = [codes for name, codes in two.codes[0].items() if name not in ("used", "bad_reward", "three", "done")]
    resumed = sum(name in ("resumed", "fsdp_resumed") for name in two.codes[0])
    assert sum(line.startswith("step 1: ") for line in two.stderr.splitlines()) == len(begun) - resumed


def test_what_stops_one_process_stops_both_and_a_resumed_run_ends_the_same(two: Two, alone: Callable[..., str]) -> None:
    """The guide of one process is out: both end with the same code, and the state is kept."""
    assert [codes["outage"] for codes in two.codes] == [3, 3]
    again = two.world.folder / "outage_again"
    assert two.world.manifest("outage_again")["status"] == "stopped"
    assert [p.name for p in (again / "checkpoints").iterdir()] == ["step_4"]
    assert two.stderr.count("the guide is out") == 4  # once for each of the runs
    assert [codes["resumed"] for codes in two.codes] == [0, 0]
    assert [codes["done"] for codes in two.codes] == [0, 0]
    whole, resumed = two.world.weights("two_aggrevated"), two.world.weights("outage")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert two.world.rows("two_aggrevated") == two.world.rows("outage")
    # and with another number of processes
    alone("aggrevated", "--resume", folder="outage_again")
    assert_same_figures(two.world.rows("two_aggrevated"), two.world.rows("outage_again"))
    assert two.world.state("two_aggrevated")["guide_uses"] == two.world.state("outage_again")["guide_uses"]
    assert two.world.manifest("outage_again")["processes"] == 1


def test_what_is_wrong_is_said_once_and_leaves_nothing(two: Two) -> None:
    for name in ("used", "bad_reward", "three"):
        assert [codes[name] for codes in two.codes] == [2, 2], name
    assert two.stderr.count("this folder already holds a run") == 1
    assert two.stderr.count("no_such_reward") == 1
    assert "3 processes were asked for and 2 run" in two.stderr
    assert not (two.world.folder / "bad_reward").exists() and not (two.world.folder / "three").exists()


@pytest.mark.parametrize("name", ["ppo", "aggrevated", "grpo"])
def test_accumulation_is_a_whole_minibatch(two: Two, alone: Callable[..., str], name: str) -> None:
    sizes = ["--episodes", "16", "--batch-size", "8", "--gradient-accumulation-steps"]
    whole = alone(name, *sizes, "1", folder=f"whole_{name}")
    parts = alone(name, *sizes, "8", folder=f"parts_{name}")
    assert_same_figures(two.world.rows(whole), two.world.rows(parts))


def test_the_limits_of_a_guide_are_the_runs() -> None:
    asked = GuideConfig(name="openai:some-model", requests_per_minute=60, concurrency=16)
    part = share_of(asked, 8)
    assert (part.requests_per_minute, part.tokens_per_minute, part.concurrency) == (7.5, None, 2)
    assert share_of(asked, 64).concurrency == 1
    assert share_of(asked, 1) == asked


# --- how they are started, and how they end


@pytest.fixture
def world(tmp_path: Path, tiny_gpt2: Path) -> World:
    return world_in(tmp_path, tiny_gpt2)


def test_torchrun_starts_the_command(world: World) -> None:
    ran = torchrun(world.folder, "-m", "rlgf_cli", *world.argv("ppo", "run", "--max-steps", "1"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [str(world.folder / "run")]
    assert world.manifest("run")["processes"] == 2


def test_accelerate_on_a_cpu_starts_one_and_that_is_refused(world: World) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "rlgf_cli"]
    argv = world.argv("ppo", "run")
    ran = subprocess.run([*launcher, *argv], env=environment(world.folder), capture_output=True, text=True, timeout=120)
    assert ran.returncode != 0
    assert "2 processes were asked for and 1 runs" in ran.stderr
    assert not (world.folder / "run").exists()


def test_an_accelerate_config_starts_it_and_the_exit_code_is_handed_on(world: World) -> None:
    file = world.folder / "machine.yaml"
    file.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\nnum_processes: 1\n")
    argv = world.argv("ppo", "run", "--accelerate-config", str(file), "--num-processes", "2")
    command = [sys.executable, "-m", "rlgf_cli", *argv]
    ran = subprocess.run(command, env=environment(world.folder), capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2  # accelerate's own would be 1
    assert "2 processes were asked for and 1 runs" in ran.stderr


@pytest.fixture
def started(world: World) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []

    def start(*argv: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlgf_cli", *argv],
            env=environment(world.folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


def wait_for_rows(world: World, out: str) -> None:
    for _ in range(600):
        file = world.folder / out / "metrics.jsonl"
        if file.is_file() and file.read_text().count("\n") >= 2:
            return
        time.sleep(0.1)
    raise AssertionError("no rows were written")


@pytest.mark.parametrize(
    ("number", "code", "status"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGUSR1, 3, "stopped")]
)
def test_the_shortcut_hands_on_signals_and_exit_codes(
    world: World, started: Any, number: int, code: int, status: str
) -> None:
    argv = world.argv("aggrevated", "run", "--max-steps", "1000", "--num-processes", "2")
    launcher = started(*argv)
    wait_for_rows(world, "run")
    launcher.send_signal(number)
    stdout, stderr = launcher.communicate(timeout=60)
    assert launcher.returncode == code, stderr
    assert stdout == "" and stderr.count("the state is saved") == 1
    assert world.manifest("run")["status"] == status
    steps = len(world.rows("run"))
    assert [p.name for p in (world.folder / "run" / "checkpoints").iterdir()] == [f"step_{steps}"]
    again = started(*argv, "--resume", "--max-calls", "1")  # the account of the run is older than this session
    _, stderr = again.communicate(timeout=60)
    assert again.returncode == 3, stderr
    assert stderr.count("the budget leaves no room") == 1


def test_a_process_that_dies_takes_the_others_with_it(world: World, started: Any) -> None:
    launcher = started(*world.argv("ppo", "run", "--max-steps", "1000", "--num-processes", "2"))
    wait_for_rows(world, "run")
    children = psutil.Process(launcher.pid).children()
    assert len(children) == 2
    children[1].kill()
    assert launcher.wait(timeout=60) != 0
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
