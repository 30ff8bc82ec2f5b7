"""``best/``: replaced whole, and mended after a kill, whichever way the run then goes on."""

from __future__ import annotations

import errno
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from rl import loaded_from
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.runs import best


@pytest.fixture
def loaded(tiny_gpt2: Path) -> Loaded:
    return loaded_from(tiny_gpt2)


def keep(loaded: Loaded, run: Path, step: int) -> None:
    best.save(run / "best", loaded, step=step, score=step / 10, workshop=run / "checkpoints")


def names(run: Path) -> list[str]:
    return sorted(str(p.relative_to(run)) for pattern in ("*", "*/.*") for p in run.glob(pattern))


def test_a_new_one_replaces_the_former(loaded: Loaded, tmp_path: Path) -> None:
    assert best.read(tmp_path / "best") is None
    for step in (3, 6):
        keep(loaded, tmp_path, step)
        assert best.read(tmp_path / "best") == {"schema_version": 1, "step": step, "score": step / 10}
    assert names(tmp_path) == ["best", "checkpoints"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_at_any_rename_is_mended(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Before the second rename the former one is what there is, from then on the new one; nothing else is left."""
    keep(loaded, tmp_path, 3)
    replace, left = Path.replace, renames

    def until_killed(self: Path, target: Path) -> Path:
        nonlocal left
        if self.name in ("best", ".best.new"):
            if left == 0:
                raise SystemExit(9)
            left -= 1
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", until_killed)
        patch.setattr(best.shutil, "rmtree", lambda *_, **__: None)  # nor is anything cleaned up
        with pytest.raises(SystemExit) if renames < 2 else nullcontext():
            keep(loaded, tmp_path, 6)
    best.finish_interrupted(tmp_path / "best", tmp_path / "checkpoints")
    found = best.read(tmp_path / "best")
    assert found is not None and found["step"] == (6 if renames == 2 else 3)
    assert names(tmp_path) == ["best", "checkpoints"]


def test_a_full_disk_leaves_the_former_one(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(loaded, tmp_path, 3)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(best, "write_json", full)
    with pytest.raises(OSError):
        keep(loaded, tmp_path, 6)
    found = best.read(tmp_path / "best")
    assert found is not None and found["step"] == 3
    assert names(tmp_path) == ["best", "checkpoints"]
