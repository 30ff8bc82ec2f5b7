"""The documentation keeps its promises: generated parts are fresh, links lead somewhere, flags exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from rlgf_cli.cli.commands import COMMANDS, called, load

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SCRIPTS = sorted(ROOT.glob("recipes/**/*.sh"))
EVERYWHERE = {"--help", "-h", "--debug", "--offline"}
OF_RLGF = {"--version", "--install-completion", "--show-completion", *EVERYWHERE}


def generator():
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", [p for p in PAGES if p.parent.name == "docs"], ids=lambda path: path.name)
def test_generated_parts_are_fresh(path):
    text = path.read_text(encoding="utf-8")
    assert generator().rendered(text) == text, "stale: run `make docs`"


def test_the_generator_sees_a_change():
    stale = "<!-- generated: commands -->\n| old |\n<!-- end -->"
    fresh = generator().rendered(stale)
    assert "| old |" not in fresh and "`rlgf prepare`" in fresh
    assert generator().rendered(fresh) == fresh


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(path: Path, text: str) -> list[str]:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        file = (path.parent / target) if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    assert dead_links(path, path.read_text(encoding="utf-8")) == []


def test_a_dead_link_is_seen():
    page = ROOT / "docs" / "index.md"
    text = (
        "[a](nowhere.md) [b](errors.md#no-such) [c](errors.md#exit-codes) [d](https://example.org) [e](#the-commands)"
    )
    assert dead_links(page, text) == ["nowhere.md", "errors.md#no-such"]


def command_lines(text: str, *, markdown: bool) -> list[str]:
    """The ``rlgf ...`` lines of a shell script, or of a page's code blocks; continued lines are joined."""
    blocks = re.findall(r"```(?:bash|sh|console)?\n(.*?)```", text, re.DOTALL) if markdown else [text]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("rlgf ")]


def unknown_words(line: str) -> list[str]:
    """What in a command line does not exist: the command, or flags of it."""
    words = shlex.split(line, comments=True)[1:]
    for end in ("|", ">", "&&", ";"):
        words = words[: words.index(end)] if end in words else words
    flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
    name = words[0] if words else ""
    if name.startswith("-"):
        return sorted(flags - OF_RLGF)
    if name.isupper():  # `rlgf COMMAND --help`
        return sorted(flags - EVERYWHERE)
    if (name := called(words)) is None:
        return words[:1]
    known = {option for parameter in load(name).params for option in [*parameter.opts, *parameter.secondary_opts]}
    return sorted(flag for flag in flags - EVERYWHERE if flag.replace("_", "-") not in known)


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_pages_and_scripts_exist(path):
    lines = command_lines(path.read_text(encoding="utf-8"), markdown=path.suffix == ".md")
    assert [(line, unknown) for line in lines if (unknown := unknown_words(line))] == []


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_examples_of_a_commands_help_exist(name):
    lines = command_lines(load(name).help, markdown=True)
    assert lines and [(line, unknown) for line in lines if (unknown := unknown_words(line))] == []


@pytest.mark.parametrize(
    ("line", "unknown"),
    [
        ("rlgf prepare --datset x", ["--datset"]),
        ("rlgf prepare --drop_bad --check x | head -1", []),
        ("rlgf prepar x", ["prepar"]),
        ("rlgf --version", []),
        ("rlgf --verbose", ["--verbose"]),
        ("rlgf COMMAND --help", []),
        ('rlgf prepare --map "prompt=--x {a}" # --not-a-flag', []),
    ],
)
def test_a_flag_that_does_not_exist_is_seen(line, unknown):
    assert unknown_words(line) == unknown
