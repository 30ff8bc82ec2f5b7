"""Texts with their authors on stderr: colours on a terminal, labels elsewhere, and nothing that a terminal obeys."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from rlgf_cli import console

PARTS = [("guide", "the cat"), ("policy", " sees it")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, segments: list[tuple[str, str]], **env: str) -> str:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", stream)
    console.authored("step 1: cat", segments, "(score 1.000)")
    return stream.getvalue()


def test_labels_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    said = shown(monkeypatch, io.StringIO(), PARTS)
    assert said == "step 1: cat\n  [guide]the cat[policy] sees it  (score 1.000)\n"


def test_colours_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    said = shown(monkeypatch, Terminal(), PARTS)
    assert "\x1b[36mthe cat\x1b[0m" in said and "\x1b[33m sees it\x1b[0m" in said and "[guide]" not in said
    assert said.index("\x1b[36m guide") < said.index("\x1b[33m policy")  # which colour is whose


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_labels_where_a_terminal_shows_no_colours(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    said = shown(monkeypatch, Terminal(), PARTS, **env)
    assert "[guide]the cat[policy] sees it" in said and "\x1b[36m" not in said


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_what_a_model_writes_moves_no_cursor(monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]) -> None:
    """Neither escape sequences nor markup nor line ends, and a page of text is cut."""
    segments = [("guide", "a\x1b[2Jb\nc\r\x07"), ("policy", "[red]d[/red]" + "e" * 5000)]
    said = shown(monkeypatch, stream(), segments)
    assert "\x1b[2J" not in said and "\x07" not in said and "\r" not in said
    assert said.count("\n") == 2 and "[red]d[/red]" in said and 500 < len(said) < 1200 and "..." in said


def test_a_bar_stays_below(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    with console.progress("training", 10) as bar:
        bar.update(3)
        console.authored("step 3: cat", PARTS, "")
        assert isinstance(console._screen, Console)
    assert console._screen is None
    line = next(line for line in stream.getvalue().split("\n") if "step 3: cat" in line)
    assert "training" not in line.split("\x1b[2K")[-1]


def test_who_does_not_speak_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_muted", True)
    assert shown(monkeypatch, io.StringIO(), PARTS) == ""
