"""A resumed `train` ends as the uninterrupted one, to the bit (CPU), for every algorithm and every kind of guide."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from algorithms import NAMES, spec_of
from conftest import Result, guide_rows, toy_examples, write_rows
from fake_openai import FakeOpenAI
from rlgf_cli.training.loop import Trainer
from runs import SESSION, assert_same_run, last_checkpoint, rows_of

STEPS, STOPPED, SAVED = 7, 5, 4
"""Steps of a run; after how many it is stopped; the checkpoint that it goes on from: one step is done again."""
OPTIONS = {
    "d2lols": ["--switch-step", "6"],  # the switch comes after the resumption
    "lols": ["--p-ppo-pp", "0.5"],
    "grpo": ["--group-size", "4"],
    "rloo": ["--group-size", "4"],
    "grpo++": ["--group-size", "4"],
    "rloo++": ["--group-size", "4"],
    **{name: ["--group-size", "4"] for name in ("luffy", "mix", "hpt", "uft", "prefix-rft")},
    **{name: ["--group-size", "4", "--guide-coef-decay", "5"] for name in ("chord", "chord-phi")},
    **{name: ["--group-size", "4", "--restarted", "2", "--failed-at", "0.05"] for name in ("on-failure", "pope")},
    "steered": ["--group-size", "4", "--restart", "steered"],
    "guide_mc": ["--advantage", "guide_mc", "--mc-samples", "2"],
    "backward": ["--restart", "backward", "--restart-steps", "6"],
    "uncertain": ["--restart", "uncertain"],
    "gate": ["--gate", "--rollin-prob", "0.6", "--reward", "LUCK"],
}
VARIANTS = {"steered": "grpo++", "guide_mc": "aggrevated", "backward": "ppo++", "uncertain": "ppo++", "gate": "ppo++"}
"""What changes an algorithm's state or draws by a setting, and whose setting it is."""
LUCK = "import zlib\n\ndef luck(text):\n    return zlib.crc32(text.encode()) % 100 / 100\n"
"""A reward under which an untrained policy is at times better than the guide."""
TRAINED = {
    "shared": [],
    "separate": ["--set", "ppo.critic=separate"],
    "lora": ["--use-peft", "--lora-r", "4"],
}
ORDINARY = {
    ("ppo", "none", "separate"),
    ("ppo++", "recorded", "lora"),
    ("aggrevated", "hf", "separate"),
    ("lols", "cached", "shared"),
    ("d2lols", "hf", "lora"),
    ("grpo", "none", "shared"),
    ("rloo", "none", "lora"),
    ("grpo++", "cached", "shared"),
    ("rloo++", "hf", "shared"),
    ("bc-guide", "recorded", "shared"),
    ("dagger", "cached", "lora"),
    ("luffy", "hf", "shared"),
    ("mix", "recorded", "shared"),
    ("chord", "recorded", "lora"),
    ("chord-phi", "recorded", "shared"),
    ("hpt", "cached", "shared"),
    ("uft", "recorded", "shared"),
    ("prefix-rft", "recorded", "shared"),
    ("on-failure", "hf", "shared"),
    ("pope", "recorded", "shared"),
    ("steered", "recorded", "shared"),
    ("guide_mc", "hf", "shared"),
    ("backward", "recorded", "shared"),
    ("uncertain", "recorded", "shared"),
    ("gate", "recorded", "shared"),
}
"""What `make test` runs: each algorithm, guide and way to train at least once."""


def guides_for(alg: str) -> list[str]:
    spec = spec_of(alg)
    return ["none"] if not spec.needs_guide else ["hf", "cached"] + ["recorded"] * (not spec.needs_live_guide)


def cases() -> list[object]:
    found: list[object] = []
    for alg in NAMES:
        for guide in guides_for(alg):
            for way in TRAINED:
                if way == "separate" and not spec_of(alg).critics:
                    continue
                slow = (alg, guide, way) not in ORDINARY
                found.append(pytest.param(alg, guide, way, id=f"{alg}-{guide}-{way}", marks=[pytest.mark.slow] * slow))
    return found + [pytest.param(*case, id="-".join(case)) for case in sorted(ORDINARY) if case[0] in VARIANTS]


def test_the_ordinary_run_has_every_algorithm_guide_and_way() -> None:
    assert {alg for alg, _, _ in ORDINARY} == {*NAMES, *VARIANTS}
    assert {guide for _, guide, _ in ORDINARY} == {"none", "recorded", "hf", "cached"}
    assert {way for _, _, way in ORDINARY} == set(TRAINED)


