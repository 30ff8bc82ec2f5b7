"""A reward that can be gamed, and a watched figure that sees it: ``rlgf train --watch``; and rewards that move.

The policy learns toy sentences first. Then it is paid for the word "the", which is had by writing nothing else: ROUGE
sees that, and another figure that likes the word does not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from conftest import Result, toy_examples, write_rows
from rlgf_cli.config.loader import resolve
from rlgf_cli.config.sft import SftConfig
from rlgf_cli.runs import best
from rlgf_cli.stages import sft
from rlgf_cli.stages.session import StageSession
from rlgf_cli.training.loop import Trainer
from runs import assert_figures, assert_same_run, assert_tensors, rows_of

Train = Callable[..., Result]
STEPS = 12


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a reward that can be gamed, and a policy that writes toy sentences."""
    folder = tmp_path_factory.mktemp("watch")
    write_rows(folder / "train.jsonl", toy_examples(60))
    write_rows(folder / "held_out.jsonl", toy_examples(40, seed=1))
    (folder / "reward.py").write_text(
        "def articles(text):\n    return text.split().count('the')\n\n"
        "def share(text):\n    return articles(text) / max(1, len(text.split()))\n"
    )
    (folder / "small.yaml").write_text("architecture: gpt2\nhidden: 32\nlayers: 1\nheads: 2\ntokenizer: word\n")
    flags = {
        "model": str(folder / "small.yaml"), "data": str(folder / "train.jsonl"), "output": str(folder / "sft"),
        "model.device": "cpu", "optim.learning_rate": 1e-2, "epochs": 8, "batch_size": 16, "lengths.max_new_tokens": 24,
    }  # fmt: skip
    sft.run(resolve(SftConfig, flags=flags))
    return folder


@pytest.fixture
def train(run_cli: Train, task: Path, tmp_path: Path) -> Train:
    def run(*more: object, reward: str = "articles", folder: str = "run") -> Result:
        reward = f"{task / 'reward.py'}:{reward}" if reward == "articles" else reward
        return run_cli(
            "train", "--alg", "ppo", "--model", task / "sft", "--data", task / "train.jsonl", "--device", "cpu",
            "--reward", reward, "--episodes", 32, "--batch-size", 32, "--epochs", 2, "--max-new-tokens", 16,
            "--lr", "3e-3", "--kl-coef", 0, "--max-steps", STEPS, "--save-steps", 4, *more, "-o", tmp_path / folder,
        )  # fmt: skip

    return run


@pytest.fixture
def held_out(task: Path) -> list[object]:
    return ["--eval-data", task / "held_out.jsonl", "--set", "eval.every=2"]


def result_of(run: Path) -> dict[str, Any]:
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["status"] == "done"
    return manifest["result"]


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def test_a_gamed_reward_is_said_and_the_run_goes_on(train: Train, tmp_path: Path, held_out: list[object]) -> None:
    done = train(*held_out, "--watch", "rouge")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("the score no longer measures the watched quality") == 1
    rows, result = rows_of(tmp_path / "run"), result_of(tmp_path / "run")
    looked = [row for row in rows if "eval/watch" in row]
    assert [row["step"] for row in looked] == [2, 4, 6, 8, 10, 12]
    first, last = looked[0], looked[-1]
    assert last["eval/score"] > 3 * first["eval/score"] and last["eval/watch"] < 0.7 * first["eval/watch"]
    assert last["eval/watch"] < 0.7 * rows[0]["eval/start_watch"] and "eval/start_watch" not in rows[1]
    assert result["warning/gamed-reward"] == sum(row.get("eval/diverged", 0) for row in looked) >= 2
    assert result["steps"] == STEPS and "diverged_at" not in result
    assert_tensors(weights(tmp_path / "run"), weights(tmp_path / f"run/checkpoints/step_{STEPS}"))
    kept = best.read(tmp_path / "run/best_watched")
    assert kept == {"schema_version": 1, "step": 2, "score": max(row["eval/watch"] for row in looked)}


