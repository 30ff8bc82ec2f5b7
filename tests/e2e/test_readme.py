"""The README's commands are run as they stand, in order, in a copy of what they need."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def commands() -> list[str]:
    """Every command of the README's bash blocks, continuation lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_readme_starts_with_the_two_commands_of_the_makefile() -> None:
    first = re.search(r"^```\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    assert first is not None
    targets = re.findall(r"^make ([\w-]+)", first[1], re.M)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def test_the_tour_runs_as_it_is_written(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "recipes" / "synthetic", tmp_path / "recipes" / "synthetic")
    found = commands()
    assert len(found) >= 8
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in found:
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (
        "PPO++"
        in subprocess.run(
            ["rlgf", "compare", "SFT=runs/tour/sft", "PPO++=runs/tour/ppopp"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
