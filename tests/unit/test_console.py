"""Texts with their authors on stderr: colours on a terminal, labels elsewhere, and nothing that a terminal obeys."""

from __future__ import annotations

import io
import itertools
import re
import sys
import time
from typing import Any

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


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines_of(monkeypatch: pytest.MonkeyPatch, steps: int, each_s: float, **given: Any) -> list[tuple[float, str]]:
    """What is said, and after how many seconds, while ``steps`` steps of ``each_s`` seconds are done."""
    said: list[tuple[float, str]] = []
    clock = Clock()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(console, "log", lambda text: said.append((clock.now - 1000, text)))
    with console.progress("generating", given.pop("total", steps), clock=clock, **given) as bar:
        for _ in range(steps):
            clock.now += each_s
            bar.update(1, given.get("note", ""))
    return said


def test_lines_now_and_then_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    said = lines_of(monkeypatch, 1000, 0.08)
    assert [round(after) for after, _ in said] == [30, 60]
    assert said[0][1] == "generating 375/1000 (12.5/s, 50 s left)"


def test_a_short_step_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of(monkeypatch, 1000, 0.029) == []


def test_slow_steps_say_a_line_each_and_long_ones_in_larger_units(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [text for _, text in lines_of(monkeypatch, 3, 3600.0)]
    assert said == [
        "generating 1/3 (0.000278/s, 2.0 h left)",
        "generating 2/3 (0.000278/s, 60 min left)",
        "generating 3/3 (0.000278/s, 0 s left)",
    ]


def test_a_long_step_does_not_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    said = lines_of(monkeypatch, 86400, 1.0)
    assert 60 < len(said) < 150
    assert max(b - a for (a, _), (b, _) in itertools.pairwise(said)) < 86400 / 15


def test_steps_of_an_earlier_session_are_no_part_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    said = lines_of(monkeypatch, 100, 1.0, total=1000, done=900)
    assert said[0][1] == "generating 930/1000 (1/s, 70 s left)"


def test_a_whole_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of(monkeypatch, 40, 1.0, total=None)[0][1] == "generating 30 (1/s)"


def test_milestones_are_said_however_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [text.partition(" (")[0] for _, text in lines_of(monkeypatch, 40, 0.001, milestones=4)]
    assert said == [f"generating {n}/40" for n in (10, 20, 30, 40)]


def test_the_newest_note_stands_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with console.progress("ppo", 10, clock=clock) as bar:
        bar.update(1, "score 0.5")
        clock.now += 31
        bar.update()
    assert stream.getvalue() == "ppo 2/10 (0.0645/s, 124 s left)  score 0.5\n".replace("124 s", "2 min")


def test_rate_and_time_left_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    with console.progress("scoring", 10) as bar:
        for _ in range(4):
            bar.update(1)
            time.sleep(0.002)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "4/10" in shown and re.search(r"\d/s ", shown) and re.search(r"\d:\d\d:\d\d", shown)