def test_it_ends_there_where_that_is_wanted(train: Train, tmp_path: Path, held_out: list[object]) -> None:
    """The model is the best one by the watched figure; the run is done, and a resumption says so."""
    done = train(*held_out, "--watch", "rouge", "--stop-on-divergence")
    assert done.exit_code == 0 and done.stdout == f"{tmp_path / 'run'}\n", done.stderr
    rows, result = rows_of(tmp_path / "run"), result_of(tmp_path / "run")
    ended = result["diverged_at"]
    assert len(rows) == ended < STEPS and rows[-1]["eval/diverged"] == 1
    assert [row.get("eval/diverged", 0) for row in rows[:-1]] == [0] * (ended - 1)
    watched = {row["step"]: row["eval/watch"] for row in rows if "eval/watch" in row}
    back = max(watched, key=lambda step: watched[step])
    assert (result["model_step"], result["model_watched"], result["steps"]) == (back, watched[back], back)
    assert result["eval/watch"] == watched[back]
    assert f"the run ended at step {ended} of {STEPS}" in done.stderr and f"step {back}, which" in done.stderr
    assert_tensors(weights(tmp_path / "run"), weights(tmp_path / "run/best_watched"))
    assert not (tmp_path / "run" / best.NOTE).exists()
    last = weights(tmp_path / f"run/checkpoints/step_{ended}")
    assert any((tensor != last[name]).any() for name, tensor in weights(tmp_path / "run").items())
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    again = train(*held_out, "--watch", "rouge", "--stop-on-divergence", "--resume")
    assert again.exit_code == 0 and "is done already" in again.stderr, again.stderr
    assert f"the run ended at step {ended} of {STEPS}" in again.stderr
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before and result_of(tmp_path / "run") == result


def test_a_run_whose_watched_figure_agrees_is_left_alone(
    train: Train, task: Path, tmp_path: Path, held_out: list[object]
) -> None:
    done = train(*held_out, "--watch", f"{task / 'reward.py'}:share", "--stop-on-divergence")
    assert done.exit_code == 0 and "no longer measures" not in done.stderr, done.stderr
    rows, result = rows_of(tmp_path / "run"), result_of(tmp_path / "run")
    first, last = (next(row for row in found if "eval/watch" in row) for found in (rows, rows[::-1]))
    assert last["eval/score"] > 3 * first["eval/score"] and last["eval/watch"] > first["eval/watch"]
    assert len(rows) == result["steps"] == STEPS and "warning/gamed-reward" not in result
    assert_tensors(weights(tmp_path / "run"), weights(tmp_path / f"run/checkpoints/step_{STEPS}"))


