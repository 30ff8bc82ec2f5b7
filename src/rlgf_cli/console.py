"""Results go to stdout, everything else to stderr. Progress bars appear on a terminal, lines of progress elsewhere."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from rlgf_cli import signals
from rlgf_cli.errors import Interrupted, RlgfError


class OutputClosed(Exception):
    """The reader of stdout has closed it (``rlgf ls rewards | head -1``)."""


_muted = False
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def mute() -> None:
    """Print nothing in this process, one of several, from now on, except errors that are its own."""
    global _muted
    _muted = True


def result(text: str = "") -> None:
    """Print a line of the command's result on stdout, on a terminal without control characters. Raises OutputClosed
    where stdout is closed."""
    if _muted:
        return
    try:
        print(without_control(text) if sys.stdout.isatty() else text, flush=True)
    except BrokenPipeError:
        # else the interpreter reports the closed pipe once more when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputClosed from None


def result_json(value: Any) -> None:
    """Print the command's result as one JSON document."""
    result(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def log(text: str) -> None:
    """Print a line on stderr, without control characters: it may hold a server's or a model's words."""
    if not _muted:
        print(without_control(text), file=sys.stderr, flush=True)


def without_control(text: str) -> str:
    """A text in which control characters other than tabs and line breaks are replaced: a terminal would obey them."""
    return _CONTROL.sub("\ufffd", text)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    log(f"warning: {text}")


_screen: Any = None
"""The terminal that a bar is drawn on: lines printed on it appear above the bar."""
_COLOURS = {"guide": "cyan", "policy": "yellow"}
_SHOWN = 600
"""Most characters of a text that are shown."""
_EVERY_S = 30.0
"""Seconds between two lines of progress, at first."""


def authored(head: str, segments: Sequence[tuple[str, str]], tail: str) -> None:
    """Print a text with the author of every part: by colours on a terminal, else by labels.

    Control characters of a model's text are replaced, so that a terminal does not execute them.
    """
    if _muted:
        return
    from rich.console import Console
    from rich.text import Text

    screen: Any = _screen or Console(stderr=True)
    coloured = screen.is_terminal and screen.color_system is not None and not screen.no_color
    line = Text("  ")
    for author, text in segments:
        shown = one_line(text)
        line.append(shown if coloured else f"[{author}]{shown}", style=_COLOURS.get(author, "") if coloured else "")
    line.append(f"  {tail}", style="dim" if coloured else "")
    if coloured:
        for author in dict.fromkeys(author for author, _ in segments):
            line.append(f" {author}", style=_COLOURS.get(author, ""))
    for shown_line in (Text(one_line(head), style="bold" if coloured else ""), line):
        screen.print(shown_line, soft_wrap=True)


def one_line(text: str) -> str:
    """The text as one line without control characters, cut at :data:`_SHOWN`."""
    line = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
    return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."


def render_error(error: RlgfError) -> None:
    """Print an error: place, message, hint. One process prints an error that all of them raise."""
    if _muted and error.shared:
        return
    kind = "interrupted" if isinstance(error, Interrupted) else "stopped" if error.exit_code == 3 else "error"
    for line in [f"{kind}: {error}", *([f"hint: {error.hint}"] if error.hint else [])]:
        print(without_control(line), file=sys.stderr, flush=True)


class Progress(Protocol):
    """The progress of a long loop: ``update(n)`` adds steps; ``note`` is the short text behind the bar."""

    def update(self, steps: int = 1, note: str = "") -> None: ...


class _Silent:
    def update(self, steps: int = 1, note: str = "") -> None:
        pass


class _Lines:
    """Lines with rate and time left, for a stderr that is no terminal.

    The first line comes after :data:`_EVERY_S`. Lines are that far apart for ten minutes, later a twentieth of the time
    that has passed: a long run has about a hundred. ``milestones``: parts of the whole that print a line each, too.
    """

    def __init__(self, label: str, total: int | None, done: int, milestones: int, clock: Callable[[], float]) -> None:
        self._label, self._total, self._milestones, self._clock = label, total, milestones, clock
        self._begun_with = self._done = done
        self._part = self._part_of(done)
        self._note = ""
        self._began = self._printed = clock()

    def _part_of(self, done: int) -> int:
        return done * self._milestones // self._total if self._total else 0

    def update(self, steps: int = 1, note: str = "") -> None:
        self._done += steps
        self._note = note or self._note
        now = self._clock()
        part = self._part_of(self._done)
        if part == self._part and now - self._printed < max(_EVERY_S, (now - self._began) / 20):
            return
        self._printed, self._part = now, part
        rate = (self._done - self._begun_with) / max(now - self._began, 1e-9)
        facts = [f"{rate:.3g}/s"] if rate else []
        if self._total is not None and rate:
            facts.append(f"{_span((self._total - self._done) / rate)} left")
        whole = "" if self._total is None else f"/{self._total}"
        shown = f" ({', '.join(facts)})" if facts else ""
        log(f"{self._label} {self._done}{whole}{shown}{'  ' + self._note if self._note else ''}")


def _span(seconds: float) -> str:
    """A duration in one unit."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class _Bar:
    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def update(self, steps: int = 1, note: str = "") -> None:
        fields = {"note": note} if note else {}
        self._bar.update(self._task, advance=steps, **fields)


@contextmanager
def progress(
    label: str,
    total: int | None,
    *,
    done: int = 0,
    milestones: int = 0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """A progress bar with rate and time left on stderr; lines now and then where stderr is no terminal.

    ``total`` None: unknown. ``done``: steps of an earlier session, which do not count in the rate. ``milestones``: the
    number of parts of the whole that print a line each, besides the lines by time. ``clock`` gives seconds.
    """
    if _muted:
        yield _Silent()
        return
    if not sys.stderr.isatty():
        yield _Lines(label, total, done, milestones, clock)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.3g}/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    global _screen
    _screen = Console(stderr=True)
    try:
        with RichProgress(*columns, console=_screen) as bar:
            yield _Bar(bar, bar.add_task(label, total=total, completed=done, note=""))
    finally:
        _screen = None


def interruptible(what: str) -> AbstractContextManager[signals.Stop]:
    """:func:`signals.stoppable`, which prints ``what`` is still done when the first signal comes."""

    def announce(name: str) -> None:
        log(f"{what}; Ctrl-C again stops at once" if name == "SIGINT" else f"{name}: {what}")

    return signals.stoppable(announce)


def table(header: list[str], rows: Iterable[Iterable[str]]) -> str:
    """A table as Markdown: the first column is aligned left, the others right."""
    cells = [header, *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: list[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *[line(row) for row in cells[1:]]])
