"""One process at a time writes an output; a process that ends, however it ends, leaves no lock."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlgf_cli.artifacts import lock
from rlgf_cli.artifacts.rundir import RunDir
from rlgf_cli.artifacts.runfile import claim_file
from rlgf_cli.errors import RlgfWarning, UserError

HOLD = """
import sys
from pathlib import Path
from rlgf_cli.artifacts.rundir import RunDir
from rlgf_cli.artifacts.runfile import claim_file
path = Path(sys.argv[1])
held = claim_file(path, "collect-guide") if path.suffix else RunDir.claim(path, "train")
with held.running():
    print("held", flush=True)
    sys.stdin.read()
"""
Held = Callable[[Path], "subprocess.Popen[str]"]


@pytest.fixture
def held_by_another() -> Iterator[Held]:
    """Another process that claims an output and works until its stdin is closed."""
    started: list[subprocess.Popen[str]] = []

    def start(path: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def claim(path: Path, existing: str) -> object:
    if path.suffix:
        return claim_file(path, "collect-guide", existing=existing)  # type: ignore[arg-type]
    return RunDir.claim(path, "train", existing=existing)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["run", "guide.jsonl"])
def test_two_processes_do_not_write_one_output(tmp_path: Path, held_by_another: Held, name: str) -> None:
    path = tmp_path / name
    process = held_by_another(path)
    for existing in ("resume", "overwrite", *(["refuse"] if path.suffix else [])):
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        with pytest.raises(UserError, match="another command is writing to it") as caught:
            claim(path, existing)
        assert f"process {process.pid} on " in caught.value.message and "since 20" in caught.value.message
        assert caught.value.where == str(path) and "another -o" in (caught.value.hint or "")
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    with pytest.raises(UserError, match="another command"):
        lock.refuse_held(path)
    process.communicate("")
    lock.refuse_held(path)
    assert claim(path, "resume") is not None


@pytest.mark.parametrize("name", ["run", "guide.jsonl"])
def test_a_killed_process_leaves_no_lock(tmp_path: Path, held_by_another: Held, name: str) -> None:
    process = held_by_another(tmp_path / name)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert lock.lock_path(tmp_path / name).is_file()
    lock.refuse_held(tmp_path / name)
    with claim(tmp_path / name, "resume").running():  # type: ignore[attr-defined]
        assert json.loads(lock.lock_path(tmp_path / name).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.rglob("*.lock"))


def test_a_refused_claim_leaves_no_lock(tmp_path: Path) -> None:
    (tmp_path / "guide.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="not written by rlgf"):
        claim_file(tmp_path / "guide.jsonl", "collect-guide", existing="resume")
    assert not list(tmp_path.rglob("*.lock"))


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.warns(RlgfWarning, match="cannot be locked .No locks available"):
        run = RunDir.claim(tmp_path / "run", "train")
    with run.running():
        pass
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "done"