def test_a_killed_run_ends_where_the_undisturbed_one_does(
    train: Train, tmp_path: Path, held_out: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the evaluations whose agreement ends it; then again when it had ended and was not saved yet."""
    watch = [*held_out, "--watch", "rouge", "--stop-on-divergence", "--save-steps", 2]
    assert train(*watch, folder="whole").exit_code == 0
    ended = result_of(tmp_path / "whole")["diverged_at"]
    step, card = Trainer.step, StageSession.write_card

    def dies(self: Trainer) -> object:
        if self.state.step == ended - 1:
            raise RuntimeError("the machine went away")
        return step(self)

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("the machine went away")

    monkeypatch.setattr(Trainer, "step", dies)
    assert train(*watch).exit_code == 1
    state = json.loads((tmp_path / f"run/checkpoints/step_{ended - 2}/state.json").read_text())
    assert state["watched"]["streak"] == 1, "it was killed at another place than was meant"
    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(StageSession, "write_card", fails)
    assert train(*watch, "--resume").exit_code == 1
    monkeypatch.setattr(StageSession, "write_card", card)
    monkeypatch.setattr(Trainer, "step", lambda self: pytest.fail("a run that had ended went on"))
    done = train(*watch, "--resume")
    assert done.exit_code == 0, done.stderr
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert_tensors(weights(tmp_path / "run/best_watched"), weights(tmp_path / "whole/best_watched"))
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--watch", "rouge"], "no held-out data"),
        (["--eval-data", "DATA", "--watch", "rouge1"], "is trained on"),
        (["--eval-data", "DATA", "--stop-on-divergence"], "'watch.name' is needed"),
        (["--eval-data", "DATA", "--watch", "rouge", "--stop-on-divergence", "--set", "save_best=false"], "keeps none"),
        (["--eval-data", "DATA", "--watch", "rouge", "--set", "watch.figure=rouge.rouge9"], "no figure 'rouge.rouge9'"),
        (["--eval-data", "DATA", "--watch", "rogue"], "unknown metric 'rogue'"),
    ],
)
def test_a_watch_that_cannot_be_is_refused_before_anything_is_written(
    train: Train, task: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    flags = [str(task / "held_out.jsonl") if flag == "DATA" else flag for flag in flags]
    refused = train(*flags, reward="rouge1")
    assert refused.exit_code == 2 and message in refused.stderr, refused.stderr
    assert not (tmp_path / "run").exists()


def test_when_a_watch_looks_cannot_change_on_the_way(train: Train, tmp_path: Path, held_out: list[object]) -> None:
    watch = [*held_out, "--watch", "rouge", "--max-steps", 2]
    assert train(*watch).exit_code == 0
    manifest = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps({**manifest, "status": "failed"}))
    refused = train(*watch, "--set", "eval.every=1", "--resume")
    assert refused.exit_code == 2 and "eval.every is 1; the run began with 2" in refused.stderr


def test_few_held_out_prompts_are_said(train: Train, held_out: list[object]) -> None:
    done = train(*held_out, "--watch", "rouge", "--set", "eval.limit=19", "--max-steps", 1)
    assert done.exit_code == 0 and "19 held-out prompts are few" in done.stderr


# --- rewards that move

MOVING = """
reward:
  - rouge1
  - {name: length, weight: 0.5, weight_start: 0, weight_steps: 4, params: {target: 2, start: 8, steps: 4}}
"""


@pytest.fixture
def moving(run_cli: Train, task: Path, tmp_path: Path) -> Train:
    """A policy that hardly changes, so that only the reward does."""
    (tmp_path / "moving.yaml").write_text(MOVING)
    (tmp_path / "final.yaml").write_text("reward:\n  - rouge1\n  - {name: length, weight: 0.5, params: {target: 2}}\n")

    def run(config: str, *more: object, folder: str = "run") -> Result:
        return run_cli(
            "train", "--alg", "ppo", "--model", task / "sft", "--data", task / "train.jsonl", "--device", "cpu",
            "-c", tmp_path / f"{config}.yaml", "--episodes", 8, "--batch-size", 8, "--epochs", 1, "--lr", "1e-9",
            "--max-new-tokens", 16, "--max-steps", 6, "--save-steps", 2, *more, "-o", tmp_path / folder,
        )  # fmt: skip

    return run


def test_a_reward_moves_with_the_steps_and_is_held_out_as_it_ends(
    moving: Train, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = ["--eval-data", task / "held_out.jsonl", "--set", "eval.every=1", "--set", "eval.limit=8"]
    for config in ("moving", "final"):
        done = moving(config, *held_out, folder=config)
        assert done.exit_code == 0, done.stderr
    rows, final = rows_of(tmp_path / "moving"), rows_of(tmp_path / "final")
    assert [row["score/weight/length"] for row in rows] == [0, 0.125, 0.25, 0.375, 0.5, 0.5]
    assert [row["score/part/length.target"] for row in rows] == [8, 6.5, 5, 3.5, 2, 2]
    for row in rows:
        parts = row["score/part/rouge1"] + row["score/weight/length"] * row["score/part/length"]
        assert row["score/mean"] == pytest.approx(parts, abs=1e-9)
    assert [row["eval/score"] for row in rows] == pytest.approx([row["eval/score"] for row in final], abs=1e-6)
    assert rows[0]["score/mean"] > final[0]["score/mean"] + 0.1
    assert rows[-1]["score/mean"] == pytest.approx(final[-1]["score/mean"], abs=1e-6)
    assert not any("score/weight/length" in row for row in final)
    step = Trainer.step

    def dies(self: Trainer) -> object:
        if self.state.step == 3:
            raise RuntimeError("the machine went away")
        return step(self)

    monkeypatch.setattr(Trainer, "step", dies)
    assert moving("moving", *held_out).exit_code == 1
    monkeypatch.setattr(Trainer, "step", step)
    assert moving("moving", *held_out, "--resume").exit_code == 0
    assert_figures(rows, rows_of(tmp_path / "run"))


def test_a_gate_and_a_reward_that_moves_are_refused(moving: Train, task: Path, tmp_path: Path) -> None:
    guide = ["--guide", f"hf:{task / 'sft'}", "--gate"]
    refused = moving("moving", "--alg", "ppo++", *guide)
    assert refused.exit_code == 2 and "compares scores of different iterations" in refused.stderr, refused.stderr
    assert not (tmp_path / "run").exists()