@dataclass
class Task:
    folder: Path
    model: Path
    run_cli: Callable[..., Result]
    server: FakeOpenAI

    def train(self, alg: str, guide: str, way: str, out: str, *more: str) -> Result:
        guides = {
            "none": [],
            "hf": ["--guide", f"hf:{self.model}"],
            "recorded": ["--guide", str(self.folder / "guide.jsonl")],
            "cached": ["--guide", "openai:m", "--base-url", self.server.url],
        }
        options = [f"{self.folder / 'luck.py'}:luck" if o == "LUCK" else o for o in OPTIONS.get(alg, [])]
        return self.run_cli(
            "train", "--alg", VARIANTS.get(alg, alg), "--model", self.model, "--data", self.folder / "train.jsonl",
            "--reward", "coverage,rougeL", "--max-steps", STEPS, "--episodes", 8, "--batch-size", 4, "--epochs", 2,
            "--max-new-tokens", 8, "--lr", "1e-3", "--save-steps", 2, "--device", "cpu",
            "--eval-data", self.folder / "train.jsonl", "--set", "eval.every=3", "--set", "eval.limit=4",
            "--set", "kl.adaptive=true", "--set", "kl.target=0.05", "--set", "kl.horizon=100",
            "--set", "optim.schedule=cosine", "--set", "optim.warmup_steps=2", "--set", "optim.weight_decay=0.1",
            "--set", "ppo.entropy_coef=0.01", "--set", "rollout.save_every=1",
            *guides[guide], *options, *TRAINED[way], *more, "-o", self.folder / out,
        )  # fmt: skip


@pytest.fixture
def task(
    tmp_path: Path, tiny_gpt2: Path, run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Task]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    examples = toy_examples(12)
    write_rows(tmp_path / "train.jsonl", examples)
    write_rows(tmp_path / "guide.jsonl", guide_rows(examples, 3))
    (tmp_path / "luck.py").write_text(LUCK)
    with FakeOpenAI() as server:
        yield Task(tmp_path, tiny_gpt2, run_cli, server)


def stopped_and_resumed(task: Task, monkeypatch: pytest.MonkeyPatch, case: tuple[str, str, str], *more: str) -> Path:
    step = Trainer.step

    def dies(self: Trainer) -> object:
        if self.state.step == STOPPED:
            raise RuntimeError("the machine went away")
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", dies)
        assert task.train(*case, "run", *more).exit_code == 1
    run = task.folder / "run"
    assert (len(rows_of(run)), last_checkpoint(run).name) == (STOPPED, f"step_{SAVED}")
    done = task.train(*case, "run", *more, "--resume")
    assert done.exit_code == 0, done.stderr
    return run


@pytest.mark.parametrize(("alg", "guide", "way"), cases())
def test_a_resumed_run_is_the_uninterrupted_one(
    task: Task, monkeypatch: pytest.MonkeyPatch, alg: str, guide: str, way: str
) -> None:
    case = (alg, guide, way)
    replayed: list[str] = []
    if guide == "cached":  # bought once; both runs are then served from the cache alone
        assert task.train(*case, "bought").exit_code == 0
        assert task.server.requests
        replayed = ["--guide-mode", "replay"]
    asked = len(task.server.requests)
    done = task.train(*case, "whole", *replayed)
    assert done.exit_code == 0, done.stderr
    whole = task.folder / "whole"
    run = stopped_and_resumed(task, monkeypatch, case, *replayed)
    assert_same_run(run, whole)
    assert len(task.server.requests) == asked
    if guide == "cached":  # and what was bought is what was replayed
        ours = (*SESSION, "guide/calls", "guide/usd")
        assert rows_of(task.folder / "bought", without=ours) == rows_of(whole, without=ours)
    # there was something to get wrong
    rows, state = rows_of(whole), json.loads((last_checkpoint(whole) / "state.json").read_text())
    assert len({row["lr"] for row in rows}) == STEPS - 1  # the last iteration of the warmup and the one behind it
    assert state["horizon"] != 1.0
    likelihood = alg in ("bc-guide", "dagger")
    assert likelihood or len({row["kl/coef"] for row in rows}) > 2
    assert (state["guide_uses"] != {}) == (guide in ("hf", "cached"))
    assert (state["guide_texts"] != {}) == (guide != "none")
    if alg == "gate":
        assert sum(row["guide/gated"] for row in rows[SAVED:]) > 0, "nothing was decided with what was restored"
    if alg == "steered":
        assert state["guide_share"] != 0.5
    if alg == "pope":
        assert state["own_scores"] and rows[-1]["rollin/share"] > 0
    if alg in ("hpt", "on-failure"):
        assert sum(row["guide/requests"] for row in rows[SAVED:]) > 0, "no group failed behind the resumption"
    if alg in ("lols", "d2lols"):
        assert {row["regime"] for row in rows} == {"policy>guide", "guide>policy"}
