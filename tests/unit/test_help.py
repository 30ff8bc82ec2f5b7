"""Help is instant: no command's help imports torch, pydantic or the like. And it keeps its promises."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest

from rlgf_cli import __version__
from rlgf_cli.cli.commands import COMMANDS, FAMILIES, load

SLOW = ("torch", "transformers", "trl", "datasets", "pydantic", "numpy", "accelerate", "peft")

PROBE = """
import sys
from rlgf_cli.cli.app import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code or 0
print("LOADED", *[name for name in {slow!r} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


def help_of(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROBE.format(slow=SLOW), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"},
        timeout=60,
    )


@pytest.mark.parametrize("name", ["", *FAMILIES, *COMMANDS])
def test_help_loads_nothing_slow(name):
    shown = help_of(*name.split(), "--help")
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr.strip() == "LOADED"
    assert f"Usage: rlgf {name}".strip() in shown.stdout
    assert f"rlgf {name} ".replace("  ", " ") in shown.stdout.partition("Usage")[2].partition("\n")[2]  # an example


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_summary_is_the_first_line_of_the_commands_own_help(name):
    own = inspect.cleandoc(load(name).help).splitlines()[0]
    assert COMMANDS[name].summary == own
    assert own.endswith(".")


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_shows_examples(name):
    blocks = load(name).help.split("```")[1::2]
    examples = [line.strip() for block in blocks for line in block.splitlines() if line.strip()]
    assert examples and examples[0].startswith("rlgf ")
    assert any(f"rlgf {name}" in line for line in examples)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_flag_says_what_it_does(name):
    assert [p.name for p in load(name).params if not getattr(p, "help", None)] == []


def test_version(run_cli):
    shown = run_cli("--version")
    assert (shown.exit_code, shown.stdout) == (0, f"rlgf {__version__}\n")


def test_rlgf_alone_prints_the_help_and_no_error(run_cli):
    shown = run_cli()
    assert shown.exit_code == 2
    assert "Usage: rlgf" in shown.stdout
    assert "error" not in shown.stderr


def test_short_help(run_cli):
    assert "Usage: rlgf prepare" in run_cli("prepare", "-h").stdout


@pytest.mark.parametrize("flag", ["--print-config", "--print_config"])
@pytest.mark.parametrize("bad", ["--drop-bad", "--drop_bad"])
def test_underscores_and_hyphens_are_one_flag(run_cli, flag, bad):
    shown = run_cli("prepare", "--task", "imdb", "-o", "x", bad, flag)
    assert shown.exit_code == 0, shown.stderr
    assert "# drop_bad: flag" in shown.stdout


def test_underscores_in_values_stay(run_cli):
    shown = run_cli("prepare", "--dataset=my_data.jsonl", "--group_by=a_b", "-o", "x_y", "--print-config")
    assert "group_by: a_b" in shown.stdout and "dataset: my_data.jsonl" in shown.stdout


def test_a_commands_name_may_be_spelled_with_underscores(run_cli):
    assert "Usage: rlgf collect-guide" in run_cli("collect_guide", "--help").stdout
