"""The errors that a user sees. Each says what was wrong, where, and what to do next.

Exit codes: 0 done; 1 failed; 2 the user can fix it; 3 stopped early with a valid partial result;
130 interrupted after saving.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable


class RlgfError(Exception):
    """A failure of a known cause (exit code 1).

    ``message`` says what was wrong, ``where`` names the place (``file:line`` where there is one) and
    ``hint`` says what to do next.
    """

    exit_code = 1
    shared = False
    """Whether every process of a run raises this error, so that one of them prints it."""

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class UserError(RlgfError):
    """The user can fix it: a flag, a config key, an input file, a folder (exit code 2)."""

    exit_code = 2


class StoppedEarly(RlgfError):
    """A limit was reached (budget, outage), or the command was told to end by SIGTERM or SIGUSR1; what was written is
    valid and can be resumed (exit code 3)."""

    exit_code = 3


class Interrupted(RlgfError):
    """The user pressed Ctrl-C and the state was saved (exit code 130)."""

    exit_code = 130


class Signalled(KeyboardInterrupt):
    """SIGTERM or SIGUSR1 (``name``) ends the command at once, as a KeyboardInterrupt does after Ctrl-C."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class RlgfWarning(UserWarning):
    """A warning for the user from a room that does not write to the console; the same text is shown once."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's quota, is full.

    Libraries that write model files raise exceptions of their own, with the system's message in them.
    """
    full = (errno.ENOSPC, errno.EDQUOT)
    return (isinstance(error, OSError) and error.errno in full) or os.strerror(errno.ENOSPC) in str(error)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known names, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + ", ".join(known) if known else "nothing is known here"
