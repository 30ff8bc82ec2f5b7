"""What the shell sees: exit codes, one-line errors, closed pipes, completion, the global flags."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from rlgf_cli import console
from rlgf_cli.cli import app as application
from rlgf_cli.cli import commands
from rlgf_cli.errors import Interrupted, RlgfError, StoppedEarly, UserError

RLGF = [sys.executable, "-m", "rlgf_cli"]
SHELL_IS_NAMED = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
"""typer takes the shell from the command line, not from the program that started the tests (make starts sh)."""


@pytest.fixture
def command(monkeypatch, request):
    """Put a body in the place of ``rlgf env``."""

    def install(body):
        module = type(sys)("rlgf_cli.cli.made_up")
        module.made_up = body
        monkeypatch.setitem(sys.modules, "rlgf_cli.cli.made_up", module)
        monkeypatch.setitem(commands.COMMANDS, "env", commands.Target("made_up:made_up", "Made up."))

    return install


def raises(error: BaseException):
    def body() -> None:
        """Made up."""
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("bad flag", where="a.yaml:3", hint="fix it"), 2, "error: a.yaml:3: bad flag\nhint: fix it\n"),
        (RlgfError("it broke"), 1, "error: it broke\n"),
        (StoppedEarly("budget spent", hint="--resume"), 3, "stopped: budget spent\nhint: --resume\n"),
        (Interrupted("step 7 is saved"), 130, "interrupted: step 7 is saved\n"),
        (KeyboardInterrupt(), 130, "interrupted: by Ctrl-C\n"),
        (OSError(errno.ENOSPC, "x", "out/f"), 2, "error: out/f: no space left on the disk\n"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "error: no space left on the disk\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: /x: permission denied\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "error: a pipe or connection was closed"),
        (ZeroDivisionError("oh"), 1, "error: ZeroDivisionError: oh\nhint: rlgf does not expect this error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_are_letters_with_exit_codes(command, run_cli, error, code, message):
    command(raises(error))
    shown = run_cli("env")
    assert shown.exit_code == code
    assert shown.stderr.startswith(message)
    assert shown.stdout == ""
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize("where", ["before", "after"])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(command, run_cli, where):
    command(raises(UserError("bad flag")))
    shown = run_cli("--debug", "env") if where == "before" else run_cli("env", "--debug")
    assert shown.exit_code == 2
    assert "Traceback" in shown.stderr and "error: bad flag" in shown.stderr


def test_offline_reaches_the_hub_libraries(command, run_cli, monkeypatch):
    seen = {}
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)

    def body() -> None:
        """Made up."""
        seen.update(hub=os.environ.get("HF_HUB_OFFLINE"), data=os.environ.get("HF_DATASETS_OFFLINE"))

    command(body)
    assert run_cli("env").exit_code == 0
    assert seen == {"hub": None, "data": None}
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # so that what the command line sets is taken back after the test
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    run_cli("env", "--offline")
    assert seen == {"hub": "1", "data": "1"}


def test_flags_behind_two_hyphens_are_not_ours():
    assert application._take_global(["a", "--debug", "--", "--offline"]) == (["a", "--", "--offline"], {"--debug"})


def test_an_unknown_command_is_refused_with_the_nearest(run_cli):
    shown = run_cli("prepar")
    assert shown.exit_code == 2
    assert "'prepar'" in shown.stderr and "'prepare'" in shown.stderr


def test_an_unknown_flag_is_refused_with_the_command_whose_help_lists_them(run_cli):
    shown = run_cli("prepare", "--drop-badd")
    assert shown.exit_code == 2
    assert "--drop-badd" in shown.stderr and "rlgf prepare --help" in shown.stderr


def test_a_closed_stdout_is_no_error():
    """``rlgf ls rewards | head -1``: the reader is gone before everything is printed."""
    read, write = os.pipe()
    os.close(read)
    try:
        shown = subprocess.run([*RLGF, "ls", "rewards"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(write)
    assert (shown.returncode, shown.stderr) == (0, "")


def test_help_into_a_closed_stdout_has_no_traceback():
    read, write = os.pipe()
    os.close(read)
    try:
        shown = subprocess.run([*RLGF, "--help"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(write)
    assert shown.stderr == ""


def test_after_a_closed_stdout_nothing_more_can_fail_there(monkeypatch):
    """Python flushes stdout once more when it ends; by then it must lead somewhere."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed, monkeypatch.context() as patched:  # noqa: PTH123 - a descriptor, no path
        patched.setattr(sys, "stdout", closed)
        with pytest.raises(console.OutputClosed):
            console.result("text")
        os.write(write, b"more")


def complete(words: str) -> list[str]:
    """What bash would offer for the last word of a line."""
    count = len(words.split(" ")) - 1
    environment = {**os.environ, "_RLGF_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(count)}
    shown = subprocess.run(
        [sys.executable, "-c", "from rlgf_cli.cli.app import main; main()"],
        capture_output=True, text=True, env=environment, timeout=60,
    )  # fmt: skip
    assert (shown.returncode, shown.stderr) == (0, "")
    return shown.stdout.split()


def test_completion_of_commands():
    assert complete("rlgf prep") == ["prepare"]
    assert set(complete("rlgf ")) >= {name.split()[0] for name in commands.COMMANDS}


def test_completion_of_a_commands_flags():
    assert complete("rlgf prepare --dataset") == ["--dataset", "--dataset-name", "--dataset-config"]
    assert complete("rlgf prepare --drop-bad --over") == ["--overwrite"]


def test_the_completion_script_names_the_variable_that_main_answers_to():
    shown = subprocess.run(
        [*RLGF, "--show-completion", "bash"], capture_output=True, text=True, env=SHELL_IS_NAMED, timeout=60
    )
    assert shown.returncode == 0, shown.stderr
    assert "_RLGF_COMPLETE=complete_bash" in shown.stdout
    assert "-F _rlgf_completion rlgf" in shown.stdout


def test_completion_installs_itself(tmp_path):
    environment = {**SHELL_IS_NAMED, "HOME": str(tmp_path)}
    shown = subprocess.run(
        [*RLGF, "--install-completion", "bash"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert shown.returncode == 0, shown.stderr
    scripts = [path for path in tmp_path.rglob("*") if path.is_file() and "rlgf" in path.name]
    assert len(scripts) == 1 and "_RLGF_COMPLETE" in scripts[0].read_text()
