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
def test_the_guide_decides(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    out = tmp_path / "evidence"
    script = ["bash", str(ROOT / "recipes" / "demo" / "evidence.sh"), str(out), "1"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = out / "seed_1"
    guided = ("PPO++", "AggreVaTeD", "LOLS", "D2LOLS")
    for name in ("table.json", "ppo_table.json", "guide_table.json"):  # against the start, PPO and the guide
        rows = differences(folder / name)
        for system in guided:
            assert rows[system]["difference"]["low"] > 0, f"{system} in {name}: {rows[system]}"
    alone = differences(folder / "guide_table.json")
    assert alone["cut:inner"]["value"] < 0.05, "with cut: inner this seed collapses"
    assert alone["AggreVaTeD"]["value"] > 0.8
