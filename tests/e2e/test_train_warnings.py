"""Warnings on real runs of ``rlgf train``: said once on stderr, counted into run.json, the same after a resumption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Result

Train = Callable[..., Result]


@pytest.fixture
def train(run_cli: Train, examples_file: Path, tmp_path: Path, tiny_gpt2: Path) -> Train:
    (tmp_path / "reward.py").write_text(
        "def always(text):\n    return 0.5\n\ndef letters(text):\n    return len(text) % 7 / 7\n"
    )

    def run(reward: str, folder: str, *flags: object) -> Result:
        return run_cli(
            "train", "--alg", "ppo", "--model", tiny_gpt2, "--data", examples_file, "--device", "cpu",
            "--reward", f"{tmp_path / 'reward.py'}:{reward}", "--episodes", 8, "--batch-size", 8, "--epochs", 1,
            "--max-new-tokens", 8, "--max-steps", 8, *flags, "-o", tmp_path / folder,
        )  # fmt: skip

    return run


def warned(result: Result, name: str) -> int:
    return result.stderr.count(name)


def counts(folder: Path) -> dict[str, int]:
    result = json.loads((folder / "run.json").read_text())["result"]
    return {name: count for name, count in result.items() if name.startswith("warning/")}


def test_each_is_said_once_and_counted(train: Train, tmp_path: Path) -> None:
    done = train("always", "run")
    assert done.exit_code == 0, done.stderr
    assert warned(done, "warning: step 5: all texts of the last 5 steps scored the same (0.5 in this one)") == 1
    assert warned(done, "scored the same") == 1 and "likely causes: the start never succeeds" in done.stderr
    assert counts(tmp_path / "run")["warning/constant-reward"] == 4
    assert "constant-reward at 4" in done.stderr.splitlines()[-1]


def test_nothing_is_said_of_a_score_that_differs(train: Train, tmp_path: Path) -> None:
    done = train("letters", "run", "--set", "lengths.min_new_tokens=8")  # no text may end early
    assert done.exit_code == 0 and "likely causes" not in done.stderr and "these held" not in done.stderr
    assert counts(tmp_path / "run") == {}


def test_a_resumed_run_says_nothing_twice_and_counts_on(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 7, resumed from step 6: the warning was said in step 5."""
    from rlgf_cli.training.loop import Trainer

    train("always", "whole")
    step = Trainer.step

    def killed(self: Trainer) -> object:
        if self.state.step == 6:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", killed)
    train("always", "run", "--save-steps", 3)
    monkeypatch.setattr(Trainer, "step", step)
    done = train("always", "run", "--save-steps", 3, "--resume")
    assert done.exit_code == 0, done.stderr
    assert "resuming from step 6" in done.stderr and warned(done, "scored the same") == 0
    assert counts(tmp_path / "run") == counts(tmp_path / "whole")
    assert counts(tmp_path / "run")["warning/constant-reward"] == 4
